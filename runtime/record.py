"""record(): a list of what ran, in order."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import device as _device
from .abi import extension
from .facts import Facts
from .op import Impl, Op


@dataclass
class Call:
    """One recorded call."""

    op: str
    impl: str
    device: str
    facts: Facts = field(repr=False)
    seconds: float = 0.0
    """With record(timing=True): time inside the implementation, less that of operators which it
    called."""
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a call of certain facts runs."""

    op: Op[..., Any]
    impl: Impl
    facts: Facts
    check: Callable[..., None] | None
    run: Callable[..., Any]
    """Of the declared arguments in order, as check."""


# Process-wide on purpose: autograd runs the backward of an accelerator in threads of its own.
_recorders: list[tuple[list[Call], bool]] = []
_lock = threading.RLock()
_nested = threading.local()


@contextlib.contextmanager
def record(*, timing: bool = False) -> Iterator[list[Call]]:
    """A list of what runs within the block, in order: .op, .impl, .device (and with timing:
    .seconds, .flops, .bytes).

    Timing waits for the device before and after each call. Holds for the whole process.
    """
    calls: list[Call] = []
    entry = (calls, timing)
    with _lock:
        _recorders.append(entry)
        extension.set_mode("recorded", run)
    try:
        yield calls
    finally:
        with _lock:
            _recorders[:] = [r for r in _recorders if r is not entry]
            extension.set_mode("recorded", run if _recorders else None)


def run(plan: Plan, values: tuple[Any, ...]) -> Any:
    """Run a call by its plan, and record it where record() listens."""
    if not _recorders:
        return plan.run(*values)
    call = Call(plan.op.name, plan.impl.name, plan.facts.device, plan.facts)
    timed = any(timing for _, timing in _recorders)
    for calls, _ in list(_recorders):
        calls.append(call)
    if not timed:
        return plan.run(*values)
    cost = plan.op.cost(values)
    call.flops, call.bytes = cost.flops, cost.bytes
    device = next(iter(plan.op.tensors(values).values())).device
    outer, _nested.seconds = getattr(_nested, "seconds", 0.0), 0.0
    _device.synchronize(device)
    start = time.perf_counter()
    try:
        return plan.run(*values)
    finally:
        _device.synchronize(device)
        elapsed = time.perf_counter() - start
        call.seconds = elapsed - _nested.seconds
        _nested.seconds = outer + elapsed
