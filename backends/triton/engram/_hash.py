"""The n-gram hash, as every kernel of this family computes it, and its arguments."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from triton import jit

from .._launch import as_bytes


@jit
def mixed(tokens, lookback, blocked, multipliers, pad, t, S, n, last):
    """t_0*m[0] XOR ... XOR t_last*m[last] of the n-grams that end at the tokens `t` (of B*S), in
    the wrapping arithmetic of int64."""
    s, batch = t % S, t // S
    mix = tl.zeros_like(t).to(tl.int64)
    alive = t >= 0
    for g in range(0, last + 1):
        token = tl.load(tokens + tl.where(s >= g, t - g, t)).to(tl.int64)
        if blocked is not None:
            dead = tl.load(blocked + tl.where(s >= g, t - g, t)) != 0
            token = tl.where(dead, -1, token)
        before = tl.full(t.shape, -1, tl.int64)
        if lookback is not None:
            place = tl.minimum(n - 1 + s - g, n - 2)
            before = tl.load(lookback + batch * (n - 1) + tl.maximum(place, 0)).to(tl.int64)
        token = tl.where(s >= g, token, before)
        alive = alive & (token >= 0)
        mix = mix ^ (tl.where(alive, token, pad) * tl.load(multipliers + g))
    return mix


@jit
def floor_modulo(x, modulus):
    """x mod modulus, never negative; Triton's % has the sign of x."""
    rest = x % modulus
    return tl.where(rest < 0, rest + modulus, rest)


def hash_arguments(
    tokens: Tensor, lookback: Tensor | None, blocked: Tensor | None, multipliers: Tensor, pad: int
) -> tuple[Any, ...]:
    """The first arguments of `mixed`, as kernels take them."""
    return (
        tokens.contiguous(),
        None if lookback is None else lookback.contiguous(),
        as_bytes(blocked),
        multipliers.contiguous(),
        pad,
    )
