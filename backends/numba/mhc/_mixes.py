"""What mhc_pre and mhc_head share: products of all streams with fn, and their mean square."""

from __future__ import annotations

import numpy as np

from .._compile import part
from .._numbers import narrow, wide

TOKENS = 4
"""That meet a row of fn at once; a last block short of tokens repeats its last one, so that every
token's sums are added in the same order."""
PIECE = 1024
"""Elements of a token's flat streams that are multiplied at a time, in the first-level cache."""


CHUNK = 64
"""Tokens whose sums over pieces are kept, until their pieces are added."""


@part
def multiply_piece(task, thread, x, fn, sums, room):
    """sums[t, piece, :N] = x[t] @ fn.T and sums[t, piece, N] = x[t] @ x[t], over one piece of the
    streams of some tokens.

    x [T, R*D]; fn [N, R*D]; room [threads, TOKENS, PIECE], workspace.
    """
    T, K = x.shape
    N, pieces, rows = fn.shape[0], sums.shape[1], room[thread]
    block, piece = task // pieces, task % pieces
    first = piece * PIECE
    size = min(PIECE, K - first)
    for t in range(TOKENS):
        given, row = x[min(block * TOKENS + t, T - 1), first : first + size], rows[t]
        for i in range(size):
            row[i] = wide(given[i])
    a, b, c, d = rows[0, :size], rows[1, :size], rows[2, :size], rows[3, :size]
    aa = bb = cc = dd = np.float32(0)
    for i in range(size):
        aa += a[i] * a[i]
        bb += b[i] * b[i]
        cc += c[i] * c[i]
        dd += d[i] * d[i]
    _put(sums, block, piece, N, aa, bb, cc, dd)
    for n in range(0, N, 2):
        u = fn[n, first : first + size]
        v = fn[min(n + 1, N - 1), first : first + size]
        ua = ub = uc = ud = va = vb = vc = vd = np.float32(0)
        for i in range(size):
            ua += u[i] * a[i]
            ub += u[i] * b[i]
            uc += u[i] * c[i]
            ud += u[i] * d[i]
            va += v[i] * a[i]
            vb += v[i] * b[i]
            vc += v[i] * c[i]
            vd += v[i] * d[i]
        _put(sums, block, piece, n, ua, ub, uc, ud)
        if n + 1 < N:
            _put(sums, block, piece, n + 1, va, vb, vc, vd)


@part
def _put(sums, block, piece, n, a, b, c, d):
    t, T = block * TOKENS, sums.shape[0]
    sums[t, piece, n] = a
    if t + 1 < T:
        sums[t + 1, piece, n] = b
    if t + 2 < T:
        sums[t + 2, piece, n] = c
    if t + 3 < T:
        sums[t + 3, piece, n] = d


@part
def mixes(sums, K, rms_eps, out):
    """out[:N] = (x @ fn.T) / sqrt(mean(x**2) + rms_eps) of one token, the pieces added in order."""
    pieces, N = sums.shape[0], sums.shape[1] - 1
    for n in range(N + 1):
        out[n] = np.float32(0)
        for piece in range(pieces):
            out[n] += sums[piece, n]
    r = np.float32(1) / np.sqrt(out[N] / np.float32(max(1, K)) + rms_eps)
    for n in range(N):
        out[n] *= r


@part
def weighted_sum(shares, x, h, total):
    """h[d] = sum_j shares[j] * x[j*D + d] of one token's flat streams; total[PIECE], workspace."""
    D = h.shape[0]
    R = x.shape[0] // max(1, D)
    for first in range(0, D, PIECE):
        size = min(PIECE, D - first)
        out = h[first : first + size]
        if R == 4:
            a, b = x[first : first + size], x[D + first : D + first + size]
            c, d = x[2 * D + first : 2 * D + first + size], x[3 * D + first : 3 * D + first + size]
            p, q, r, s = shares[0], shares[1], shares[2], shares[3]
            for i in range(size):
                mixed = p * wide(a[i]) + q * wide(b[i]) + r * wide(c[i]) + s * wide(d[i])
                out[i] = narrow(mixed, out)
            continue
        for i in range(size):
            total[i] = np.float32(0)
        for j in range(R):
            row, share = x[j * D + first : j * D + first + size], shares[j]
            for i in range(size):
                total[i] += share * wide(row[i])
        for i in range(size):
            out[i] = narrow(total[i], out)
