"""mhc_pre: products and squares of four tokens at a time, then gates, steps and the sum of each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.kernels.mhc.mhc_pre import mhc_pre, mhc_pre_backward

from .._arrays import array, floats, scratch
from .._compile import kernel, part
from .._numbers import exp, sigmoid
from .._pool import for_each, threads
from ._mhc_pre_backward import pre_backward
from ._mixes import CHUNK, PIECE, TOKENS, mixes, multiply_piece, weighted_sum


@part
def _token(t, thread, x, sums, scale, base, iterations, numbers, h, post, comb, room):
    R, out = post.shape[1], room[thread]
    N = (2 + R) * R
    eps, rms_eps, post_scale = numbers[0], numbers[1], numbers[2]
    a, total = out[: N + 1], out[N + 1 :]
    mixes(sums[t], x.shape[1], rms_eps, a)
    for n in range(R):
        a[n] = sigmoid(a[n] * scale[0] + base[n]) + eps
        post[t, n] = post_scale * sigmoid(a[R + n] * scale[1] + base[R + n])
    m = comb[t]
    for i in range(R):
        for k in range(R):
            m[i, k] = a[2 * R + i * R + k] * scale[2] + base[2 * R + i * R + k]
    _sinkhorn(m, iterations, eps)
    weighted_sum(a, x[t], h[t], total)


@part
def _sinkhorn(m, iterations, eps):
    """The steps of `sinkhorn` on one matrix, in place."""
    R = m.shape[0]
    for i in range(R):
        top = m[i, 0]
        for k in range(1, R):
            top = max(top, m[i, k])
        total = np.float32(0)
        for k in range(R):
            m[i, k] = exp(m[i, k] - top)
            total += m[i, k]
        for k in range(R):
            m[i, k] = m[i, k] / total + eps
    for step in range(iterations):
        for i in range(R if step else 0):
            total = eps
            for k in range(R):
                total += m[i, k]
            for k in range(R):
                m[i, k] /= total
        for k in range(R):
            total = eps
            for i in range(R):
                total += m[i, k]
            for i in range(R):
                m[i, k] /= total


@kernel
def _run(x, fn, scale, base, iterations, numbers, h, post, comb, sums, rows, room):
    T, threads = x.shape[0], rows.shape[0]
    for first in range(0, T, CHUNK):
        last = min(first + CHUNK, T)
        some, part_ = x[first:last], sums[: last - first]
        blocks = -(-(last - first) // TOKENS)
        for_each(multiply_piece, blocks * sums.shape[1], threads, (some, fn, part_, rows))
        outputs = (h[first:last], post[first:last], comb[first:last])
        args = (some, part_, scale, base, iterations, numbers, *outputs, room)
        for_each(_token, last - first, threads, args)


@mhc_pre.impl(requires=floats("x"))
def numba(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
    post_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """h = sum_j pre[j] * x[j]; post and comb are what `mhc_post` takes."""
    (R, D), T, lead = x.shape[-2:], x.shape[:-2].numel(), x.shape[:-2]
    N, pieces, used = (2 + R) * R, max(1, -(-R * D // PIECE)), threads(T * R * R * D)
    h = torch.empty((*lead, D), dtype=x.dtype)
    post, comb = torch.empty((*lead, R)), torch.empty((*lead, R, R))
    _run(
        array(x.reshape(T, R * D)),
        array(fn.float()),
        array(scale.float()),
        array(base.float()),
        iterations,
        np.array((eps, rms_eps, post_scale), np.float32),
        array(h.view(T, D)),
        array(post.view(T, R)),
        array(comb.view(T, R, R)),
        np.empty((min(T, CHUNK), pieces, N + 1), np.float32),
        scratch(used, TOKENS, PIECE),
        scratch(used, N + 1 + PIECE),
    )
    return h, post, comb


mhc_pre_backward.impl(requires=floats("x"))(pre_backward)
