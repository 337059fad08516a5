"""Keeping what was measured: JSON lines that stand for themselves, and what changed between two.

A line is one candidate of one case with the commit, the machine, the threads and the versions that
it was measured with. A file may hold several runs; a later line replaces an earlier one of the same
measurement.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from transom import __version__, device

from .measure import Row

FORMAT = 1
"""Of a line: raised when a field changes its meaning or goes away."""

LEAST = 0.03
"""Changes of the median below this share are never told."""


def about(ceilings: dict[str, Any], peers: dict[str, str], commit: str | None) -> dict[str, Any]:
    """What every line of this run begins with."""
    return {
        "schema": FORMAT,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": device.describe("cpu"),
        "arch": device.arch("cpu"),
        "versions": {"transom": __version__, "torch": torch.__version__, **peers},
        "ceilings": {k: round(v, 3) if isinstance(v, float) else v for k, v in ceilings.items()},
    }


def line(run: dict[str, Any], row: Row) -> dict[str, Any]:
    """One line: the run, the row, and the rates that follow."""
    out = {**run, **asdict(row)}
    if row.seconds:
        out["gflops"], out["gbytes"] = row.gflops, row.gbytes
        out["attained_bound"] = row.bound
    return _rounded(out)


def _rounded(value: Any) -> Any:
    """Five digits are more than any timing has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return value


def row_of(found: dict[str, Any]) -> Row:
    """The row of a line; ValueError if it is not one."""
    if found.get("schema") != FORMAT:
        raise ValueError(f"schema is {found.get('schema')!r}; this transom reads {FORMAT}")
    try:
        values = {f.name: found[f.name] for f in fields(Row)}
    except KeyError as error:
        raise ValueError(f"a line has no {error}") from None
    if values["sweep"] is not None:
        values["sweep"] = tuple(values["sweep"])
    return Row(**values)


def save(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write the lines; those of the same measurement on the same machine are replaced."""
    held = _read(path) if path.exists() else []
    kept = {(x["machine"], row_of(x).key): x for x in (*held, *lines)}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in kept.values())
    path.write_text(text, encoding="utf-8")


def load(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; ValueError names the line that is none."""
    found = _read(path)
    for number, x in enumerate(found, 1):
        try:
            row_of(x)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number}: {error}") from None
    return found


def _read(path: Path) -> list[Any]:
    out = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            try:
                out.append(json.loads(text))
            except ValueError:
                raise ValueError(f"line {number}: it is not JSON") from None
    return out


@dataclass(frozen=True)
class Change:
    """One measurement then and now."""

    before: Row
    now: Row
    factor: float
    """How many times as fast it is now, judged by the shares of the ceilings."""
    verdict: str
    """'faster', 'slower' or 'same'."""


@dataclass(frozen=True)
class Comparison:
    """Two runs, measurement by measurement."""

    changes: tuple[Change, ...]
    gone: tuple[Row, ...]
    """Measured then, not now."""
    new: tuple[Row, ...]
    other_machine: str | None
    """What the baseline's machine was, if it was another one."""


def compare(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> Comparison:
    """What got faster or slower beyond the noise.

    Compared are shares of what the machine attained in the same rounds: a machine that is slower
    today, or another one, does not look like a slower kernel. Noise is the range of each run's
    middle half: only when the two ranges are apart, and the medians by LEAST, is it a change.
    """
    machines = [{x.get("machine") for x in lines} for lines in (before, now)]
    # a file may hold several machines: this one's figures, if it has any
    mine = [x for x in before if x.get("machine") in machines[1]]
    old = {row.key: row for row in map(row_of, mine or before) if row.seconds}
    new = {row.key: row for row in map(row_of, now) if row.seconds}
    changes = []
    for key, row in new.items():
        if key in old:
            was = old[key]
            a, b = _speeds(was), _speeds(row)
            factor = b[0] / a[0] if a[0] else 1.0
            apart = b[2] > a[3] or b[3] < a[2]
            told = apart and abs(factor - 1) > LEAST
            verdict = ("faster" if factor > 1 else "slower") if told else "same"
            changes.append(Change(was, row, factor, verdict))
    other = None if mine else ", ".join(sorted(map(str, machines[0])))
    return Comparison(
        tuple(changes),
        tuple(row for key, row in old.items() if key not in new),
        tuple(row for key, row in new.items() if key not in old),
        other,
    )


def _speeds(row: Row) -> list[float]:
    """[median, lowest, quartiles, highest] of what grows as it gets faster: the share of the
    ceilings, or calls a second where there is none (a whole model)."""
    if row.attained:
        return row.attained
    median, low, first, third, high = (1 / s for s in row.seconds)
    return [median, high, third, first, low]
