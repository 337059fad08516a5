"""Do two results agree? The one tolerance model, and comparisons under it.

    |y - want| <= u_out |want| + min((n + 16) u_acc, CAP) * (max |want| + spread)

u_out is the unit roundoff of the output's dtype: one rounding at the end. u_acc is that of the
accumulator and n the number of terms of the longest sum (the declaration's `accumulate`): the
standard bound of a sum in any order (Higham 2002, section 4.2) on a few operations before and after
it. `spread` is how far the exact result moves when the inputs move by one unit roundoff, divided by
that roundoff: the condition of the problem. The conformance kit measures it on the float64
reference; where nobody has, CONDITION stands for it.

Where `want` is no exact result but another implementation's, both may be off: twice as much is
allowed. A library that rounds what it computes on the way, as ours don't, is allowed `roundings` of
them, and so is a float32 product that torch may round (torch.set_float32_matmul_precision).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtypes import UNIT_ROUNDOFF, accumulator
from .op import Op

CAP = 2e-5
"""No float32 sum of ours may be worse than this, relative to the largest output and the
condition."""

CONDITION = 24.0
"""The spread of a problem whose condition was not measured, as a multiple of its largest result."""

NEAR_TIES = 0.02
"""Share of selected indices that may differ between two implementations, and one index of a call:
scores that nearly tie may fall either way."""

PIECE = 1 << 24
"""Elements that are compared at a time: a whole copy in float64 may be several GB."""

_PRODUCT = {"high": 2.0**-11, "medium": UNIT_ROUNDOFF[torch.bfloat16]}
"""What torch may round the factors of float32 products to, where it was allowed to."""


def terms_of(op: Op[..., Any], dims: Mapping[str, Any]) -> float:
    """The terms of the longest sum of a call with these dims and arguments."""
    sizes = {k: math.prod(v) if isinstance(v, tuple) else v for k, v in dims.items()}
    return float(op.accumulate({**dict.fromkeys(op.signature.symbols(), 0), **sizes}))


def per_unit(
    dtype: torch.dtype,
    *,
    terms: float = math.inf,
    exact: bool = True,
    roundings: int = 0,
    rounded_to: torch.dtype | None = None,
) -> tuple[float, float]:
    """What an element of an output of `dtype` may be off, of its own size, and of the largest one
    and the spread.

    terms       of the longest sum
    exact       what it is compared with is exact; else it may be off as much itself
    roundings   of intermediate results to the dtype `rounded_to` (None: the output's)
    """
    u_acc, sides = UNIT_ROUNDOFF[accumulator(dtype)], 1 if exact else 2
    rest = min((terms + 16) * u_acc, CAP)
    rest += roundings * UNIT_ROUNDOFF[rounded_to or dtype]
    if dtype != torch.float64:
        rest += 2 * _PRODUCT.get(torch.get_float32_matmul_precision(), 0.0)
    return sides * 1.01 * UNIT_ROUNDOFF[dtype], sides * rest


def compare(
    name: str,
    got: Tensor,
    want: Tensor,
    *,
    spread: float | None = None,
    exact: bool = True,
    **model: Any,
) -> str | None:
    """None if an output is within tolerance of what is wanted, else a sentence with the first
    element that isn't. Integers must be equal.

    spread   of the exact result; None: not measured
    exact    `want` is exact, in float64
    model    as `per_unit` takes it
    """
    if got.shape != want.shape:
        return f"{name} has shape {list(got.shape)}; expected {list(want.shape)}"
    got, want = _here(got), _here(want)
    if not got.dtype.is_floating_point:
        return _first(name, got, want, None, got != want)
    largest = _largest(want)
    of_own, of_all = per_unit(got.dtype, exact=exact, **model)
    base = of_all * (largest + (CONDITION * largest if spread is None else spread))
    info = torch.finfo(got.dtype)
    off = torch.empty(got.shape, dtype=torch.bool, device=got.device)
    for a, b, flags in _pieces(got, want, off):
        limit = of_own * b.abs().masked_fill(b.isinf(), 0) + base + info.tiny
        near = ((a - b).abs() <= limit) | (a == b) | (a.isnan() & b.isnan())
        # What is nearly the dtype's largest number may have been rounded to infinity.
        for one, other in ((a, b), (b, a))[: 1 if exact else 2]:
            over = one.isinf() & (other.abs() > info.max * (1 - 1e-3))
            near |= over & (one.sign() == other.sign())
        flags.copy_(~near)
    return _first(name, got, want, (of_own, base + info.tiny), off)


def agree(
    op: Op[..., Any],
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    dims: Mapping[str, Any],
    *,
    exact: bool = False,
    chosen: bool = True,
    **model: Any,
) -> str | None:
    """None if two results of one call of an operator agree, else what doesn't, in a sentence: its
    outputs in order, or the arguments that it writes.

    dims     of the call, with its plain arguments
    exact    `want` is the reference's
    chosen   indices are chosen by scores, of which two may nearly tie: a few may differ, and what
             is given for each of them (a weight) is compared in rows of the same ones. False: they
             must be equal.
    model    as `per_unit` takes it

    A library that gives fewer results than the operator (no logsumexp) is compared in those.
    """
    names = op.mutates or tuple(op.signature.outputs)
    floats = any("f32" in kinds for kinds in op.rules.alternatives.values())
    selected: tuple[Tensor, Tensor] | None = None
    for name, g, w in zip(names, got, want, strict=False):
        if g.dtype != w.dtype and not exact:
            return f"{name} is {g.dtype}; expected {w.dtype}"
        if chosen and floats and not g.dtype.is_floating_point and g.shape == w.shape and g.dim():
            problem = _chosen(name, g, w.to(g.device))
            selected = g, w
        else:
            if selected is not None and g.shape == w.shape == selected[0].shape:
                g, w = _in_one_order(g, w, *selected)
            problem = compare(name, g, w, exact=exact, terms=terms_of(op, dims), **model)
        if problem is not None:
            return problem
    return None


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, of the largest value: how far off a result is, for a report. Infinite
    where one has a number and the other none."""
    got, want = _here(got), _here(want)
    worst = 0.0
    for a, b in _pieces(got, want):
        off = (a - b).abs().masked_fill_((a == b) | (a.isnan() & b.isnan()), 0)
        worst = max(worst, float(off.nan_to_num_(nan=math.inf).max()) if off.numel() else 0.0)
    return worst / max(_largest(want), 1e-30)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Outputs as a tuple, whatever their number."""
    return () if value is None else value if isinstance(value, tuple) else (value,)


def shared(got: Tensor, want: Tensor) -> float:
    """The share of indices, [..., k], that stand in the same row of both."""
    a, b = _sorted(got), _sorted(want)
    if not a.numel():
        return 1.0
    at = torch.searchsorted(b, a).clamp_(max=b.shape[-1] - 1)
    return float((b.gather(-1, at) == a).double().mean())


def _chosen(name: str, got: Tensor, want: Tensor) -> str | None:
    share = shared(got, want)
    if (1 - share) * got.numel() <= 1 + NEAR_TIES * got.numel():
        return None
    return f"{name} shares {share:.0%} of its entries with what is expected"


def _in_one_order(
    got: Tensor, want: Tensor, got_ids: Tensor, want_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """What is given for each index, in the order of the indices; rows of other indices are left out
    (as equal)."""
    to = got_ids.device
    want, want_ids = want.to(to), want_ids.to(to)
    mine, theirs = (t.argsort(dim=-1, stable=True) for t in (got_ids, want_ids))
    same = (got_ids.gather(-1, mine) == want_ids.gather(-1, theirs)).all(-1, keepdim=True)
    a, b = got.gather(-1, mine), want.gather(-1, theirs)
    return torch.where(same, a, b.to(a.dtype)), b


def _sorted(indices: Tensor) -> Tensor:
    return indices.detach().to(torch.int64).sort(-1).values.contiguous()


def _here(value: Tensor) -> Tensor:
    """The tensor where float64 can be computed with."""
    value = value.detach()
    return value if value.is_cuda else value.cpu()


def _largest(want: Tensor) -> float:
    """The largest finite magnitude."""
    found = (piece.abs().nan_to_num_(0.0, 0.0, 0.0) for (piece,) in _pieces(want))
    return max((float(piece.max()) for piece in found), default=0.0)


def _first(
    name: str, got: Tensor, want: Tensor, limits: tuple[float, float] | None, off: Tensor
) -> str | None:
    """The sentence about the first element that is off, or None."""
    count = int(off.sum())
    if not count:
        return None
    at = tuple(int(i) for i in off.nonzero()[0])
    a, b = got[at].item(), want[at].item()
    if limits is None:
        return f"{name}{list(at)} is {a}; expected {b} ({count} differ)"
    limit = limits[1] + (limits[0] * abs(b) if math.isfinite(b) else 0.0)
    wanted = f"expected {b!r} +- {limit:.3g} ({count} of {off.numel()} differ)"
    return f"{name}{list(at)} is {a!r}; {wanted}"


def _pieces(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some elements at a time, floats in float64."""
    flat = [t.reshape(-1) for t in (first, *others)]
    for at in range(0, first.numel(), PIECE):
        yield tuple(
            t[at : at + PIECE].double() if t.dtype.is_floating_point else t[at : at + PIECE]
            for t in flat
        )
