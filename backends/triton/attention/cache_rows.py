"""Cache rows of 584 and 288 bytes: packed, and read back, some tokens at a time."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.attention.cache_rows import (
    FLOOR,
    V4,
    WIDTH,
    pack_cache_rows,
    unpack_cache_rows,
)
from transom.requires import last_dim_contiguous

from .._language import e2m1_code, e4m3, e4m3_code, e8m0_byte, scale_of
from .._launch import launch, programs, tile_for
from .._offer import floats, offer
from ._keys import gathered

LEAST = tl.constexpr(FLOOR)
INFINITE = tl.constexpr(0x7F800000)


@jit
def _largest(x, AXIS: tl.constexpr):
    """The bits of the largest magnitude along a dim; those of NaN are above infinity's."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)


@jit
def _pack8(kv, rows, T, N, by_batch, by_row, by_element, BT: tl.constexpr):
    # 584 bytes of BT tokens: 7 blocks of 64 as E4M3, one of 64 as bfloat16, 7 scales and a zero.
    # Bound by memory.
    block, byte = tl.arange(0, 8), tl.arange(0, 128)
    column = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    for number in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        t = tl.cast(number, tl.int64) * BT + tl.arange(0, BT)
        there = t < T
        token = tl.minimum(t, T - 1)
        token = token // N * by_batch + token % N * by_row
        x = tl.load(kv + token[:, None, None] + (column * by_element)[None]).to(tl.float32)
        bits = _largest(x, 2)
        finite = bits < INFINITE
        most = tl.where(finite, bits, 0).to(tl.float32, bitcast=True)
        scale = tl.where(finite, tl.div_rn(tl.maximum(most, LEAST), 448.0), float("nan"))
        stored = e8m0_byte(scale)
        code = e4m3_code(tl.div_rn(x, scale_of(stored)[:, :, None]), finite[:, :, None])
        into = rows + t * 584
        at = into[:, None, None] + column[None, :, :]
        plain = there[:, None, None] & (block < 7)[None, :, None]
        tl.store(at, code.to(tl.uint8), mask=plain)
        x = tl.load(kv + token[:, None] + (448 + byte // 2)[None, :] * by_element).to(tl.float32)
        both = x.to(tl.int32, bitcast=True)
        # To nearest, ties to even, whatever the device's own conversion makes of NaN.
        high = tl.where(x == x, (both + 0x7FFF + ((both >> 16) & 1)) >> 16, (both >> 16) | 0x40)
        half = (high >> (byte % 2 * 8)[None, :]) & 255
        at = into[:, None] + (448 + byte)[None, :]
        tl.store(at, half.to(tl.uint8), mask=there[:, None])
        last = tl.where((block < 7)[None, :], stored, 0)
        tl.store(into[:, None] + (576 + block)[None, :], last.to(tl.uint8), mask=there[:, None])


@jit
def _pack4(kv, rows, T, N, by_batch, by_row, by_element, BT: tl.constexpr):
    # 288 bytes of BT tokens: 32 blocks of 16 as E2M1, then their scales as E4M3. Bound by memory.
    block, pair, one = tl.arange(0, 32), tl.arange(0, 8), tl.arange(0, 2)
    byte = block[:, None] * 8 + pair[None, :]
    column = 2 * byte[:, :, None] + one[None, None, :]
    for number in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        t = tl.cast(number, tl.int64) * BT + tl.arange(0, BT)
        there, token = t < T, tl.minimum(t, T - 1)
        token = token // N * by_batch + token % N * by_row
        at = kv + token[:, None, None, None] + (column * by_element)[None]
        x = tl.load(at).to(tl.float32)
        bits = tl.max(_largest(x, 3), 2)
        finite = bits < INFINITE
        most = tl.where(finite, bits, 0).to(tl.float32, bitcast=True)
        stored = tl.where(finite, e4m3_code(tl.div_rn(most, 6.0), finite), 127)
        usable = (finite & (stored != 0))[:, :, None, None]
        code = e2m1_code(tl.div_rn(x, e4m3(stored)[:, :, None, None]), usable)
        code = tl.sum(code << (4 * one)[None, None, None, :], 3)
        into = rows + t * 288
        at = into[:, None, None] + byte[None, :, :]
        tl.store(at, code.to(tl.uint8), mask=there[:, None, None])
        at = into[:, None] + (256 + block)[None, :]
        tl.store(at, stored.to(tl.uint8), mask=there[:, None])


@jit
def _unpack(
    rows, kv, T, N, by_batch, by_row, BYTES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    # Rows of BT tokens decoded to float32, BD elements at a time. Bound by memory.
    for number in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        t = tl.cast(number, tl.int64) * BT + tl.arange(0, BT)
        there, token = t < T, tl.minimum(t, T - 1)
        at = token // N * by_batch + token % N * by_row
        for FIRST in tl.static_range(0, 512, BD):
            tile = gathered(rows, at, there, FIRST, BD, 512, BYTES, tl.float32)
            into = kv + (t * 512)[:, None] + (FIRST + tl.arange(0, BD))[None, :]
            tl.store(into, tile, mask=there[:, None])


@offer(pack_cache_rows, *floats("kv"))
def pack(kv: Tensor, *, row_bytes: int) -> Tensor:
    """rows = kv in 8 bits (584) or in 4 bits (288), with the scales in the row."""
    rows = torch.empty((*kv.shape[:2], row_bytes), dtype=torch.uint8, device=kv.device)
    if (T := kv.shape[:2].numel()) == 0:
        return rows
    entry = f"cache_rows.pack{row_bytes}"
    tile = tile_for(entry, kv)
    launch(
        _pack8 if row_bytes == V4 else _pack4,
        programs(kv, cdiv(T, tile["BT"]), tile),
        kv,
        rows,
        T,
        kv.shape[1],
        *kv.stride(),
        tile=tile,
        entry=entry,
    )
    return rows


@offer(unpack_cache_rows, last_dim_contiguous("rows"))
def unpack(rows: Tensor) -> Tensor:
    """kv = value(code) * scale of its block, float32."""
    kv = torch.empty((*rows.shape[:2], WIDTH), dtype=torch.float32, device=rows.device)
    if (T := rows.shape[:2].numel()) == 0:
        return kv
    tile = tile_for("cache_rows.unpack", kv)
    launch(
        _unpack,
        programs(kv, cdiv(T, tile["BT"]), tile),
        rows,
        kv,
        T,
        rows.shape[1],
        *rows.stride()[:2],
        tile=tile,
        entry="cache_rows.unpack",
        BYTES=rows.shape[2],
    )
    return kv
