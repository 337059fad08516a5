"""route and its gradient: a program takes a token at a time, all its experts in registers.

Bound by the reading of logits. The largest key is taken k times, each time with the lowest index
among equals: a comparison and two reductions, on every device, with ties as the contract says.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from transom.kernels.moe.route import LINEAR_ABOVE, ROOT_BELOW, TINY, route, route_backward
from transom.requires import at_most

from .._language import narrow, sigmoid
from .._launch import launch, programs, tile_for
from .._offer import floats, offer
from ._gemm import power_of_two

MOST = 4096
"""Experts whose scores fit one program's registers."""

_LINEAR_ABOVE, _ROOT_BELOW = tl.constexpr(LINEAR_ABOVE), tl.constexpr(ROOT_BELOW)
_TINY = tl.constexpr(TINY)


@jit
def _softplus(z):
    # log(1 + e) = log(u) * e / (u - 1) with u the rounded 1 + e (Kahan): as accurate as log1p.
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
    return tl.where(z > _LINEAR_ABOVE, z, tl.where(z < 0, 0.0, z) + log1p)


@jit
def _scores(z, inside, SCORE: tl.constexpr):
    """s of a token's logits; what is not inside takes no part."""
    if SCORE == "softmax":
        top = tl.max(tl.where(inside, z, -float("inf")), 0)
        top = tl.where(top == -float("inf"), 0.0, top)
        e = tl.where(inside, tl.exp(z - top), 0.0)
        # max passes over NaN on some devices; one NaN makes all scores NaN.
        total = tl.sum(e, 0)
        return e / tl.where(total == 0, 1.0, total)
    if SCORE == "sigmoid":
        return sigmoid(z)
    if SCORE == "sqrtsoftplus":
        return tl.where(z < _ROOT_BELOW, tl.exp(0.5 * z), tl.sqrt(_softplus(z)))
    return z


@jit
def _first_of_largest(key, index, LAST: tl.constexpr):
    """The lowest index of the largest key."""
    return tl.min(tl.where(key == tl.max(key, 0), index, LAST), 0)


@jit
def _open_groups(
    key, e, E, groups, top_groups, BIASED: tl.constexpr, P: tl.constexpr, GROUPS: tl.constexpr
):
    """1 for the experts of the groups that may be chosen from."""
    size = E // groups
    mine, group = e // size, tl.arange(0, GROUPS)
    best = tl.full((GROUPS,), -float("inf"), tl.float32)
    for g in range(0, groups):
        here = tl.where((mine == g) & (e < E), key, -float("inf"))
        score = tl.max(here, 0)
        if BIASED:
            at = _first_of_largest(here, e, P)
            second = tl.max(tl.where(e == at, -float("inf"), here), 0)
            both = score + tl.where(size > 1, second, 0.0)
            score = tl.where(both == both, both, score)  # +inf counts beside -inf
        best = tl.where(group == g, score, best)
    taken, kept = group >= groups, tl.zeros((P,), tl.int32)
    for _ in range(0, top_groups):
        # A group of -inf ranks before one that is taken already.
        top = tl.max(tl.where(taken, -float("inf"), best), 0)
        at = tl.min(tl.where((best == top) & (taken == 0), group, GROUPS), 0)
        taken = taken | (group == at)
        kept = tl.where(mine == at, 1, kept)
    return kept


@jit
def _route(
    logits,
    bias,
    preset,
    mask,
    ids,
    weights,
    T,
    E,
    k,
    groups,
    top_groups,
    l_row,
    l_e,
    scale,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPED: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
):
    e, slot = tl.arange(0, P), tl.arange(0, Q)
    inside = e < E
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(t, tl.int64)
        used = inside
        if mask is not None:
            used = e < tl.where(tl.load(mask + row) != 0, E, 0)
        z = tl.load(logits + row * l_row + e * l_e, mask=used, other=0.0).to(tl.float32)
        s = _scores(z, inside, SCORE)
        at = tl.full((Q,), -1, tl.int32)
        chosen = tl.zeros((Q,), tl.float32)
        if preset is not None:
            at = tl.load(preset + row * k + slot, mask=slot < k, other=-1).to(tl.int32)
            at = tl.where((at >= 0) & (at < E), at, -1)
            for i in range(0, k):
                this = tl.max(tl.where(slot == i, at, -1), 0)
                value = tl.sum(tl.where(e == this, s, 0.0), 0)
                chosen = tl.where(slot == i, value, chosen)
        else:
            key = s
            if bias is not None:
                key = s + tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
            key = tl.where(key == key, key, -float("inf"))
            left = inside.to(tl.int32)
            if GROUPED:
                opened = _open_groups(key, e, E, groups, top_groups, bias is not None, P, GROUPS)
                left = tl.where(inside, opened, 0)
            for i in range(0, k):
                top = tl.max(tl.where(left != 0, key, -float("inf")), 0)
                this = tl.min(tl.where((left != 0) & (key == top), e, P), 0)
                left = tl.where(e == this, 0, left)
                at = tl.where(slot == i, this, at)
                chosen = tl.where(slot == i, tl.sum(tl.where(e == this, s, 0.0), 0), chosen)
        if mask is not None:
            at = tl.where(tl.load(mask + row) != 0, at, -1)
        valid = (at >= 0) & (slot < k)
        if SCORE == "topk_softmax":
            top = tl.max(tl.where(valid, chosen, -float("inf")), 0)
            top = tl.where(top == -float("inf"), 0.0, top)
            chosen = tl.where(valid, tl.exp(chosen - top), 0.0)
        chosen = tl.where(valid, chosen, 0.0)
        if RENORMALIZE:
            total = 0.0 + _TINY
            for i in range(0, k):  # in slot order
                total += tl.sum(tl.where(slot == i, chosen, 0.0), 0)
            chosen = chosen / total
        tl.store(ids + row * k + slot, tl.where(valid, at, -1), mask=slot < k)
        tl.store(weights + row * k + slot, tl.where(valid, chosen * scale, 0.0), mask=slot < k)


@jit
def _route_backward(
    dweights,
    logits,
    ids,
    dlogits,
    T,
    E,
    k,
    d_row,
    d_k,
    l_row,
    l_e,
    scale,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
):
    e, slot = tl.arange(0, P), tl.arange(0, Q)
    inside = e < E
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(t, tl.int64)
        at = tl.load(ids + row * k + slot, mask=slot < k, other=-1).to(tl.int32)
        valid = (at >= 0) & (at < E)
        some = tl.max(valid.to(tl.int32), 0) != 0
        read = e < tl.where(some, E, 0)
        z = tl.load(logits + row * l_row + e * l_e, mask=read, other=0.0).to(tl.float32)
        dw = tl.load(dweights + row * d_row + slot * d_k, mask=valid, other=0.0) * scale
        s = _scores(z, inside, SCORE)
        chosen = tl.zeros((Q,), tl.float32)
        for i in range(0, k):
            this = tl.max(tl.where(slot == i, at, -1), 0)
            chosen = tl.where(slot == i, tl.sum(tl.where(e == this, s, 0.0), 0), chosen)
        if SCORE == "topk_softmax":
            top = tl.max(tl.where(valid, chosen, -float("inf")), 0)
            top = tl.where(top == -float("inf"), 0.0, top)
            chosen = tl.where(valid, tl.exp(chosen - top), 0.0)
        chosen = tl.where(valid, chosen, 0.0)
        ds = dw
        if RENORMALIZE:
            total = 0.0 + _TINY
            for i in range(0, k):
                total += tl.sum(tl.where(slot == i, chosen, 0.0), 0)
            p = chosen / total
            ds = dw - tl.sum(dw * p, 0)
            if SCORE == "topk_softmax":
                ds = ds * p
            else:
                ds = ds / total
        full = tl.zeros((P,), tl.float32)
        for i in range(0, k):  # a repeated id adds both slots, in their order
            this = tl.max(tl.where(slot == i, at, -1), 0)
            part = tl.sum(tl.where((slot == i) & valid, ds, 0.0), 0)
            full += tl.where(e == this, part, 0.0)
        if SCORE == "softmax":
            full = s * (full - tl.sum(tl.where(inside, full * s, 0.0), 0))
        elif SCORE == "sigmoid":
            full = full * s * sigmoid(-z)
        elif SCORE == "sqrtsoftplus":
            slope = 0.5 * sigmoid(z) / tl.where(s > _TINY, s, _TINY)
            full = full * tl.where(z < _ROOT_BELOW, 0.5 * s, slope)
        full = tl.where(some, full, 0.0)
        tl.store(dlogits + row * E + e, narrow(full, dlogits.dtype.element_ty), mask=inside)


@offer(route, *floats("logits", "bias"), at_most("E", MOST))
def forward(
    logits: Tensor,
    k: int,
    *,
    score: str,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    preset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ids = the k largest of s + bias, weights = scale * s[ids] / (sum(s[ids]) + 1e-20)."""
    T, E = logits.shape
    ids = torch.empty(T, k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(T, k, dtype=torch.float32, device=logits.device)
    if T:
        tile = tile_for(entry := "route.rows", logits)
        launch(
            _route,
            programs(logits, T, tile),
            logits,
            *_all_contiguous(bias, preset, mask),
            ids,
            weights,
            T,
            E,
            k,
            groups,
            top_groups,
            *logits.stride(),
            scale,
            tile=tile,
            entry=entry,
            SCORE=score,
            RENORMALIZE=renormalize or score == "topk_softmax",
            GROUPED=top_groups < groups,
            P=power_of_two(E),
            Q=power_of_two(k),
            GROUPS=power_of_two(groups),
        )
    return ids, weights


@offer(route_backward, *floats("logits"), at_most("E", MOST))
def backward(
    dweights: Tensor,
    logits: Tensor,
    ids: Tensor,
    *,
    score: str,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """dlogits of `route`, the selection taken as constant."""
    (T, E), k = logits.shape, ids.shape[1]
    dlogits = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
    if T:
        tile = tile_for(entry := "route.rows", logits)
        launch(
            _route_backward,
            programs(logits, T, tile),
            dweights,
            logits,
            ids.contiguous(),
            dlogits,
            T,
            E,
            k,
            *dweights.stride(),
            *logits.stride(),
            scale,
            tile=tile,
            entry=entry,
            SCORE=score,
            RENORMALIZE=renormalize or score == "topk_softmax",
            P=power_of_two(E),
            Q=power_of_two(k),
        )
    return dlogits


def _all_contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)
