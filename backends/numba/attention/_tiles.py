"""Attention over keys that were copied into a tile, all heads at once.

Keys are the rows and heads the lanes of the products with queries, so logits stand by key and then
by head: softmax runs over heads in vectors, and weights are read in place by the products with
values. A thread's workspace is in its second-level cache.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from torch import Tensor

from .._compile import STRICT, part
from .._numbers import exp, wide
from .._product import LANES, ROWS, product
from .._quant import decode_cache_row

KEYS = 64
"""Of a tile."""
STRIP = 16
"""Elements of a row that are transposed at a time."""
LOWEST = np.float32(-math.inf)


def padded(size: int) -> int:
    """`size` up to a multiple of LANES."""
    return -(-size // LANES) * LANES


def whole(indices: Tensor | None) -> Tensor | None:
    """Indices as int32; what does not fit stands for none, as anything beyond the last key."""
    if indices is None or indices.dtype == torch.int32:
        return indices
    return indices.clamp(-1, 2**31 - 1).int()


@part
def copy_row(source, place, out):
    """out = a row of a flat array, as float32."""
    row = source[place : place + out.shape[0]]
    for d in range(out.shape[0]):
        out[d] = wide(row[d])


def read_key(kv, place, out):
    """out = a key, as float32, from kv: (memory, its strides of batch and row, its bytes where it
    is packed)."""


@overload(read_key, jit_options=STRICT)
def _read_key(kv, place, out):
    return _unpack if kv[0].dtype == types.uint8 else _copy


def _copy(kv, place, out):
    copy_row(kv[0], place, out)


def _unpack(kv, place, out):
    decode_cache_row(kv[0][place : place + kv[3]], out)


@part
def pack(q, scale, query, head, group, first, count, queries):
    """queries[panel, d, lane] = scale * row first + panel*LANES + lane; 0 from row `count` on.

    Row r is head head + r % group of query query + r // group in q [Q, H, D]; queries [panels, D,
    LANES].
    """
    panels, D = queries.shape[:2]
    for p in range(panels):
        panel = queries[p]
        for start in range(0, D, STRIP):  # what is written stays in the first-level cache
            size = min(STRIP, D - start)
            for lane in range(LANES):
                r = first + p * LANES + lane
                if r < count:
                    row = q[query + r // group, head + r % group, start : start + size]
                    for d in range(size):
                        panel[start + d, lane] = scale * wide(row[d])
                else:
                    for d in range(size):
                        panel[start + d, lane] = np.float32(0)


@part
def clear(largest, mass, o):
    """No key yet."""
    largest[:] = LOWEST
    mass[:] = np.float32(0)
    for h in range(o.shape[0]):
        row = o[h]
        row[:] = np.float32(0)


@part
def attend(queries, keys, values, count, logits, largest, mass, o):
    """Take the first `count` keys of a tile into o [heads, width], relative to `largest` [heads],
    and into `mass` [heads].

    keys [KEYS, >= D], values [KEYS, >= width], logits [KEYS + 1, heads]: a tile and its workspace;
    heads and width are multiples of LANES.
    """
    meet(queries, keys, count, logits)
    softmax(logits, count, largest, mass, o)
    mix(logits, values, count, o)


@part
def meet(queries, keys, count, logits):
    """logits[j, h] = keys[j] . query h."""
    panels, D = queries.shape[:2]
    heads, across = logits.shape[1], keys.shape[1]
    for p in range(panels):
        for j in range(0, count, ROWS):
            product(
                keys,
                j * across,
                across,
                1,
                queries,
                p * D * LANES,
                LANES,
                logits,
                j * heads + p * LANES,
                heads,
                min(ROWS, count - j),
                D,
                False,
            )


@part
def mix(weights, values, count, o):
    """o[h] += sum_j weights[j, h] * values[j]."""
    heads, across, width = weights.shape[1], values.shape[1], o.shape[1]
    for h in range(0, heads, ROWS):
        for d in range(0, width, LANES):
            product(
                weights,
                h,
                1,
                heads,
                values,
                d,
                across,
                o,
                h * width + d,
                width,
                min(ROWS, heads - h),
                count,
                True,
            )


@part
def softmax(logits, count, largest, mass, o):
    """logits replaced by exp(logits - largest), after what was summed is brought to the new
    largest."""
    heads, width = logits.shape[1], o.shape[1]
    for p in range(0, heads, LANES):
        tops, masses = largest[p : p + LANES], mass[p : p + LANES]
        before = logits[KEYS, p : p + LANES]
        for i in range(LANES):
            before[i] = tops[i]
        for j in range(count):
            row = logits[j, p : p + LANES]
            for i in range(LANES):
                tops[i] = row[i] if row[i] > tops[i] else tops[i]
        for i in range(LANES):
            if tops[i] != before[i] and masses[i] != 0:
                factor, sums = exp(before[i] - tops[i]), o[p + i]
                masses[i] *= factor
                for d in range(width):
                    sums[d] *= factor
        for i in range(LANES):  # while all is -inf: -inf - (-inf) would be NaN
            before[i] = np.float32(0) if tops[i] == LOWEST else tops[i]
        for j in range(count):
            row = logits[j, p : p + LANES]
            for i in range(LANES):
                row[i] = exp(row[i] - before[i])
                masses[i] += row[i]


@part
def merge(parts, largest, mass, h, o):
    """Head h of all parts of the keys, in order, into o; returns its largest logit and its mass."""
    top, total = LOWEST, np.float32(0)
    for i in range(parts.shape[0]):
        top = largest[i, h] if largest[i, h] > top else top
    for i in range(parts.shape[0]):
        factor, row = np.float32(1), parts[i, h]
        if mass[i, h] == 0:
            factor = np.float32(0)
        elif largest[i, h] != top:
            factor = exp(largest[i, h] - top)
        for d in range(o.shape[0]):
            # Selected: what a part without mass holds must not matter.
            held = np.float32(0) if i == 0 and factor == 0 else row[d]
            o[d] = factor * held + (np.float32(0) if i == 0 else o[d])
        total += factor * mass[i, h]
    return top, total


@part
def finish(top, total, sink, o):
    """Divide o by the mass of keys and sink, in place; returns the lse, which leaves the sink
    out."""
    if total == 0:
        o[:] = np.float32(0)
        return LOWEST
    lse = top + np.float32(math.log(total))
    # The keys' share of the softmax: e^lse / (e^lse + e^sink).
    share = np.float32(1) / (np.float32(1) + exp(sink - lse)) / total
    for d in range(o.shape[0]):
        o[d] *= share
    return lse
