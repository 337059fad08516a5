"""Hashes of the n-grams that end at a token, in 64 bits."""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from .._arrays import array, given
from .._compile import kernel, part
from .._pool import for_each

TOKENS = 64
"""Of a task."""


@intrinsic
def _high_product(typingctx, a, b):
    """The upper 64 bits of the product of two uint64."""

    def generate(context, builder, signature, values):
        long = ir.IntType(128)
        product = builder.mul(*(builder.zext(v, long) for v in values))
        return builder.trunc(builder.lshr(product, long(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


def hash_arguments(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor | None,
    pad: int,
    lookback: Tensor | None,
    blocked: Tensor | None,
) -> tuple:
    """What `hash_token` takes, behind the token: int64 arrays and the pad.

    The reciprocals floor((2**64 - 1) / modulus) make a division a product: of any x below 2**63 the
    upper half of x * reciprocal is the quotient or one less.
    """
    B, n = tokens.shape[0], multipliers.shape[0]
    sizes = array(moduli.long())
    starts = torch.zeros(moduli.numel()) if offsets is None else offsets
    older = tokens.new_full((B, n - 1), -1) if lookback is None else lookback
    reciprocals = np.uint64(2**64 - 1) // sizes.astype(np.uint64)
    return (
        array(tokens.long()),
        array(multipliers),
        sizes,
        reciprocals,
        array(starts.long()),
        pad,
        array(older.long()),
        given(blocked, 2, torch.bool),
    )


@part
def hash_token(b, s, hashed, rows):
    """rows[c] = the row number of each column for the n-grams that end at token s of sequence b."""
    tokens, multipliers, moduli, reciprocals, starts, pad, lookback, blocked = hashed
    before, heads = lookback.shape[1], moduli.shape[1]
    alive, mix = True, np.int64(0)
    for g in range(before + 1):
        at = s - g
        token = tokens[b, at] if at >= 0 else lookback[b, before + at]
        if at >= 0 and blocked.size > 0 and blocked[b, at]:
            token = np.int64(-1)
        alive = alive and token >= 0
        mix ^= (token if alive else pad) * multipliers[g]
        if g == 0:
            continue
        # A floor modulo: for a negative number m - 1 - (~mix mod m), and ~mix is not negative.
        sign = mix >> np.int64(63)
        x = np.uint64(mix ^ sign)
        first = (g - 1) * heads
        ms, inverse, start = moduli[g - 1], reciprocals[g - 1], starts[first : first + heads]
        out = rows[first : first + heads]
        for j in range(heads):
            m = np.uint64(ms[j])
            r = x - _high_product(x, inverse[j]) * m
            row = np.int64(min(r, r - m))  # what is below m wraps to a large number
            out[j] = (row if sign == 0 else ms[j] - np.int64(1) - row) + start[j]


@part
def _task(task, thread, given, rows):
    B, S = rows.shape[:2]
    for at in range(task * TOKENS, min((task + 1) * TOKENS, B * S)):
        hash_token(at // S, at % S, given, rows[at // S, at % S])


@kernel
def hash_all(given, rows, threads):
    """rows[b, s] = the row numbers of token s of sequence b."""
    B, S = rows.shape[:2]
    for_each(_task, -(-B * S // TOKENS), threads, (given, rows))
