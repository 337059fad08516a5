"""moe_experts and its gradients: slots sorted by expert, products that gather their rows, and sums
over a token's slots in their order.

What stands between two products is float32, and stays that precise: where the next product is one
of bfloat16, as two bfloat16 that add up to it, which that product multiplies one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from transom.dtypes import QUANTIZED
from transom.kernels.moe.moe_experts import (
    moe_experts,
    moe_experts_backward,
    moe_experts_backward_experts,
)
from transom.op import Weight
from transom.requires import Requirement, dtype

from .._language import column, gate_slope, gate_value, narrow
from .._launch import STREAMING, even, gathers_whole_rows, launch, programs, ragged, tile_for
from .._offer import floats, offer, usable
from ._gemm import Rows, case, find_tile, outer_sums, power_of_two, rows_of, rows_times
from ._sort import Sorted, sort
from ._weights import add_product, read


@jit
def _gate_and_up(gate, up, bias, e, g_at, u_at, inside_i, I2, LIMITED: tl.constexpr, limit):
    """Gate and up with their bias, each clamped, and as they were before."""
    if bias is not None:
        gate += tl.load(bias + e * I2 + g_at, mask=inside_i, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + e * I2 + u_at, mask=inside_i, other=0.0).to(tl.float32)[None, :]
    g, u = gate, up
    if LIMITED:  # NaN stays NaN
        g = tl.where(gate > limit, limit, gate)
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return g, u, gate, up


@jit
def _halves(i, I, INTERLEAVED: tl.constexpr, CLAMPED: tl.constexpr):
    """Where gate i and up i stand in both. CLAMPED: none behind the last, masked or not: of every
    other element Ascend's lowering reads one more than there are."""
    if CLAMPED:
        i = tl.minimum(i, I - 1)
    if INTERLEAVED:
        return 2 * i, 2 * i + 1
    return i, I + i


@jit
def _put(p, low, at, value, mask, SPLIT: tl.constexpr):
    """Store float32, or the two parts of it."""
    high = narrow(value, p.dtype.element_ty)
    tl.store(p + at, high, mask=mask)
    if SPLIT:
        tl.store(p + low + at, narrow(value - high.to(tl.float32), p.dtype.element_ty), mask=mask)


@jit
def _hidden(
    x,
    order,
    h,
    low,
    bias,
    scale,
    offsets,
    table,
    M,
    I,
    D,
    E,
    x_row,
    x_k,
    alpha,
    limit,
    weight,
    scales,
    zeros,
    w_e,
    w_o,
    w_d,
    s_e,
    s_o,
    s_d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALING: tl.constexpr,
    COMPUTE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    SLOTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    RAGGED: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    # h[r] = f(gate) * up of slot order[r], a tile [BM, BN] of both a step: x is gathered as it is
    # loaded, and gate and up never leave the registers.
    blocks = tl.cdiv(I, BN)
    total = tl.load(table + E) * blocks
    for at in range(tl.program_id(0), total, tl.num_programs(0)):
        group, first, end = find_tile(offsets, table, at // blocks, M, E, BM, GROUPS)
        r, i = first + tl.arange(0, BM), at % blocks * BN + tl.arange(0, BN)
        inside_r, inside_i = r < tl.where(group < E, end, 0), i < I
        e = tl.minimum(group, E - 1).to(tl.int64)
        slot = tl.load(order + tl.minimum(r, M - 1))
        slot = tl.minimum(tl.maximum(slot, 0), M - 1)
        row = (slot // SLOTS).to(tl.int64) * x_row
        g_at, u_at = _halves(i, I, INTERLEAVED, CLAMPED)
        gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, tl.where(group < E, D, 0), BK):
            gate = add_product(
                gate,
                x,
                0,
                row,
                inside_r,
                x_k,
                weight,
                scales,
                zeros,
                e,
                g_at,
                inside_i,
                k0,
                D,
                2 * I - 1,
                w_e,
                w_o,
                w_d,
                s_e,
                s_o,
                s_d,
                BK,
                FORMAT,
                BLOCK_O,
                BLOCK_D,
                SCALING,
                COMPUTE,
                PACKED,
                PRECISION,
                False,
                EVEN,
                RAGGED,
            )
            up = add_product(
                up,
                x,
                0,
                row,
                inside_r,
                x_k,
                weight,
                scales,
                zeros,
                e,
                u_at,
                inside_i,
                k0,
                D,
                2 * I - 1,
                w_e,
                w_o,
                w_d,
                s_e,
                s_o,
                s_d,
                BK,
                FORMAT,
                BLOCK_O,
                BLOCK_D,
                SCALING,
                COMPUTE,
                PACKED,
                PRECISION,
                False,
                EVEN,
                RAGGED,
            )
        g, u, gate, up = _gate_and_up(
            gate, up, bias, e, g_at, u_at, inside_i, 2 * I, LIMITED, limit
        )
        if ACTIVATION == "swiglu_oai":
            u += 1.0
        out = gate_value(g, alpha, ACTIVATION) * u
        if scale is not None:
            out *= tl.load(scale + slot).to(tl.float32)[:, None]
        to = r.to(tl.int64)[:, None] * I + i[None, :]
        _put(h, low, to, out, inside_r[:, None] & inside_i[None, :], SPLIT)


@jit
def _slopes(
    x,
    dy,
    order,
    dboth,
    b_low,
    h,
    h_low,
    dots,
    bias,
    scale,
    offsets,
    table,
    M,
    I,
    D,
    E,
    x_row,
    x_k,
    dy_row,
    dy_k,
    alpha,
    limit,
    weight,
    scales,
    zeros,
    w_e,
    w_o,
    w_d,
    s_e,
    s_o,
    s_d,
    down,
    dscales,
    dzeros,
    v_e,
    v_o,
    v_d,
    t_e,
    t_o,
    t_d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALING: tl.constexpr,
    COMPUTE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    FORMAT_2: tl.constexpr,
    BLOCK_O_2: tl.constexpr,
    BLOCK_D_2: tl.constexpr,
    SCALING_2: tl.constexpr,
    COMPUTE_2: tl.constexpr,
    PACKED_2: tl.constexpr,
    PRECISION_2: tl.constexpr,
    B_SPLIT: tl.constexpr,
    H_SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    SLOTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMITED: tl.constexpr,
    RAGGED: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    # Gate and up again, and dh = dy @ down[e], in one pass over D; then the gradient of gate and
    # up, w * h if it is asked for, and this block's part of the sum of dh * h.
    blocks = tl.cdiv(I, BN)
    total = tl.load(table + E) * blocks
    for at in range(tl.program_id(0), total, tl.num_programs(0)):
        group, first, end = find_tile(offsets, table, at // blocks, M, E, BM, GROUPS)
        r, i = first + tl.arange(0, BM), at % blocks * BN + tl.arange(0, BN)
        inside_r, inside_i = r < tl.where(group < E, end, 0), i < I
        e = tl.minimum(group, E - 1).to(tl.int64)
        slot = tl.load(order + tl.minimum(r, M - 1))
        slot = tl.minimum(tl.maximum(slot, 0), M - 1)
        token = (slot // SLOTS).to(tl.int64)
        g_at, u_at = _halves(i, I, INTERLEAVED, CLAMPED)
        gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        dh = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, tl.where(group < E, D, 0), BK):
            gate = add_product(
                gate,
                x,
                0,
                token * x_row,
                inside_r,
                x_k,
                weight,
                scales,
                zeros,
                e,
                g_at,
                inside_i,
                k0,
                D,
                2 * I - 1,
                w_e,
                w_o,
                w_d,
                s_e,
                s_o,
                s_d,
                BK,
                FORMAT,
                BLOCK_O,
                BLOCK_D,
                SCALING,
                COMPUTE,
                PACKED,
                PRECISION,
                False,
                EVEN,
                RAGGED,
            )
            up = add_product(
                up,
                x,
                0,
                token * x_row,
                inside_r,
                x_k,
                weight,
                scales,
                zeros,
                e,
                u_at,
                inside_i,
                k0,
                D,
                2 * I - 1,
                w_e,
                w_o,
                w_d,
                s_e,
                s_o,
                s_d,
                BK,
                FORMAT,
                BLOCK_O,
                BLOCK_D,
                SCALING,
                COMPUTE,
                PACKED,
                PRECISION,
                False,
                EVEN,
                RAGGED,
            )
            dh = add_product(
                dh,
                dy,
                0,
                token * dy_row,
                inside_r,
                dy_k,
                down,
                dscales,
                dzeros,
                e,
                i,
                inside_i,
                k0,
                D,
                I - 1,
                v_e,
                v_o,
                v_d,
                t_e,
                t_o,
                t_d,
                BK,
                FORMAT_2,
                BLOCK_O_2,
                BLOCK_D_2,
                SCALING_2,
                COMPUTE_2,
                PACKED_2,
                PRECISION_2,
                False,
                EVEN,
                RAGGED,
            )
        g, u, gate, up = _gate_and_up(
            gate, up, bias, e, g_at, u_at, inside_i, 2 * I, LIMITED, limit
        )
        if ACTIVATION == "swiglu_oai":
            u += 1.0
        value = gate_value(g, alpha, ACTIVATION)
        inside = inside_r[:, None] & inside_i[None, :]
        part = tl.sum(tl.where(inside, dh * value * u, 0.0), 1)
        tl.store(dots + (at % blocks) * M + slot, part, mask=inside_r)
        w = tl.load(scale + slot, mask=inside_r, other=0.0).to(tl.float32)[:, None]
        row = r.to(tl.int64)[:, None]
        if h is not None:
            _put(h, h_low, row * I + i[None, :], w * (value * u), inside, H_SPLIT)
        dg, du = dh * w * u * gate_slope(g, alpha, ACTIVATION), dh * w * value
        if LIMITED:  # nothing passes beyond a clamp; at the limit itself all of it
            dg = tl.where(gate > limit, 0.0, dg)
            du = tl.where(tl.abs(up) > limit, 0.0, du)
        _put(dboth, b_low, row * (2 * I) + g_at[None, :], dg, inside, B_SPLIT)
        _put(dboth, b_low, row * (2 * I) + u_at[None, :], du, inside, B_SPLIT)


@jit
def _combine(rows, y, T, D, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    # y[t] = the sum of a token's rows, one slot after the other.
    blocks = tl.cdiv(D, BLOCK)
    for at in range(tl.program_id(0), T * blocks, tl.num_programs(0)):
        t, d = (at // blocks).to(tl.int64), at % blocks * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for slot in range(0, SLOTS):
            total += tl.load(rows + (t * SLOTS + slot) * D + d, mask=d < D, other=0.0)
        tl.store(y + t * D + d, narrow(total, y.dtype.element_ty), mask=d < D)


@jit
def _slot_gradients(
    dots,
    ids,
    dy,
    bias,
    dweights,
    slots,
    blocks,
    D,
    E,
    dy_row,
    dy_k,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The parts of dh . h in order, and dy . down_bias of the slot's expert; zero for an empty slot.
    for slot in range(tl.program_id(0), slots, tl.num_programs(0)):
        e = tl.load(ids + slot).to(tl.int64)
        used = (e >= 0) & (e < E)
        total = 0.0
        for block in range(0, tl.where(used, blocks, 0)):
            total += tl.load(dots + block * slots + slot)
        if bias is not None:
            e = tl.minimum(tl.maximum(e, 0), E - 1)
            row = tl.cast(slot // SLOTS, tl.int64) * dy_row
            sums = tl.zeros((BLOCK,), tl.float32)
            for d0 in range(0, tl.where(used, D, 0), BLOCK):
                d = d0 + tl.arange(0, BLOCK)
                g = tl.load(dy + row + d * dy_k, mask=d < D, other=0.0).to(tl.float32)
                sums += g * tl.load(bias + e * D + d, mask=d < D, other=0.0).to(tl.float32)
            total += tl.sum(sums, 0)
        tl.store(dweights + slot, narrow(total, dweights.dtype.element_ty))


@jit
def _column_sums(
    x,
    low,
    order,
    scale,
    out,
    offsets,
    M,
    N,
    E,
    x_row,
    x_k,
    SLOTS: tl.constexpr,
    SPLIT: tl.constexpr,
    RAGGED: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    # out[e] = the sum of e's rows, in order; with SLOTS of scale[slot] * x[slot // SLOTS].
    blocks = tl.cdiv(N, BN)
    for at in range(tl.program_id(0), E * blocks, tl.num_programs(0)):
        e, n = at // blocks, at % blocks * BN + tl.arange(0, BN)
        start, end = rows_of(offsets, e, M, E)
        total = tl.zeros((BN,), tl.float32)
        for r0 in range(start, end, BR):
            r = r0 + tl.arange(0, BR)
            inside, row = r < end, r
            if SLOTS > 0:
                slot = tl.load(order + tl.minimum(r, M - 1))
                slot = tl.minimum(tl.maximum(slot, 0), M - 1)
                row = slot // SLOTS
            here = x + row.to(tl.int64)[:, None] * x_row + column(n, N, RAGGED)[None, :] * x_k
            mask = inside[:, None] & (n < N)[None, :]
            v = tl.load(here, mask=mask, other=0.0).to(tl.float32)
            if SPLIT:
                v += tl.load(here + low, mask=mask, other=0.0).to(tl.float32)
            if SLOTS > 0:
                v *= tl.load(scale + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
            total += tl.sum(v, 0)
        tl.store(out + e.to(tl.int64) * N + n, total, mask=n < N)


def _weights(*names: str) -> tuple[Requirement, ...]:
    return tuple(dtype(name, *usable(), *QUANTIZED) for name in names)


@offer(
    moe_experts, *floats("x", "weights", "gate_up_bias", "down_bias"), *_weights("gate_up", "down")
)
def forward(
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
    """y[t] = sum over slots s of weights[t,s] * (down[e] @ h(gate_up[e] @ x[t] + b) + b')."""
    (T, D), K, (E, width) = x.shape, ids.shape[1], (gate_up.shape[0], gate_up.shape[1] // 2)
    if 0 in (T, D, K, E):
        return x.new_zeros(T, D)
    before, weights = weight_position == "before", weights.contiguous()
    rows = sort(ids, E)
    tile = tile_for(entry := f"moe_experts.{case(T * K, E, x, gate_up)}", x)
    tile = even(tile, "BK", D, x)
    how = read(gate_up, x, tile["BK"])
    h = _between(x, T * K, width, read(down, x, tile["BK"]).narrow)
    if width:
        launch(
            _hidden,
            rows.groups.grid(tile, -(-width // tile["BN"])),
            x,
            rows.order,
            h.x,
            h.low,
            _contiguous(gate_up_bias),
            weights if before else None,
            rows.groups.offsets,
            rows.groups.table(tile),
            T * K,
            width,
            D,
            E,
            *x.stride(),
            alpha,
            limit or 0.0,
            *how.arguments,
            tile=tile,
            entry=entry,
            EVEN=D % tile["BK"] == 0,
            SPLIT=h.split,
            RAGGED=how.ragged(x, D, tile["BK"], True),
            **_form(x, K, E, activation, limit, interleaved),
            **how.constants(),
        )
    products = rows_times(
        h,
        down,
        rows.groups,
        torch.float32,
        order=rows.order,
        bias=_contiguous(down_bias),
        scale=weights if not before or down_bias is not None else None,
        scaled=before,
    )
    return _over_slots(products, T, K, x.dtype)


@offer(
    moe_experts_backward,
    *floats("dy", "weights", "gate_up_bias", "down_bias"),
    *_weights("gate_up", "down"),
)
def backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Weight,
    down: Weight,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
    weight_position: str = "after",
    interleaved: bool = False,
    alpha: float = 1.702,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in x, in the routing weights and in the two biases."""
    (T, D), K, E = x.shape, ids.shape[1], gate_up.shape[0]
    new = torch.zeros if 0 in (T, D, K, E) else torch.empty
    dweights = new(T, K, dtype=weights.dtype, device=dy.device)
    dgate_up_bias = new(gate_up.shape[:2], dtype=torch.float32, device=dy.device)
    ddown_bias = new(down.shape[:2], dtype=torch.float32, device=dy.device)
    if new is torch.zeros:
        return dy.new_zeros(T, D), dweights, dgate_up_bias, ddown_bias
    weights, ids = weights.contiguous(), ids.contiguous()
    rows = sort(ids, E)
    dboth, _, dots = _gradients(
        dy,
        x,
        rows,
        weights,
        gate_up,
        down,
        _contiguous(gate_up_bias),
        activation,
        limit,
        interleaved,
        alpha,
        K,
        keep=False,
    )
    products = rows_times(
        dboth, gate_up, rows.groups, torch.float32, transposed=True, order=rows.order
    )
    launch(
        _slot_gradients,
        programs(dy, T * K, STREAMING),
        dots,
        ids,
        dy,
        _contiguous(down_bias),
        dweights,
        T * K,
        dots.shape[0],
        D,
        E,
        *dy.stride(),
        SLOTS=K,
        BLOCK=512,
    )
    for out, source in ((dgate_up_bias, dboth), (ddown_bias, Rows(dy, slots=K))):
        launch(
            _column_sums,
            programs(dy, E * -(-out.shape[1] // 128), STREAMING),
            source.x,
            source.low,
            rows.order,
            weights,
            out,
            rows.groups.offsets,
            T * K,
            out.shape[1],
            E,
            *source.stride,
            SLOTS=source.slots,
            SPLIT=source.split,
            BR=32,
            BN=128,
            RAGGED=source.slots > 0 and ragged(dy, out.shape[1], 128),
        )
    return _over_slots(products, T, K, dy.dtype), dweights, dgate_up_bias, ddown_bias


@offer(moe_experts_backward_experts, *floats("dy", "weights", "gate_up", "down", "gate_up_bias"))
def weight_backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
    weight_position: str = "after",
    interleaved: bool = False,
    alpha: float = 1.702,
) -> tuple[Tensor, Tensor]:
    """Gradients in gate_up and down: sums of outer products over the rows of each expert."""
    (T, D), K, E = x.shape, ids.shape[1], gate_up.shape[0]
    if 0 in (T, D, K, E):
        zeros = (torch.zeros(w.shape, dtype=w.dtype, device=dy.device) for w in (gate_up, down))
        return next(zeros), next(zeros)
    rows = sort(ids, E)
    dboth, h, _ = _gradients(
        dy,
        x,
        rows,
        weights.contiguous(),
        gate_up,
        down,
        _contiguous(gate_up_bias),
        activation,
        limit,
        interleaved,
        alpha,
        K,
        keep=True,
    )
    dgate_up = outer_sums(dboth, Rows(x, slots=K), rows.groups, gate_up.dtype, rows.order)
    ddown = outer_sums(Rows(dy, slots=K), h, rows.groups, down.dtype, rows.order)
    return dgate_up, ddown


def _gradients(
    dy: Tensor,
    x: Tensor,
    rows: Sorted,
    weights: Tensor,
    gate_up: Weight,
    down: Weight,
    bias: Tensor | None,
    activation: str,
    limit: float | None,
    interleaved: bool,
    alpha: float,
    K: int,
    keep: bool,
) -> tuple[Rows, Rows, Tensor]:
    """The gradient of gate and up, weights * h (if `keep`), and parts of dh . h [blocks, slots]."""
    (T, D), (E, width) = x.shape, (gate_up.shape[0], gate_up.shape[1] // 2)
    tile = tile_for(entry := f"moe_experts.backward_{case(T * K, E, x, gate_up, down)}", x)
    tile = even(tile, "BK", D, x)
    how, other = read(gate_up, x, tile["BK"]), read(down, dy, tile["BK"], transposed=True)
    # With `keep` they meet x and dy in outer products, else gate_up.
    narrow = keep or read(gate_up, x, tile["BK"], transposed=True).narrow
    dboth = _between(x, T * K, 2 * width, narrow)
    h = _between(x, T * K, width, True) if keep else Rows(dboth.x)
    blocks = -(-width // tile["BN"])
    dots = torch.empty(blocks, T * K, dtype=torch.float32, device=x.device)
    if width:
        launch(
            _slopes,
            rows.groups.grid(tile, blocks),
            x,
            dy,
            rows.order,
            dboth.x,
            dboth.low,
            h.x if keep else None,
            h.low,
            dots,
            bias,
            weights,
            rows.groups.offsets,
            rows.groups.table(tile),
            T * K,
            width,
            D,
            E,
            *x.stride(),
            *dy.stride(),
            alpha,
            limit or 0.0,
            *how.arguments,
            *other.arguments,
            tile=tile,
            entry=entry,
            EVEN=D % tile["BK"] == 0,
            B_SPLIT=dboth.split,
            H_SPLIT=h.split,
            RAGGED=how.ragged(x, D, tile["BK"], True),
            **_form(x, K, E, activation, limit, interleaved),
            **how.constants(),
            **other.constants("_2"),
        )
    return dboth, h, dots


def _form(
    x: Tensor, K: int, E: int, activation: str, limit: float | None, interleaved: bool
) -> dict[str, Any]:
    return {
        "GROUPS": power_of_two(E + 1),
        "SLOTS": K,
        "INTERLEAVED": interleaved,
        "ACTIVATION": activation,
        "LIMITED": limit is not None,
        "CLAMPED": interleaved and gathers_whole_rows(x),
    }


def _between(x: Tensor, rows: int, columns: int, narrow: bool) -> Rows:
    """Memory for float32 rows; `narrow`: for a product of x's dtype with what has it too."""
    if narrow and x.dtype == torch.bfloat16:
        return Rows(torch.empty(2, rows, columns, dtype=torch.bfloat16, device=x.device), True)
    return Rows(torch.empty(rows, columns, dtype=torch.float32, device=x.device))


def _over_slots(rows: Tensor, T: int, K: int, dtype: torch.dtype) -> Tensor:
    D = rows.shape[1]
    y = torch.empty(T, D, dtype=dtype, device=rows.device)
    grid = programs(rows, T * -(-D // 512), STREAMING)
    launch(_combine, grid, rows, y, T, D, SLOTS=K, BLOCK=512)
    return y


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
