"""moe_experts: sorted by expert; gate and up meet in a tile, where the activation is applied; the
products with down are added for each token in slot order."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.kernels.moe._gated import ACTIVATIONS
from transom.kernels.moe.moe_experts import moe_experts
from transom.op import Weight

from .._arrays import array, floats, given, scratch
from .._compile import kernel, part
from .._numbers import narrow
from .._pool import for_each, threads
from .._product import LANES
from .._quant import stored_contiguously
from ._gated import gate_rows
from ._rows import (
    BLOCK,
    fetch,
    few_rows,
    meet_few,
    meet_panel,
    pack_rows,
    room_for,
    rows_into,
    segments,
    weight_of,
)


@part
def _gated_task(task, thread, parts, few, weight, shape, form, x, bias, order, scales, out, room):
    """A block of gate and up rows with all rows of one segment, into the same block of h."""
    D, width, interleaved = shape
    work, tiles = room[0][thread], room[1][thread]
    gates, ups = tiles[:BLOCK], tiles[BLOCK:]
    blocks = -(-width // BLOCK)
    segment, n = task // blocks, task % blocks * BLOCK
    expert, first, members = parts[segment, 0], parts[segment, 1], parts[segment, 2]
    start, into, count = parts[segment, 3], parts[segment, 4], min(BLOCK, width - n)
    step = 2 if interleaved else 1
    gate, up = n * step, n * step + 1 if interleaved else width + n
    memory, place, across = work.reshape(-1), 0, D
    upper, above, beyond = memory, 0, D
    if members > few:
        memory, place, across = fetch(weight, expert, gate, step, count, work[:BLOCK])
        upper, above, beyond = fetch(weight, expert, up, step, count, work[BLOCK:])
    for low in range(0, members, LANES if members > few else members):
        lanes = min(LANES, members - low) if members > few else members
        if members > few:
            meet_panel((memory, place, across), count, x, start + low * D, D, gates)
            meet_panel((upper, above, beyond), count, x, start + low * D, D, ups)
            lanes = LANES
        else:
            meet_few(weight, expert, gate, step, count, x, start, members, work, gates)
            meet_few(weight, expert, up, step, count, x, start, members, work, ups)
        for i in range(count):
            g, u = gates[i, :lanes], ups[i, :lanes]
            if bias.size > 0:
                a, b = bias[expert, gate + i * step], bias[expert, up + i * step]
                for r in range(lanes):
                    g[r] += a
                    u[r] += b
            gate_rows(g, u, form, g)
            if scales.size > 0:
                for r in range(min(lanes, members - low)):
                    g[r] *= scales[order[first + low + r]]
        if members > few:
            at = into + low * width + n * LANES
            for i in range(count):
                row = out[at + i * LANES : at + (i + 1) * LANES]
                row[:] = gates[i]
        else:
            for r in range(members):
                at = into + r * width + n
                for i in range(count):
                    out[at + i] = gates[i, r]


@kernel
def _gated(parts, few, weight, shape, form, x, bias, order, scales, out, room):
    """The rows h of each segment: in `out` as they were in `x`, side by side or one behind the
    other."""
    tasks = parts.shape[0] * -(-shape[1] // BLOCK)
    args = (parts, few, weight, shape, form, x, bias, order, scales, out, room)
    for_each(_gated_task, tasks, room[0].shape[0], args)


@kernel
def _sorted(ids, E, ends, order):
    """order = the numbers t*K + s of the slots that name an expert, sorted by it; ends of each."""
    for i in range(ids.size):
        if 0 <= ids.flat[i] < E:
            ends[ids.flat[i]] += 1
    for e in range(1, E):
        ends[e] += ends[e - 1]
    for i in range(ids.size - 1, -1, -1):
        if 0 <= ids.flat[i] < E:
            ends[ids.flat[i]] -= 1
            order[ends[ids.flat[i]]] = i
    named = 0
    for i in range(ids.size):
        named += 1 if 0 <= ids.flat[i] < E else 0
    for e in range(E - 1):
        ends[e] = ends[e + 1]
    if E > 0:
        ends[E - 1] = named


@part
def _sum_task(t, thread, ids, E, out, y, room):
    K, D, total = ids.shape[1], y.shape[1], room[thread]
    total[:] = np.float32(0)
    for s in range(K):
        if 0 <= ids[t, s] < E:
            row = out[t * K + s]
            for d in range(D):
                total[d] += row[d]
    into = y[t]
    for d in range(D):
        into[d] = narrow(total[d], into)


@kernel
def _sum(ids, E, out, y, room):
    """y[t] = the rows of a token's slots, added in order."""
    for_each(_sum_task, y.shape[0], room.shape[0], (ids, E, out, y, room))


@moe_experts.impl(requires=(*floats("x", "weights"), stored_contiguously("gate_up", "down")))
def numba(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Weight,
    down: Weight,
    *,
    activation: str = "silu",
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_position: str = "after",
    interleaved: bool = False,
    alpha: float = 1.702,
) -> Tensor:
    """y[t] = sum over slots of weights[t,s] * (down[e] @ h(gate_up[e] @ x[t] + b) + b')."""
    (T, D), K, E, width = x.shape, ids.shape[1], gate_up.shape[0], down.shape[2]
    y = torch.empty((T, D), dtype=x.dtype)
    few, before = few_rows(), weight_position == "before"
    first_weight, second_weight = weight_of(gate_up), weight_of(down)
    biases = (given(b, 2, torch.float32) for b in (gate_up_bias, down_bias))
    first_bias, second_bias = biases
    form = (
        ACTIVATIONS.index(activation),
        np.float32(math.inf if limit is None else limit),
        np.float32(alpha),
    )
    used = threads(3 * T * K * D * width // 16)
    work = scratch(used, 2 * BLOCK, D), scratch(used, 2 * BLOCK, LANES)
    other = scratch(used, BLOCK, width), scratch(used, BLOCK, LANES)
    none, budget = np.empty(0, np.float32), config.workspace_bytes() // 4
    step = max(1, 3 * budget // 4 // max(1, K * D))
    out = np.empty((min(step, T) * K, D), np.float32)
    for start in range(0, T, step):
        some = slice(start, min(start + step, T))
        rows, slots = array(x[some]), array(ids[some].long())
        scales = array(weights[some].float()).reshape(-1)
        ends, order = np.zeros(E, np.int64), np.empty(slots.size, np.int64)
        _sorted(slots, E, ends, order)
        groups = segments(ends.tolist(), slots.size, few, (D, width), budget // 4)
        given_rows, hidden = room_for(groups, few, (D, width))
        for parts in groups:
            pack_rows(parts, few, rows, order, K, given_rows, used)
            _gated(
                parts,
                few,
                first_weight,
                (D, width, interleaved),
                form,
                given_rows,
                first_bias,
                order,
                scales if before else none,
                hidden,
                work,
            )
            rows_into(
                parts,
                few,
                second_weight,
                (D, width, before),
                hidden,
                4,
                order,
                second_bias,
                scales,
                out,
                other,
            )
        _sum(slots, E, out, array(y[some]), scratch(used, D))
    return y
