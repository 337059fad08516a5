"""mhc_post_backward in one pass over the streams: pieces of a token's rows in the first-level
cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._arrays import array, scratch
from .._compile import kernel, part
from .._numbers import narrow, wide
from .._pool import for_each, threads

PIECE = 512
"""Elements of a stream at a time: the streams of dy and x, f and a sum stay in the cache."""


@part
def _widen(row, first, out):
    some = row[first : first + out.shape[0]]
    for d in range(out.shape[0]):
        out[d] = wide(some[d])


@part
def _mixed(shares, rows, total, out, first):
    """out[first + d] = sum_k shares[k] * rows[k, d]."""
    size = total.shape[0]
    into = out[first : first + size]
    if shares.shape[0] == 4:
        a, b, c, d = rows[0, :size], rows[1, :size], rows[2, :size], rows[3, :size]
        p, q, r, s = shares[0], shares[1], shares[2], shares[3]
        for i in range(size):
            into[i] = narrow(p * a[i] + q * b[i] + r * c[i] + s * d[i], into)
        return
    total[:] = np.float32(0)
    for k in range(shares.shape[0]):
        row, share = rows[k, :size], shares[k]
        for i in range(size):
            total[i] += share * row[i]
    for i in range(size):
        into[i] = narrow(total[i], into)


@part
def _products(row, rows, sums):
    """sums[k] += row . rows[k]."""
    size = row.shape[0]
    if sums.shape[0] == 4:
        a, b, c, d = rows[0, :size], rows[1, :size], rows[2, :size], rows[3, :size]
        sa = sb = sc = sd = np.float32(0)
        for i in range(size):
            sa += row[i] * a[i]
            sb += row[i] * b[i]
            sc += row[i] * c[i]
            sd += row[i] * d[i]
        sums[0] += sa
        sums[1] += sb
        sums[2] += sc
        sums[3] += sd
        return
    for k in range(sums.shape[0]):
        other, total = rows[k, :size], np.float32(0)
        for i in range(size):
            total += row[i] * other[i]
        sums[k] += total


@part
def _token(t, thread, dy, f, x, post, comb, df, dx, dpost, dcomb, room):
    R, D = x.shape[1:]
    dpost[t, :] = np.float32(0)
    dcomb[t, :, :] = np.float32(0)
    for first in range(0, D, PIECE):
        size = min(PIECE, D - first)
        grads, row, total = room[thread], room[thread, R, :size], room[thread, R + 1, :size]
        for k in range(R):
            _widen(dy[t, k], first, grads[k, :size])
        _widen(f[t], first, row)
        _products(row, grads, dpost[t])
        _mixed(post[t], grads, total, df[t], first)
        for j in range(R):
            _widen(x[t, j], first, row)
            _products(row, grads, dcomb[t, j])
            _mixed(comb[t, j], grads, total, dx[t, j], first)


@kernel
def _run(dy, f, x, post, comb, df, dx, dpost, dcomb, room):
    args = (dy, f, x, post, comb, df, dx, dpost, dcomb, room)
    for_each(_token, x.shape[0], room.shape[0], args)


def numba(
    dy: Tensor, f: Tensor, x: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """df = sum_k post[k]*dy[k], dx[j] = sum_k comb[j,k]*dy[k], dpost and dcomb their dots."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    df, dx = torch.empty(f.shape, dtype=f.dtype), torch.empty(x.shape, dtype=x.dtype)
    dpost, dcomb = torch.empty(post.shape), torch.empty(comb.shape)
    _run(
        array(dy.reshape(T, R, D)),
        array(f.reshape(T, D)),
        array(x.reshape(T, R, D)),
        array(post.float().reshape(T, R)),
        array(comb.float().reshape(T, R, R)),
        array(df.view(T, D)),
        array(dx.view(T, R, D)),
        array(dpost.view(T, R)),
        array(dcomb.view(T, R, R)),
        scratch(threads(2 * T * R * D), R + 2, PIECE),
    )
    return df, dx, dpost, dcomb
