"""Level 5: an implementation against the limits of its device, verified before it is timed."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import transom
from transom import device as devices
from transom.op import Op

from . import checks
from .cases import Case, build

if TYPE_CHECKING:
    from .levels import Question, Subject

ELEMENTS = 1 << 24
"""Of the largest tensor of a timed call: references in float64 are slow and wide."""
ROUNDS = 7


def largest(op: Op[..., Any], device: str) -> Case:
    """The last of the operator's examples that is small enough to be verified."""
    fitting = []
    for example in op.examples:
        shapes = [
            s.sizes(example)
            for s in op.signature.inputs.values()
            if not s.optional and set(_symbols(s)) <= set(example)
        ]
        if all(torch.Size(s).numel() <= ELEMENTS for s in shapes):
            fitting.append(example)
    case = build(op, fitting[-1] if fitting else op.examples[0], device=device)
    # The declared cost counts every key; a query that saw fewer would seem to beat the device.
    for p, value in zip(op.parameters, case.values, strict=True):
        if p.name == "visible" and value is not None:
            value.fill_(case.dims["N"])
    return replace(case, buffers=tuple((buffer, buffer.clone()) for buffer, _ in case.buffers))


def _symbols(shape: Any) -> list[str]:
    return [d.lstrip("*") for d, e in zip(shape.dims, shape.expressions, strict=True) if e is None]


def times(case: Case, impls: list[str], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of the call by implementation, taken in turns in one run."""
    op = case.op
    given = dict(zip((p.name for p in op.parameters), case.values, strict=True))
    device = next(iter(op.tensors(case.values).values())).device
    # A device that keeps the time of its own work (a simulated one) is asked; else the wall clock.
    clock = getattr(getattr(torch, device.type, None), "clock", time.perf_counter)
    taken: dict[str, list[float]] = {i: [] for i in impls}
    for lap in range(rounds + 1):
        for impl in impls:
            with transom.use(**{op.name: impl}):
                devices.synchronize(device)
                start = clock()
                op.call(**given)
                devices.synchronize(device)
                if lap:
                    taken[impl].append(clock() - start)
    return {impl: statistics.median(some) for impl, some in taken.items()}


def figures(op: Op[..., Any], impl: str, case: Case) -> dict[str, float]:
    """Seconds, the fraction of the roofline by the device's peaks, and times the composite."""
    device = case.draws["device"]
    taken = times(case, list(dict.fromkeys((impl, "composite"))))
    cost, peak = op.cost(case.values), devices.peaks(device)
    floor = max(cost.flops / (peak.gflops * 1e9), cost.bytes / (peak.gbytes * 1e9))
    return {
        "seconds": taken[impl],
        "of_roofline": floor / taken[impl],
        "times_composite": taken["composite"] / taken[impl],
    }


def verified(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """The call that is timed is right."""
    return checks.numbers(op, impl, case)


def timed(subject: Subject, question: Question) -> tuple[str, str, Case | None]:
    """The largest example that can be verified: its figures as text."""
    from .levels import each

    case = largest(subject.op, subject.device)
    status, text, shown = each(subject, question, [case])
    if status != "pass":
        return status, text, shown
    found = figures(subject.op, subject.impl, case)
    return (
        "pass",
        f"{found['of_roofline']:.1%} of the roofline, {found['times_composite']:.2f} times as fast "
        "as the composite",
        None,
    )
