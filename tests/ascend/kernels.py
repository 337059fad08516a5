"""Small kernels, right and wrong in one way each."""

from __future__ import annotations

import triton.language as tl
from triton import jit


@jit
def double(x, y, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(y + at, (v.to(tl.float32) * 2).to(y.dtype.element_ty), mask=at < n)


@jit
def gather(table, ids, y, n, D: tl.constexpr, R: tl.constexpr):
    # A row of -1 is masked, and its address formed all the same: Ascend's lowering reads it.
    r, d = tl.arange(0, R), tl.arange(0, D)
    i = tl.load(ids + r, mask=r < n, other=0)
    v = tl.load(table + i[:, None] * D + d[None, :], mask=(i >= 0)[:, None], other=0.0)
    tl.store(y + r[:, None] * D + d[None, :], v, mask=(r < n)[:, None])


@jit
def clamped_gather(table, ids, y, n, D: tl.constexpr, R: tl.constexpr):
    r, d = tl.arange(0, R), tl.arange(0, D)
    i = tl.load(ids + r, mask=r < n, other=0)
    v = tl.load(table + tl.maximum(i, 0)[:, None] * D + d[None, :])
    v = tl.where((i >= 0)[:, None], v, 0.0)
    tl.store(y + r[:, None] * D + d[None, :], v, mask=(r < n)[:, None])


@jit
def last_writes(y, B: tl.constexpr):
    tl.store(y + tl.arange(0, B), tl.zeros((B,), tl.float32) + tl.program_id(0))


@jit
def one_too_many(y, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at + 1, tl.zeros((B,), tl.float32))


@jit
def high_product(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.umulhi(tl.load(x + at), tl.load(x + at)))


@jit
def product(a, b, y, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    left = tl.load(a + m[:, None] * BK + k[None, :])
    right = tl.load(b + k[:, None] * BN + n[None, :])
    tl.store(y + m[:, None] * BN + n[None, :], tl.dot(left, right))
