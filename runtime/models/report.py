"""What `transom.patch` did to a model, module by module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One module: replaced by operators, or left alone for a reason; exactly one is given."""

    path: str
    module: str
    operators: str | None = None
    reason: str | None = None

    @property
    def replaced(self) -> bool:
        """True if the module runs through transom's operators now."""
        return self.reason is None


@dataclass(frozen=True)
class PatchReport:
    """The records of one `patch`, in the order of the model's modules; prints as a short table."""

    model: str
    records: tuple[Record, ...]

    @property
    def replaced(self) -> tuple[Record, ...]:
        """The modules that run through operators now."""
        return tuple(r for r in self.records if r.replaced)

    @property
    def left_alone(self) -> tuple[Record, ...]:
        """The modules that were considered and left as they were, each with its reason."""
        return tuple(r for r in self.records if not r.replaced)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        replaced, left = self.replaced, self.left_alone
        lines = [f"{self.model}: {len(replaced)} modules replaced, {len(left)} left alone"]
        for title, records, arrow in (("replaced", replaced, "->"), ("left alone", left, ":")):
            if records:
                lines.append(f"{title}:")
            # One line for the modules that differ in nothing but the numbers in their paths.
            groups: dict[tuple[str, str, str], list[Record]] = {}
            for r in records:
                key = (re.sub(r"\d+", "*", r.path), r.module, r.operators or r.reason or "")
                groups.setdefault(key, []).append(r)
            for (pattern, module, text), members in groups.items():
                where = members[0].path or "(the model itself)"
                if len(members) > 1:
                    where = f"{pattern} ({len(members)}x)"
                lines.append(f"  {where}  {module} {arrow} {text}")
        return "\n".join(lines)
