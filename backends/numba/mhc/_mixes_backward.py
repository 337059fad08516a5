"""What the gradients of mhc_pre and mhc_head share: the passes over the streams.

The first takes the products with fn again, and of each stream with dh; the numbers of each token,
some dozens, are then torch's business. The second has pieces of all streams as its tasks: each
carries its columns of dfn through all tokens, so that sums have one order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._arrays import array, scratch
from .._compile import kernel, part
from .._numbers import narrow, wide
from .._pool import for_each, threads
from .._product import LANES, ROWS, product
from ._mixes import CHUNK, PIECE, TOKENS, multiply_piece

SPAN = 8 * LANES
"""Columns of a task in the second pass; its workspace is in the second-level cache."""


@part
def _dots(t, thread, x, dh, sums, out):
    """The pieces' sums of a token added in order; the product of each stream with dh."""
    N, D, row = sums.shape[2], dh.shape[1], out[t]
    for n in range(N):
        total = np.float32(0)
        for piece in range(sums.shape[1]):
            total += sums[t, piece, n]
        row[n] = total
    g = dh[t]
    for j in range(row.shape[0] - N):
        stream, total = x[t, j * D : (j + 1) * D], np.float32(0)
        for d in range(D):
            total += wide(stream[d]) * wide(g[d])
        row[N + j] = total


@kernel
def _products(x, fn, dh, out, sums, rows):
    T, threads = x.shape[0], rows.shape[0]
    for first in range(0, T, CHUNK):
        last = min(first + CHUNK, T)
        some, part_ = x[first:last], sums[: last - first]
        blocks = -(-(last - first) // TOKENS)
        for_each(multiply_piece, blocks * sums.shape[1], threads, (some, fn, part_, rows))
        for_each(_dots, last - first, threads, (some, dh[first:last], part_, out[first:last]))


@part
def _columns(task, thread, x, dh, fn, by, along, pre, dx, dfn, room):
    """Some columns of dx and of dfn: dx = by @ fn - along*x + pre*dh, dfn = by.T @ x."""
    (T, K), N, D, first = x.shape, fn.shape[0], dh.shape[1], task * SPAN
    size, work = min(SPAN, K - first), room[thread]
    weights, sums = work[:N], work[N : 2 * N]
    streams, outs = work[2 * N : 2 * N + CHUNK], work[2 * N + CHUNK :]
    work[: 2 * N + CHUNK, :] = np.float32(0)  # lanes beyond the last column too
    for n in range(N):
        weights[n, :size] = fn[n, first : first + size]
    for start in range(0, T, CHUNK):
        count = min(CHUNK, T - start)
        for t in range(count):
            row, into = x[start + t, first : first + size], streams[t]
            for d in range(size):
                into[d] = wide(row[d])
        for c in range(0, size, LANES):
            for n in range(0, N, ROWS):
                product(
                    by,
                    start * N + n,
                    1,
                    N,
                    streams,
                    c,
                    SPAN,
                    sums,
                    n * SPAN + c,
                    SPAN,
                    min(ROWS, N - n),
                    count,
                    True,
                )
            for t in range(0, count, ROWS):
                product(
                    by,
                    (start + t) * N,
                    N,
                    1,
                    weights,
                    c,
                    SPAN,
                    outs,
                    t * SPAN + c,
                    SPAN,
                    min(ROWS, count - t),
                    N,
                    False,
                )
        for t in range(count):
            mixed, row, less = outs[t], streams[t], along[start + t]
            into, g = dx[start + t, first : first + size], dh[start + t]
            at = 0
            while at < size:  # a span may reach into the next streams
                j, d = (first + at) // D, (first + at) % D
                some = min(size - at, D - d)
                share, some_g = pre[start + t, j], g[d : d + some]
                m, r, o = mixed[at : at + some], row[at : at + some], into[at : at + some]
                for i in range(some):
                    o[i] = narrow(m[i] - less * r[i] + share * wide(some_g[i]), o)
                at += some
    for n in range(N):
        dfn[n, first : first + size] = sums[n, :size]


@kernel
def _second(x, dh, fn, by, along, pre, dx, dfn, room):
    args = (x, dh, fn, by, along, pre, dx, dfn, room)
    for_each(_columns, -(-x.shape[1] // SPAN), room.shape[0], args)


def products(x: Tensor, fn: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(u [T,N], squares [T,1], dots [T,R]) of x [T,R,D]: u = x_flat @ fn.T, the sum of x_flat**2,
    and x[j] . dh."""
    (T, R, D), N = x.shape, fn.shape[0]
    pieces, used = max(1, -(-R * D // PIECE)), threads(T * R * R * D)
    out = torch.empty((T, N + 1 + R))
    _products(
        array(x.view(T, R * D)),
        array(fn),
        array(dh),
        array(out),
        np.empty((min(T, CHUNK), pieces, N + 1), np.float32),
        scratch(used, TOKENS, PIECE),
    )
    return out[:, :N], out[:, N : N + 1], out[:, N + 1 :]


def gradients(
    da: Tensor, x: Tensor, dh: Tensor, fn: Tensor, scale: Tensor, u: Tensor, r: Tensor, pre: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dfn, and dscale and dbase for each row of fn) of da, the gradient of mix*scale + base;
    u, the products, and r [T,1], the norm, make mix = u * r."""
    (T, R, D), N = x.shape, fn.shape[0]
    dmix = da * scale
    along = (dmix * u).sum(1) * r[:, 0].pow(3) / max(1, R * D)
    dx, dfn = torch.empty((T, R, D), dtype=x.dtype), torch.zeros((N, R * D))
    if x.numel():
        used = threads(T * R * R * D)
        _second(
            array(x.view(T, R * D)),
            array(dh),
            array(fn),
            array(dmix * r),
            array(along),
            array(pre),
            array(dx.view(T, R * D)),
            array(dfn),
            scratch(used, 2 * N + 2 * CHUNK, SPAN),
        )
    return dx, dfn, (da * u * r).sum(0), da.sum(0)
