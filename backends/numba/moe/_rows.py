"""Products of sorted rows with their experts' weights: what grouped_gemm and moe_experts share.

Rows of one expert are a segment. A segment's rows are copied once, as float32: many of them into
panels of LANES rows that stand side by side, [panels, K, LANES], which the weights' rows meet in
`product`; few of them one behind the other, [rows, K], for dot products, where panels would mostly
multiply what is not there. Weights are read as they are stored, a block of rows at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from torch import Tensor

from transom.kernels.moe.grouped_gemm import segments as all_segments
from transom.op import Weight

from .._arrays import flat
from .._compile import STRICT, kernel, part
from .._numbers import wide
from .._pool import for_each
from .._product import LANES, ROWS, product
from .._quant import Codes, decode_row

FEW = 8
"""Rows of a segment up to which dot products are taken."""
MANY = 8 * LANES
"""Rows of a segment at the most; an expert with more has several."""
BLOCK = 4 * ROWS
"""Rows of a weight that are decoded at a time."""
DEPTH = 256
"""Elements of a sum at a time: a panel's part of them stays in the first-level cache. The parts are
added in order, so that a row's bits do not depend on the panel."""


def weight_of(weight: Weight) -> tuple:
    """A stack of matrices as kernels read it: the memory and its strides, or codes."""
    if isinstance(weight, Tensor):
        return (flat(weight), *weight.stride())
    return tuple(Codes.of(weight))


def segments(ends: list[int], rows: int, few: int, sizes: tuple[int, ...], most: int) -> list:
    """Groups of segments whose rows, with the numbers of elements `sizes` each, take at most `most`
    floats (one segment always does): arrays of (expert, first row, rows, and for each size where
    its rows start)."""
    groups, group, used = [], [], [0] * len(sizes)
    for expert, start, stop in all_segments(ends, rows):
        for first in range(start, stop, MANY):
            count = min(MANY, stop - first)
            stored = count if count <= few else -(-count // LANES) * LANES
            if group and sum(used) + stored * sum(sizes) > most:
                groups.append(np.array(group, np.int64))
                group, used = [], [0] * len(sizes)
            group.append((expert, first, count, *used))
            used = [u + stored * size for u, size in zip(used, sizes, strict=True)]
    if group:
        groups.append(np.array(group, np.int64))
    return groups


def room_for(groups: list, few: int, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Memory for the rows of any one of the groups, for each size."""
    most = [0] * len(sizes)
    for group in groups:
        count = int(group[-1, 2])
        stored = count if count <= few else -(-count // LANES) * LANES
        for i, size in enumerate(sizes):
            most[i] = max(most[i], int(group[-1, 3 + i]) + stored * size)
    return [np.empty(n, np.float32) for n in most]


@part
def _pack_task(task, thread, parts, few, x, order, per, out):
    """A panel of a segment's rows, or all its few rows."""
    segment, panel = task // (MANY // LANES), task % (MANY // LANES)
    first, count, start = parts[segment, 1], parts[segment, 2], parts[segment, 3]
    K, low, high = x.shape[1], panel * LANES, min((panel + 1) * LANES, count)
    if count <= few:
        for i in range(count if panel == 0 else 0):
            row, into = x[order[first + i] // per], out[start + i * K : start + (i + 1) * K]
            for k in range(K):
                into[k] = wide(row[k])
        return
    if low >= count:
        return
    base = start + panel * LANES * K
    for begin in range(0, K, 16):  # what is written stays in the first-level cache
        size = min(16, K - begin)
        for lane in range(LANES):
            at = base + begin * LANES + lane
            if low + lane < high:
                row = x[order[first + low + lane] // per, begin : begin + size]
                for k in range(size):
                    out[at + k * LANES] = wide(row[k])
            else:
                for k in range(size):
                    out[at + k * LANES] = np.float32(0)


@kernel
def pack_rows(parts, few, x, order, per, out, threads):
    """Row i of each segment is x[order[i] // per]."""
    for_each(
        _pack_task, parts.shape[0] * (MANY // LANES), threads, (parts, few, x, order, per, out)
    )


def fetch(weight, expert, first, step, count, room):
    """(memory, place, stride) of rows first + i*step of a weight, i < count, as float32: where they
    are stored if they can be read there, else decoded into room [>= count, K]."""


@overload(fetch, jit_options=STRICT)
def _fetch(weight, expert, first, step, count, room):
    if not isinstance(weight, types.BaseTuple):
        return None
    if len(weight) != 4:
        return _fetch_codes
    return _fetch_stored if weight[0].dtype == types.float32 else _fetch_plain


def _fetch_codes(weight, expert, first, step, count, room):
    for i in range(count):
        decode_row(weight, expert, first + i * step, room[i])
    return room.reshape(-1), 0, room.shape[1]


def _fetch_stored(weight, expert, first, step, count, room):
    source, of_expert, of_row, of_element = weight
    if of_element == 1:
        return source, expert * of_expert + first * of_row, step * of_row
    copy_rows(weight, expert, first, step, count, room)
    return room.reshape(-1), 0, room.shape[1]


def _fetch_plain(weight, expert, first, step, count, room):
    copy_rows(weight, expert, first, step, count, room)
    return room.reshape(-1), 0, room.shape[1]


@part
def copy_rows(weight, expert, first, step, count, room):
    """room[i] = row first + i*step of a weight that is no codes."""
    source, of_expert, of_row, of_element = weight
    K = room.shape[1]
    start = expert * of_expert + first * of_row
    if of_element == 1:
        for i in range(count):
            at, into = start + i * step * of_row, room[i]
            row = source[at : at + K]
            for k in range(K):
                into[k] = wide(row[k])
    elif of_row == 1 and step == 1:  # transposed: rows stand side by side
        for k in range(K):
            at = start + k * of_element
            line = source[at : at + count]
            for i in range(count):
                room[i, k] = wide(line[i])
    else:
        for i in range(count):
            for k in range(K):
                room[i, k] = wide(source[start + i * step * of_row + k * of_element])


@part
def meet_panel(rows, count, source, at, K, tile):
    """tile[i, lane] = row i . row `lane` of the panel at source[at]; rows as `fetch` gives them."""
    memory, start, across = rows
    for k in range(0, max(K, 1), DEPTH):
        for i in range(0, count, ROWS):
            product(
                memory,
                start + i * across + k,
                across,
                1,
                source,
                at + k * LANES,
                LANES,
                tile,
                i * LANES,
                LANES,
                min(ROWS, count - i),
                min(DEPTH, K - k),
                k > 0,
            )


@part
def meet_few(weight, expert, first, step, count, source, at, few, room, tile):
    """tile[i, r] = row first + i*step of a weight . row r of the few that stand at source[at], one
    behind the other; four rows of the weight at a time, decoded in the first-level cache."""
    K, last = room.shape[1], few - 1
    for n in range(0, count, 4):
        size = min(4, count - n)
        rows, out = fetch(weight, expert, first + n * step, step, size, room), tile[n : n + size]
        if few == 1:
            _meet_one(rows, size, source[at : at + K], out)
            continue
        memory, start, across = rows
        for r in range(0, few, 4):
            a = source[at + r * K : at + (r + 1) * K]
            b = source[at + min(r + 1, last) * K : at + (min(r + 1, last) + 1) * K]
            c = source[at + min(r + 2, last) * K : at + (min(r + 2, last) + 1) * K]
            d = source[at + min(r + 3, last) * K : at + (min(r + 3, last) + 1) * K]
            for i in range(0, size, 2):
                second = min(i + 1, size - 1)
                u = memory[start + i * across : start + i * across + K]
                v = memory[start + second * across : start + second * across + K]
                ua = ub = uc = ud = va = vb = vc = vd = np.float32(0)
                for k in range(K):
                    ua += u[k] * a[k]
                    ub += u[k] * b[k]
                    uc += u[k] * c[k]
                    ud += u[k] * d[k]
                    va += v[k] * a[k]
                    vb += v[k] * b[k]
                    vc += v[k] * c[k]
                    vd += v[k] * d[k]
                # Behind the last row there is room up to FEW: what lands there is not read.
                out[i, r], out[i, r + 1], out[i, r + 2], out[i, r + 3] = ua, ub, uc, ud
                out[second, r], out[second, r + 1] = va, vb
                out[second, r + 2], out[second, r + 3] = vc, vd


@part
def _meet_one(rows, count, x, tile):
    """tile[i, 0] = row i . x, for up to four rows: four streams keep more loads under way."""
    (memory, start, across), K, last = rows, x.shape[0], count - 1
    second, third = min(1, last), min(2, last)
    a = memory[start : start + K]
    b = memory[start + second * across : start + second * across + K]
    c = memory[start + third * across : start + third * across + K]
    d = memory[start + last * across : start + last * across + K]
    sa = sb = sc = sd = np.float32(0)
    for k in range(K):
        sa += a[k] * x[k]
        sb += b[k] * x[k]
        sc += c[k] * x[k]
        sd += d[k] * x[k]
    tile[0, 0], tile[second, 0], tile[third, 0], tile[last, 0] = sa, sb, sc, sd


@part
def _into_task(
    task, thread, parts, few, weight, shape, source, place, order, bias, scales, out, room
):
    """A block of a weight's rows with all rows of one segment."""
    N, K, before = shape
    blocks, tile = -(-N // BLOCK), room[1][thread]
    segment, n = task // blocks, task % blocks * BLOCK
    expert, first, members = parts[segment, 0], parts[segment, 1], parts[segment, 2]
    start, count = parts[segment, place], min(BLOCK, N - n)
    memory, at, across = room[0][thread].reshape(-1), 0, K
    if members > few:
        memory, at, across = fetch(weight, expert, n, 1, count, room[0][thread])
    for low in range(0, members, LANES if members > few else members):
        high = min(low + LANES, members)
        if members > few:
            rows = (memory, at, across)
            meet_panel(rows, count, source, start + low * K, K, tile)
        else:
            meet_few(weight, expert, n, 1, count, source, start, members, room[0][thread], tile)
        for r in range(high - low):
            which = order[first + low + r]
            into = out[which, n : n + count]
            factor = scales[which] if scales.size > 0 else np.float32(1)
            inner = np.float32(1) if before else factor
            for i in range(count):
                into[i] = tile[i, r] * inner
            if bias.size > 0:
                b = bias[expert, n : n + count]
                for i in range(count):
                    into[i] += b[i] * factor


@kernel
def rows_into(parts, few, weight, shape, source, place, order, bias, scales, out, room):
    """out[order[i]] = scale * (weight @ row i + bias); with `before` the rows have their scale.

    The rows of a segment stand in `source` from parts[segment, place] on. bias [E, N] and scales
    (of the numbers in `order`) may be empty.
    """
    tasks = parts.shape[0] * -(-shape[0] // BLOCK)
    args = (parts, few, weight, shape, source, place, order, bias, scales, out, room)
    for_each(_into_task, tasks, room[0].shape[0], args)


def few_rows() -> int:
    """Up to how many rows of an expert dot products are taken: under deterministic algorithms none,
    since their sums are grouped otherwise and a row's bits must not depend on the other rows."""
    return 0 if torch.are_deterministic_algorithms_enabled() else FEW
