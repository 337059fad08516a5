"""compress_kv: the slots of an entry are a tile, whose channels are independent."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.attention.compress_kv import compress_kv, compress_kv_backward
from transom.requires import at_most

from .._language import narrow
from .._launch import launch, programs, tile_for
from .._offer import floats, offer

LONGEST = 1024
"""Tokens of a block, whose slots fit the registers."""


@jit
def _rows(
    kv, gate, bias, state_kv, state_gate, batch, row, channel, inside, S, W, R, m, head, pending
):
    """(value, biased gate) of rows [block before][pending][new tokens]; gates that are not there
    are -inf, their values 0."""
    new = inside & (row >= head)
    s = tl.maximum(row - head, 0)
    at = (batch * S + tl.minimum(s, S - 1)) * W + channel
    value = tl.load(kv + at, mask=new, other=0.0).to(tl.float32)
    weight = tl.load(gate + at, mask=new, other=0.0).to(tl.float32)
    at = (s + pending) % m * W + channel
    weight += tl.load(bias + at, mask=new, other=0.0).to(tl.float32)
    weight = tl.where(new, weight, float("-inf"))
    if state_kv is not None:
        old = inside & (row < head)
        at = (batch * R + tl.minimum(row, R - 1)) * W + channel
        value += tl.load(state_kv + at, mask=old, other=0.0)
        kept = tl.load(state_gate + at, mask=old, other=0.0)
        weight = tl.where(old, kept, weight)
    return value, weight


@jit
def _slots(number, blocks, D, m, OVERLAP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """(batch, entry, c, row, channel, inside) of a tile of slots: with overlap the first m are the
    block before with the first half of the channels, then comes the block with the second."""
    wide = tl.cdiv(D, BC)
    c = number % wide * BC + tl.arange(0, BC)
    entry, batch = number // wide % blocks, tl.cast(number // wide // blocks, tl.int64)
    p = tl.arange(0, BP)[:, None]
    row = entry * m + p + 0 * c[None, :]
    channel = c[None, :] + 0 * p
    count = m
    if OVERLAP:
        count = 2 * m
        channel = tl.where(p >= m, D + channel, channel)
    return batch, entry, c, row, channel, (p < count) & (c < D)[None, :]


@jit
def _pooled(value, weight):
    """(weights, values, entry) of a tile; slots with gate -inf are left out, whatever they hold."""
    peak = tl.max(weight, 0)
    share = tl.exp(weight - tl.where(peak == float("-inf"), 0.0, peak)[None, :])
    total = tl.sum(share, 0)
    share /= tl.where(total == 0, 1.0, total)[None, :]
    value = tl.where(weight == float("-inf"), 0.0, value)
    return share, value, tl.sum(share * value, 0)


@jit
def _forward(
    kv,
    gate,
    bias,
    state_kv,
    state_gate,
    entries,
    B,
    S,
    W,
    R,
    m,
    head,
    pending,
    blocks,
    D,
    OVERLAP: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    # An entry's slots and BC channels at a time. Bound by memory.
    for number in range(tl.program_id(0), B * blocks * tl.cdiv(D, BC), tl.num_programs(0)):
        batch, entry, c, row, channel, inside = _slots(number, blocks, D, m, OVERLAP, BP, BC)
        value, weight = _rows(
            kv,
            gate,
            bias,
            state_kv,
            state_gate,
            batch,
            row,
            channel,
            inside,
            S,
            W,
            R,
            m,
            head,
            pending,
        )
        _, _, out = _pooled(value, tl.where(inside, weight, float("-inf")))
        at = entries + (batch * blocks + entry) * D + c
        tl.store(at, narrow(out, entries.dtype.element_ty), mask=c < D)


@jit
def _carry(
    kv,
    gate,
    bias,
    state_kv,
    state_gate,
    next_kv,
    next_gate,
    B,
    S,
    W,
    R,
    m,
    head,
    pending,
    first,
    count,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    # The rows from `first` on, which the next call pools: BP rows and BC channels at a time.
    high, wide = tl.cdiv(R, BP), tl.cdiv(W, BC)
    for number in range(tl.program_id(0), B * high * wide, tl.num_programs(0)):
        c = number % wide * BC + tl.arange(0, BC)
        place = (number // wide % high * BP + tl.arange(0, BP))[:, None]
        batch = tl.cast(number // wide // high, tl.int64)
        row, channel = first + place + 0 * c[None, :], c[None, :] + 0 * place
        inside = (place < R) & (c < W)[None, :]
        value, weight = _rows(
            kv,
            gate,
            bias,
            state_kv,
            state_gate,
            batch,
            row,
            channel,
            inside & (row < count),
            S,
            W,
            R,
            m,
            head,
            pending,
        )
        weight = tl.where(row < count, weight, float("-inf"))
        at = (batch * R + place) * W + channel
        tl.store(next_kv + at, value, mask=inside)
        tl.store(next_gate + at, weight, mask=inside)


@jit
def _backward(
    kv,
    gate,
    bias,
    state_kv,
    state_gate,
    dentries,
    dvalues,
    dgates,
    B,
    S,
    W,
    R,
    m,
    head,
    pending,
    blocks,
    D,
    rows,
    OVERLAP: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    # Each half of a row's channels belongs to one entry: its program adds to them, no other does.
    for number in range(tl.program_id(0), B * blocks * tl.cdiv(D, BC), tl.num_programs(0)):
        batch, entry, c, row, channel, inside = _slots(number, blocks, D, m, OVERLAP, BP, BC)
        value, weight = _rows(
            kv,
            gate,
            bias,
            state_kv,
            state_gate,
            batch,
            row,
            channel,
            inside,
            S,
            W,
            R,
            m,
            head,
            pending,
        )
        share, value, out = _pooled(value, tl.where(inside, weight, float("-inf")))
        at = dentries + (batch * blocks + entry) * D + c
        slope = share * tl.load(at, mask=c < D, other=0.0).to(tl.float32)[None, :]
        into = (batch * rows + row) * W + channel
        kept = tl.load(dvalues + into, mask=inside, other=0.0)
        tl.store(dvalues + into, kept + slope, mask=inside)
        kept = tl.load(dgates + into, mask=inside, other=0.0)
        tl.store(dgates + into, kept + slope * (value - out[None, :]), mask=inside)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _tile(x: Tensor, slots: int, channels: int):
    """A tile of whole entries, and its sizes."""
    tile = tile_for("compress_kv.entries", x)
    BP = 1 << (slots - 1).bit_length()
    BC = max(16, min(tile["ELEMENTS"] // BP, 1 << max(0, channels - 1).bit_length()))
    return tile, dict(BP=BP, BC=BC)


@offer(compress_kv, *floats("kv"), at_most("m", LONGEST))
def forward(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    *,
    overlap: bool,
    state_kv: Tensor | None = None,
    state_gate: Tensor | None = None,
    pending: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """entries, next_kv and next_gate."""
    (B, S, W), m = kv.shape, position_bias.shape[0]
    R, D, blocks = (1 + overlap) * m, W // (1 + overlap), (pending + S) // m
    head = overlap * m + pending
    entries = kv.new_empty((B, blocks, D))
    kept = [torch.empty((B, R, W), dtype=torch.float32, device=kv.device) for _ in range(2)]
    given = _contiguous(kv, gate, position_bias, state_kv, state_gate)
    more = dict(entry="compress_kv.entries")
    if entries.numel():
        tile, sizes = _tile(kv, R, D)
        launch(
            _forward,
            programs(kv, B * blocks * cdiv(D, sizes["BC"]), tile),
            *given,
            entries,
            B,
            S,
            W,
            R,
            m,
            head,
            pending,
            blocks,
            D,
            tile=tile,
            OVERLAP=overlap,
            **sizes,
            **more,
        )
    if kept[0].numel():
        tile, sizes = _tile(kv, min(R, 16), W)
        work = B * cdiv(R, sizes["BP"]) * cdiv(W, sizes["BC"])
        launch(
            _carry,
            programs(kv, work, tile),
            *given,
            *kept,
            B,
            S,
            W,
            R,
            m,
            head,
            pending,
            blocks * m,
            head + S,
            tile=tile,
            **sizes,
            **more,
        )
    return entries, *kept


@offer(compress_kv_backward, *floats("kv"), at_most("m", LONGEST))
def backward(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    dentries: Tensor,
    dnext_kv: Tensor,
    dnext_gate: Tensor,
    *,
    overlap: bool,
    state_kv: Tensor | None = None,
    state_gate: Tensor | None = None,
    pending: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dkv, dgate, dposition_bias, dstate_kv, dstate_gate)."""
    (B, S, W), m = kv.shape, position_bias.shape[0]
    R, D, blocks = (1 + overlap) * m, W // (1 + overlap), (pending + S) // m
    before = overlap * m
    head, count = before + pending, before + pending + S
    # Rounded up to whole blocks, so that the gradient of the bias is one sum over blocks.
    rows = before + cdiv(count - before, m) * m
    slopes = torch.zeros((2, B, rows, W), dtype=torch.float32, device=kv.device)
    slopes[0, :, blocks * m : count] = dnext_kv[:, : count - blocks * m]
    slopes[1, :, blocks * m : count] = dnext_gate[:, : count - blocks * m]
    if B * blocks * D:
        tile, sizes = _tile(kv, R, D)
        launch(
            _backward,
            programs(kv, B * blocks * cdiv(D, sizes["BC"]), tile),
            *_contiguous(kv, gate, position_bias, state_kv, state_gate),
            dentries.contiguous(),
            slopes[0],
            slopes[1],
            B,
            S,
            W,
            R,
            m,
            head,
            pending,
            blocks,
            D,
            rows,
            tile=tile,
            entry="compress_kv.entries",
            OVERLAP=overlap,
            **sizes,
        )
    dstate = torch.zeros((2, B, R, W), dtype=torch.float32, device=kv.device)
    if state_kv is not None:
        dstate[:, :, :head] = slopes[:, :, :head]
    dkv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=kv.device)
    dkv.copy_(slopes[0, :, head:count])
    dgate.copy_(slopes[1, :, head:count])
    slopes[1, :, before:head] = 0  # the bias of these was added by an earlier call
    dbias = slopes[1, :, before:].unflatten(1, (-1, m)).sum((0, 1))
    return dkv, dgate, dbias.to(position_bias.dtype), dstate[0], dstate[1]
