"""Results against the float64 reference on the same rounded inputs, under transom.tolerance.

The condition of the problem is measured: how far the reference itself moves when its inputs move by
one unit roundoff, with random signs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from transom import tolerance
from transom.dtypes import UNIT_ROUNDOFF
from transom.op import Op, as_numpy, kind_of
from transom.tolerance import as_tuple

if TYPE_CHECKING:
    from .cases import Case

PERTURBATION = 2.0**-30
"""Relative change of the inputs that measures the condition: small against curvature, large against
float64."""


def as_given(case: Case) -> list[Any]:
    """The arguments as the reference takes them, kept from a call that writes some of them."""
    values = [as_numpy(v) for v in case.values]
    return [v.copy() if isinstance(v, np.ndarray) else v for v in values]


def with_reference(case: Case, given: Sequence[Any], got: Sequence[torch.Tensor]) -> str | None:
    """None if outputs, or the arguments that the operator writes, agree with the reference's, in
    shape, dtype and value, and are new contiguous memory; else a sentence.

    given   the arguments, from `as_given` before the call
    """
    op, reference = case.op, case.op.reference_of
    assert reference is not None, f"{op.name} has no reference"
    with np.errstate(all="ignore"):
        want = [np.asarray(w) for w in as_tuple(reference(*given))]
        spreads = spread(reference, given, want, np.random.default_rng(0))
    terms = tolerance.terms_of(op, case.dims)
    if len(got) != len(want):
        return f"{len(got)} outputs; expected {len(want)}"
    names = op.mutates or tuple(op.signature.outputs)
    for name, g, w, s in zip(names, got, want, spreads, strict=True):
        if (problem := _form(op, name, g, case)) is not None:
            return problem
        if (problem := compare(name, g, w, terms, s)) is not None:
            return problem
    return None


def compare(
    name: str, got: torch.Tensor, reference: np.ndarray, terms: float, condition: float
) -> str | None:
    """None if `got` is within tolerance of `reference`, else a sentence with the first element that
    isn't."""
    want = torch.from_numpy(np.ascontiguousarray(reference)).reshape(reference.shape)
    return tolerance.compare(name, got.cpu(), want, spread=condition, terms=terms)


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


def _form(op: Op[..., Any], name: str, got: torch.Tensor, case: Case) -> str | None:
    if op.mutates:
        return None
    tensors = op.tensors(case.values)
    kinds = {n: kind_of(t) for n, t in tensors.items()}
    names = list(op.signature.outputs)
    shape, dtype = op.outputs(case.dims, kinds)[names.index(name)]
    if got.dtype != dtype:
        return f"{name} is {got.dtype}; expected {dtype}"
    if tuple(got.shape) != tuple(shape):
        return f"{name} has shape {list(got.shape)}; expected {list(shape)}"
    if not got.is_contiguous():
        return f"{name} is not contiguous"
    own = got.untyped_storage().data_ptr()
    for other, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and own and tensor.untyped_storage().data_ptr() == own:
            return f"{name} shares memory with {other}"
    return None


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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if both hold the same bits, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.clone(memory_format=torch.contiguous_format).flatten() for t in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
