"""mhc_post in one pass over the streams: a task mixes a piece of a token's streams."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.mhc.mhc_post import mhc_post, mhc_post_backward

from .._arrays import array, floats, scratch
from .._compile import kernel, part
from .._numbers import narrow, wide
from .._pool import for_each, threads
from ._mhc_post_backward import numba as backward

PIECE = 1024
"""Elements of a stream at a time: a few streams of them stay in the first-level cache."""


@part
def _piece(task, thread, f, x, post, comb, y, sums):
    (R, D), pieces = x.shape[1:], -(-x.shape[2] // PIECE)
    t, first = task // pieces, task % pieces * PIECE
    size = min(PIECE, D - first)
    fs, total = f[t, first : first + size], sums[thread, :size]
    for k in range(R):
        out = y[t, k, first : first + size]
        if R == 4:
            a, b, c, d = comb[t, 0, k], comb[t, 1, k], comb[t, 2, k], comb[t, 3, k]
            xa, xb = x[t, 0, first : first + size], x[t, 1, first : first + size]
            xc, xd = x[t, 2, first : first + size], x[t, 3, first : first + size]
            for i in range(size):
                mixed = a * wide(xa[i]) + b * wide(xb[i]) + c * wide(xc[i]) + d * wide(xd[i])
                out[i] = narrow(post[t, k] * wide(fs[i]) + mixed, out)
            continue
        for i in range(size):
            total[i] = post[t, k] * wide(fs[i])
        for j in range(R):
            share, row = comb[t, j, k], x[t, j, first : first + size]
            for i in range(size):
                total[i] += share * wide(row[i])
        for i in range(size):
            out[i] = narrow(total[i], out)


@kernel
def _run(f, x, post, comb, y, sums):
    tasks = x.shape[0] * -(-x.shape[2] // PIECE)
    for_each(_piece, tasks, sums.shape[0], (f, x, post, comb, y, sums))


@mhc_post.impl(requires=floats("x"))
def numba(f: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """y[k] = post[k] * f + sum_j comb[j,k] * x[j]."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    y = torch.empty(x.shape, dtype=x.dtype)
    _run(
        array(f.reshape(T, D)),
        array(x.reshape(T, R, D)),
        array(post.float().reshape(T, R)),
        array(comb.float().reshape(T, R, R)),
        array(y.view(T, R, D)),
        scratch(threads(T * R * D), PIECE),
    )
    return y


mhc_post_backward.impl(requires=floats("x"))(backward)
