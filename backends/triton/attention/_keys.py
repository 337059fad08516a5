"""What the attention kernels share: tiles of gathered rows, weighted sums, steps of the softmax."""

from __future__ import annotations

import triton.language as tl
from triton import jit

from .._language import e2m1, e4m3, narrow, scale_of

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
PLAIN = tl.constexpr(448)
"""Elements of a cache row of 584 bytes that are E4M3; 64 of bfloat16 follow, then the scales."""


@jit
def columns(FIRST: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):
    """FIRST .. FIRST + BLOCK - 1, none beyond D: lanes that are masked off form an address too."""
    column = FIRST + tl.arange(0, BLOCK)
    if FIRST + BLOCK > D:
        column = tl.minimum(column, max(D - 1, 0))
    return column


@jit
def gathered(
    base,
    row,
    seen,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """BLOCK columns of the rows that start `row` elements behind `base`, [rows, BLOCK]; 0 in rows
    that are not seen, whatever they hold, and beyond D.

    `row` is safe to read, seen or not. BYTES: 0 for plain elements, else the length of a cache row
    (see pack_cache_rows), whose values are decoded. The tile is of DTYPE in any case.
    """
    column = columns(FIRST, BLOCK, D)
    wanted = seen[:, None] & (FIRST + tl.arange(0, BLOCK) < D)[None, :]
    at = base + row[:, None]
    if BYTES == 0:
        tile = tl.load(at + column[None, :], mask=wanted, other=0.0).to(DTYPE)
    elif BYTES == 584:
        plain = tl.minimum(column, PLAIN - 1)
        value = e4m3(tl.load(at + plain[None, :], mask=wanted, other=0))
        value *= scale_of(tl.load(at + (576 + plain // 64)[None, :], mask=wanted, other=0))
        if FIRST + BLOCK > PLAIN:
            # Byte by byte: a row of 584 bytes stands at any address.
            place = PLAIN + 2 * tl.maximum(column - PLAIN, 0)
            low = tl.load(at + place[None, :], mask=wanted, other=0).to(tl.int32)
            high = tl.load(at + place[None, :] + 1, mask=wanted, other=0).to(tl.int32)
            rotated = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
            value = tl.where((column >= PLAIN)[None, :], rotated, value)
        tile = narrow(tl.where(wanted, value, 0.0), DTYPE)
    else:
        code = tl.load(at + (column // 2)[None, :], mask=wanted, other=0).to(tl.int32)
        value = e2m1(code >> (column % 2 * 4)[None, :])
        value *= e4m3(tl.load(at + (256 + column // 16)[None, :], mask=wanted, other=0))
        tile = narrow(tl.where(wanted, value, 0.0), DTYPE)
    return tile


@jit
def softmax_step(logits, largest, mass):
    """(weights, what earlier sums are multiplied by, the new largest, the new mass) of one tile of
    logits in units of log 2, -inf where a key is not seen."""
    top = tl.maximum(largest, tl.max(logits, 1))
    # While nothing is seen the largest is -inf, and -inf - (-inf) would be NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights, earlier = tl.exp2(logits - shift[:, None]), tl.exp2(largest - shift)
    return weights, earlier, top, mass * earlier + tl.sum(weights, 1)


@jit
def kept_share(norm, sink):
    """exp(norm) / (exp(norm) + exp(sink)): what the sink leaves to the keys; 0 without keys."""
    share = 1.0 / (1.0 + tl.exp(sink - norm))
    return tl.where(norm == float("-inf"), 0.0, share)
