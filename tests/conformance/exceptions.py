"""A vendor's exceptions: what its chip cannot do, one reason a line, in a file of its own.

    # operator      implementation  check         reason
    grouped_gemm    acme            numbers f16:  sums in half precision on revision A
    *               acme            vmap:         no batched launch yet

Columns are separated by blanks, the check ends with a colon, `*` stands for any. A line that covers
no failure any more is reported, so that the file cannot rot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .levels import CHECKS, Finding


@dataclass(frozen=True)
class Line:
    """One exception."""

    number: int
    op: str
    impl: str
    check: str
    reason: str

    def covers(self, finding: Finding) -> bool:
        """True if the finding is one that this line excuses."""
        mine = (self.op, self.impl, self.check)
        its = (finding.op, finding.impl, finding.check)
        return all(a in ("*", b) for a, b in zip(mine, its, strict=True))


@dataclass(frozen=True)
class Exceptions:
    """The lines of one file."""

    path: str
    lines: tuple[Line, ...]

    @classmethod
    def read(cls, path: Path) -> Exceptions:
        """The file's lines. Raises ValueError for a line that is not as it must be, or OSError."""
        known = {c.name for c in CHECKS} | {"*"}
        lines = []
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            text = text.partition("#")[0].strip()
            if not text:
                continue
            left, colon, reason = text.partition(":")
            parts = left.split(None, 2)
            if not colon or len(parts) != 3 or not reason.strip():
                raise ValueError(
                    f"{path}:{number}: {text!r}; expected `operator implementation check: reason`"
                )
            op, impl, check = parts
            if check not in known:
                raise ValueError(
                    f"{path}:{number}: {check!r} is no check; expected {', '.join(sorted(known))}"
                )
            lines.append(Line(number, op, impl, check, reason.strip()))
        return cls(str(path), tuple(lines))

    def applied(self, findings: Iterable[Finding]) -> list[Finding]:
        """Failures that a line covers become 'expected', with its reason; a line that covers none
        becomes a finding of its own, 'stale'."""
        used: set[int] = set()
        out = []
        for finding in findings:
            line = next((i for i in self.lines if i.covers(finding)), None)
            if finding.status == "fail" and line is not None:
                used.add(line.number)
                finding = replace(finding, status="expected", text=f"{line.reason}: {finding.text}")
            out.append(finding)
        for line in self.lines:
            if line.number not in used:
                text = f"{self.path}:{line.number} excuses what does not fail; delete the line"
                out.append(Finding(line.op, line.impl, 0, line.check, "stale", text))
        return out
