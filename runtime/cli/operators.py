"""A recording as a table: every operator with the implementation that ran, its time and its
rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import device as _device
from ..record import Call
from .explain import floor_seconds


@dataclass(frozen=True)
class Row:
    """One operator by one implementation in one phase."""

    op: str
    impl: str
    calls: int
    seconds: float
    """Inside the implementation, less operators that it called."""
    share: float
    """Of the phase's time while recording."""
    flops: float
    bytes: float
    least_seconds: float
    """The sum over the calls of the roofline's least time, from the machine's measured peaks."""
    bound: str
    """What most of the least time is: 'arithmetic' or 'memory'."""

    @property
    def gflops(self) -> float:
        """10^9 operations a second; 0 for operators that only move data."""
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gbytes(self) -> float:
        """10^9 bytes a second, of the bytes that must move at least."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def attained(self) -> float:
        """The least time as a share of the time taken: 1 is as fast as the machine's measured peaks
        allow."""
        return self.least_seconds / self.seconds if self.seconds else 0.0

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Phase:
    """Prefill or decode of the recorded pass."""

    name: str
    steps: int
    """Calls of the model."""
    seconds: float
    rows: tuple[Row, ...]

    @property
    def outside(self) -> float:
        """Seconds outside every operator: what of the model torch computes by itself, and
        Python."""
        return max(0.0, self.seconds - sum(r.seconds for r in self.rows))


def phase(
    name: str, steps: int, seconds: float, calls: Sequence[Call], peaks: _device.Peaks
) -> Phase:
    """The rows of a recording, by time."""
    groups: dict[tuple[str, str], list[Call]] = {}
    for call in calls:
        groups.setdefault((call.op, call.impl), []).append(call)
    rows = []
    for (op, impl), members in groups.items():
        spent = sum(c.seconds for c in members)
        floors = [floor_seconds(c.flops, c.bytes, peaks) for c in members]
        least = sum(s for s, _ in floors)
        arithmetic = sum(s for s, bound in floors if bound == "arithmetic")
        rows.append(
            Row(
                op,
                impl,
                len(members),
                spent,
                spent / seconds if seconds else 0.0,
                sum(c.flops for c in members),
                sum(c.bytes for c in members),
                least,
                "arithmetic" if 2 * arithmetic >= least else "memory",
            )
        )
    return Phase(name, steps, seconds, tuple(sorted(rows, key=lambda r: -r.seconds)))
