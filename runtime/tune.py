"""tune(): times what can run a call and keeps the fastest, in the table of measured choices."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from . import device as _device
from . import dispatch, measured, selection
from .op import Op
from .registry import lookup
from .tolerance import agree, as_tuple


@dataclass(frozen=True)
class Measured:
    """Of one call: median seconds of every implementation that can run it, fastest first."""

    op: str
    seconds: dict[str, float]
    chosen: str

    def __str__(self) -> str:
        fastest = self.seconds[self.chosen]
        rows = [f"  {n}: {s * 1e6:.1f} us ({s / fastest:.2f} x)" for n, s in self.seconds.items()]
        return "\n".join([f"{self.op}: {self.chosen}", *rows])


def tune(op: str | Op[..., Any], *args: Any, repeats: int = 7, **kwargs: Any) -> Measured:
    """Time what can run this call, verified against the composite, and remember the fastest.

    Candidates take turns, medians over `repeats` decide. The choice holds on this machine, for
    calls with the same dtypes, and dims equal up to rounding of the varying ones.
    """
    return measure(*lookup(op).engine.arguments(*args, **kwargs), repeats)


def measure(op: Op[..., Any], values: tuple[Any, ...], repeats: int = 7) -> Measured:
    """tune() for arguments in declared order."""
    facts = dispatch.facts_of(op, values)
    able = selection.able(op, facts)
    right = as_tuple(op.invoke(op.impls["composite"].function, *values))
    for impl in able:  # fast and wrong is wrong
        made = as_tuple(op.invoke(impl.function, *values))
        if (problem := agree(op, made, right, {**facts.arguments, **facts.dims})) is not None:
            raise ValueError(f"{op.name}: impl {impl.name!r} differs from the composite: {problem}")
    device = next(iter(op.tensors(values).values())).device
    times: dict[str, list[float]] = {i.name: [] for i in able}
    for _ in range(repeats):
        for impl in able:
            _device.synchronize(device)
            start = time.perf_counter()
            op.invoke(impl.function, *values)
            _device.synchronize(device)
            times[impl.name].append(time.perf_counter() - start)
    medians = {n: statistics.median(t) for n, t in times.items()}
    medians = dict(sorted(medians.items(), key=lambda item: item[1]))
    chosen = next(iter(medians))
    measured.store(op, facts, chosen)
    return Measured(op.name, medians, chosen)
