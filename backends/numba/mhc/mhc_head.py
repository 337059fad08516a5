"""mhc_head: as mhc_pre, with the gates of the streams alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.kernels.mhc.mhc_head import mhc_head, mhc_head_backward

from .._arrays import array, floats, scratch
from .._compile import kernel, part
from .._numbers import sigmoid
from .._pool import for_each, threads
from ._mhc_pre_backward import head_backward
from ._mixes import CHUNK, PIECE, TOKENS, mixes, multiply_piece, weighted_sum


@part
def _token(t, thread, x, sums, scale, base, numbers, h, room):
    R, out = base.shape[0], room[thread]
    a, total = out[: R + 1], out[R + 1 :]
    mixes(sums[t], x.shape[1], numbers[1], a)
    for n in range(R):
        a[n] = sigmoid(a[n] * scale[0] + base[n]) + numbers[0]
    weighted_sum(a, x[t], h[t], total)


@kernel
def _run(x, fn, scale, base, numbers, h, sums, rows, room):
    T, threads = x.shape[0], rows.shape[0]
    for first in range(0, T, CHUNK):
        last = min(first + CHUNK, T)
        some, part_ = x[first:last], sums[: last - first]
        blocks = -(-(last - first) // TOKENS)
        for_each(multiply_piece, blocks * sums.shape[1], threads, (some, fn, part_, rows))
        args = (some, part_, scale, base, numbers, h[first:last], room)
        for_each(_token, last - first, threads, args)


@mhc_head.impl(requires=floats("x"))
def numba(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, rms_eps: float
) -> Tensor:
    """h = sum_j pre[j] * x[j], pre = sigmoid(mix*scale + base) + eps."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    pieces, used = max(1, -(-R * D // PIECE)), threads(T * R * R * D)
    h = torch.empty((*x.shape[:-2], D), dtype=x.dtype)
    _run(
        array(x.reshape(T, R * D)),
        array(fn.float()),
        array(scale.float()),
        array(base.float()),
        np.array((eps, rms_eps), np.float32),
        array(h.view(T, D)),
        np.empty((min(T, CHUNK), pieces, R + 1), np.float32),
        scratch(used, TOKENS, PIECE),
        scratch(used, R + 1 + PIECE),
    )
    return h


mhc_head_backward.impl(requires=floats("x"))(head_backward)
