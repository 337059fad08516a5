"""The one tolerance model: how far a result may lie from the float64 reference on the same rounded
inputs.

    |y - ref| <= u_out |ref| + min((n + 16) u_acc, CAP) * (max |ref| + spread)

u_out is the unit roundoff of the output's dtype: one rounding at the end. u_acc is that of the
accumulator and n the number of terms of the longest sum (the declaration's `accumulate`): the
standard bound of a sum in any order (Higham 2002, section 4.2) on a few operations before and after
it. `spread` is how far the reference itself moves when its inputs move by one unit roundoff,
divided by that roundoff: the condition of the problem, measured with random signs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from transom.dtypes import UNIT_ROUNDOFF, accumulator

CAP = 2e-5
"""No float32 sum of ours may be worse than this, relative to the largest output and the
condition."""

PERTURBATION = 2.0**-30
"""Relative change of the inputs that measures the condition: small against curvature, large against
float64."""


def spread(
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[np.ndarray],
    rng: np.random.Generator,
) -> list[float]:
    """For each output, the largest change per unit of relative change of the float inputs (two
    random sign patterns)."""
    worst = [0.0] * len(outputs)
    if not any(isinstance(v, np.ndarray) and v.dtype == np.float64 for v in inputs):
        return worst  # a reference in integers may take long
    for _ in range(2):
        moved = [
            v * (1 + PERTURBATION * rng.choice([-1.0, 1.0], v.shape))
            if isinstance(v, np.ndarray) and v.dtype == np.float64
            else v
            for v in inputs
        ]
        for i, (a, b) in enumerate(zip(as_tuple(reference(*moved)), outputs, strict=True)):
            with np.errstate(invalid="ignore"):
                change = np.abs(np.asarray(a, np.float64) - b)
            finite = change[np.isfinite(change)]
            worst[i] = max(worst[i], float(finite.max(initial=0.0)) / PERTURBATION)
    return worst


def allowed(
    reference: np.ndarray, dtype: torch.dtype, terms: float, condition: float
) -> np.ndarray:
    """The tolerance of each element of an output of `dtype`."""
    finite = np.abs(reference[np.isfinite(reference)])
    scale = float(finite.max(initial=0.0)) + condition
    u_acc = UNIT_ROUNDOFF[accumulator(dtype)]
    size = np.abs(np.where(np.isfinite(reference), reference, 0.0))
    tiny = torch.finfo(dtype).tiny
    return 1.01 * UNIT_ROUNDOFF[dtype] * size + min((terms + 16) * u_acc, CAP) * scale + tiny


def compare(
    name: str, got: torch.Tensor, reference: np.ndarray, terms: float, condition: float
) -> str | None:
    """None if `got` is within tolerance of `reference`, else a sentence with the worst element."""
    if tuple(got.shape) != reference.shape:
        return f"{name} has shape {list(got.shape)}; expected {list(reference.shape)}"
    if not got.dtype.is_floating_point:
        wrong = np.argwhere(got.cpu().numpy() != reference)
        if not len(wrong):
            return None
        at = tuple(int(i) for i in wrong[0])
        return (
            f"{name}{list(at)} is {got.cpu().numpy()[at]}; expected {reference[at]} "
            f"({len(wrong)} differ)"
        )
    value = got.detach().cpu().double().numpy()
    limit = allowed(reference, got.dtype, terms, condition)
    largest = torch.finfo(got.dtype).max
    with np.errstate(invalid="ignore"):
        near = np.abs(value - reference) <= limit
        near |= value == reference
        near |= np.isnan(value) & np.isnan(reference)
        near |= (
            np.isinf(value)
            & (np.abs(reference) > largest * (1 - 1e-3))
            & (np.sign(value) == np.sign(reference))
        )
    if near.all():
        return None
    at = tuple(int(i) for i in np.argwhere(~near)[0])
    return (
        f"{name}{list(at)} is {value[at]!r}; expected {reference[at]!r} +- {limit[at]:.3g} "
        f"({(~near).sum()} of {near.size} differ)"
    )


def bias(got: torch.Tensor, reference: np.ndarray) -> float | None:
    """Mean signed rounding error in units of the last place, over elements away from zero; None if
    there are too few."""
    value = got.detach().cpu().double().numpy()
    u = UNIT_ROUNDOFF[got.dtype]
    keep = (
        np.isfinite(value)
        & np.isfinite(reference)
        & (np.abs(reference) > 1e-3 * np.abs(reference).max(initial=0))
    )
    if keep.sum() < 400:
        return None
    ulp = np.exp2(np.floor(np.log2(np.abs(reference[keep])))) * 2 * u
    # towards zero counts as negative whatever the sign, so that truncation shows
    return float(np.mean((value[keep] - reference[keep]) * np.sign(reference[keep]) / ulp))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Outputs as a tuple, whatever their number."""
    return () if value is None else value if isinstance(value, tuple) else (value,)
