"""Rows of a key cache as bytes: DeepSeek-V4's 584 and DeepSeek-V4.1's 288 for a key of 512."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.kernels.quant._minifloat import E2M1, E4M3, nearest_code, power_above, power_of
from transom.weights.codes import (
    E2M1_MAX,
    E4M3_MAX,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
    pack_nibbles,
    unpack_nibbles,
)

WIDTH = 512
V4, V41 = 584, 288
# The leading dims without position, in blocks of 64 with a scale each; the rest is rotated.
PLAIN, BLOCK, FLOOR = 448, 64, 1e-4
GROUP = 16


@op(
    "kv[B,N,D] -> rows[B,N,row_bytes]",
    dtypes="kv: float; rows: u8",
    flops="4*B*N*D",
    batch="B",
    examples=[
        dict(B=2, N=5, D=512, row_bytes=584),
        dict(B=2, N=5, D=512, row_bytes=288),
        dict(B=1, N=16384, D=512, row_bytes=584),
    ],
)
def pack_cache_rows(kv: Tensor, *, row_bytes: int) -> Tensor:
    """rows = kv in 8 bits (row_bytes = 584) or in 4 bits (288), with the scales in the row.

    kv         [B,N,512], any float dtype; float64 is rounded to float32 first.
    row_bytes  584, DeepSeek-V4: 448 bytes E4M3; the last 64 elements as bfloat16, little-endian; 7
               scales, E8M0, one for each 64 bytes; one byte of 0. A scale is the power of two at or
               above max(max|x|, 1e-4) / 448, so nothing is clipped.
               288, DeepSeek-V4.1's compressed entries: 256 bytes E2M1, the even element in the low
               nibble; 32 scales, E4M3, one for each 16 elements: max|x| / 6, to nearest.
    Returns rows uint8 [B,N,row_bytes]. Quotients x / scale are float32 and go to the nearest code,
    ties to the even one, saturating; under a scale of 0 codes are 0. A block that holds NaN or Inf
    gets scale NaN (byte 255; 127 as E4M3) and codes 0. Raises ValueError for D other than 512 and
    other row_bytes.
    *Source:* row contents of DeepSeek-V4 (arXiv:2606.19348) and V4.1 caches; a page that keeps
    scales apart is brought into rows by its reader.
    """
    x = kv.float()
    rows = torch.zeros((*kv.shape[:2], row_bytes), dtype=torch.uint8, device=kv.device)
    if row_bytes == V4:
        blocks = x[..., :PLAIN].unflatten(-1, (-1, BLOCK))
        largest = blocks.abs().amax(-1)
        finite = torch.isfinite(largest)
        scale = largest.clamp(min=FLOOR) / largest.new_full((), E4M3_MAX)
        stored = encode_e8m0(scale.masked_fill(~finite, torch.nan))
        codes = encode_e4m3(blocks / decode_e8m0(stored).unsqueeze(-1))
        rows[..., :PLAIN] = codes.masked_fill(~finite.unsqueeze(-1), 0).flatten(-2)
        rotated = x[..., PLAIN:].to(torch.bfloat16).contiguous()
        rows[..., PLAIN : V4 - 8] = rotated.view(torch.uint8)
        rows[..., V4 - 8 : V4 - 1] = stored
        return rows
    blocks = x.unflatten(-1, (-1, GROUP))
    largest = blocks.abs().amax(-1)
    finite = torch.isfinite(largest)
    stored = encode_e4m3(largest / largest.new_full((), E2M1_MAX)).masked_fill(~finite, 0x7F)
    codes = encode_e2m1(blocks / decode_e4m3(stored).unsqueeze(-1))
    codes = codes.masked_fill(~finite.unsqueeze(-1) | (stored == 0).unsqueeze(-1), 0)
    rows[..., : WIDTH // 2] = pack_nibbles(codes.flatten(-2))
    rows[..., WIDTH // 2 :] = stored
    return rows


@op(
    "rows[B,N,R] -> kv[B,N,512]",
    dtypes="rows: u8; kv: f32",
    flops="B*N*512",
    batch="B",
    examples=[dict(B=2, N=5, R=584), dict(B=2, N=5, R=288), dict(B=1, N=16384, R=584)],
)
def unpack_cache_rows(rows: Tensor) -> Tensor:
    """kv = value(code) * scale of its block, float32: what sparse_attention reads in such rows.

    rows  [B,N,R], uint8, as `pack_cache_rows` writes them: R = 584 or 288. The byte of padding may
          hold anything.
    Returns kv float32 [B,N,512], exactly. Scale byte 255 and code 127 of E4M3 are NaN, scale byte 0
    is 2^-127. Raises ValueError for other R.
    *Source:* OCP 8-bit floating point 1.0; OCP Microscaling Formats 1.0.
    """
    return decode(rows)


def decode(rows: Tensor) -> Tensor:
    """rows[...,R] -> float32 [...,512]."""
    if rows.shape[-1] == V4:
        values = decode_e4m3(rows[..., :PLAIN]).unflatten(-1, (-1, BLOCK))
        values = values * decode_e8m0(rows[..., V4 - 8 : V4 - 1]).unsqueeze(-1)
        # Put together from bytes: a view as bfloat16 would ask for even strides.
        low, high = rows[..., PLAIN : V4 - 8].to(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
        rotated = ((low << 16) | (high << 24)).view(torch.float32)
        return torch.cat((values.flatten(-2), rotated), -1)
    values = decode_e2m1(unpack_nibbles(rows[..., : WIDTH // 2])).unflatten(-1, (-1, GROUP))
    return (values * decode_e4m3(rows[..., WIDTH // 2 :]).unsqueeze(-1)).flatten(-2)


@pack_cache_rows.check
def _(D: int, row_bytes: int) -> str | None:
    if D != WIDTH:
        return f"kv has D = {D}; must be {WIDTH}"
    return row_bytes_check(row_bytes)


def row_bytes_check(R: int) -> str | None:
    """None if rows of R bytes are known, else the sentence."""
    return None if R in (V4, V41) else f"rows have {R} bytes; must be {V4} or {V41}"


unpack_cache_rows.check(row_bytes_check)


@pack_cache_rows.reference
def _(kv: np.ndarray, row_bytes: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        x = kv.astype(np.float32)
        if row_bytes == V4:
            blocks = x[..., :PLAIN].reshape(*x.shape[:2], PLAIN // BLOCK, BLOCK)
            largest = np.abs(blocks).max(-1)
            finite = np.isfinite(largest)
            wanted = np.maximum(largest, np.float32(FLOOR)) / np.float32(E4M3_MAX)
            stored = power_above(np.where(finite, wanted, np.nan))
            scale, table, sign = power_of(stored).astype(np.float32), E4M3, 0x80
        else:
            blocks = x.reshape(*x.shape[:2], WIDTH // GROUP, GROUP)
            largest = np.abs(blocks).max(-1)
            finite = np.isfinite(largest)
            wanted = (largest / np.float32(E2M1_MAX)).astype(np.float64)
            stored = np.where(finite, nearest_code(wanted, E4M3), 0x7F)
            scale, table, sign = np.append(E4M3, np.nan)[stored].astype(np.float32), E2M1, 8
        quotient = blocks / scale[..., None]
        codes = nearest_code(quotient.astype(np.float64), table)
        codes = codes + np.where(np.signbit(quotient), sign, 0)
    codes = np.where((finite & (scale != 0))[..., None], codes, 0)
    codes = codes.reshape(*x.shape[:2], WIDTH if row_bytes == V41 else PLAIN)
    if row_bytes == V41:
        return np.concatenate([codes[..., ::2] | codes[..., 1::2] << 4, stored], -1).astype(
            np.uint8
        )
    bits = np.ascontiguousarray(x[..., PLAIN:]).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    rounded = np.where(np.isnan(x[..., PLAIN:]), bits >> 16 | 0x40, rounded)
    both = np.stack([rounded & 0xFF, rounded >> 8], -1).reshape(*x.shape[:2], V4 - 8 - PLAIN)
    pad = np.zeros((*x.shape[:2], 1), np.uint8)
    return np.concatenate([codes, both, stored, pad], -1).astype(np.uint8)


def decode_reference(rows: np.ndarray) -> np.ndarray:
    """rows[...,R] -> float64 [...,512]."""
    lead = rows.shape[:-1]
    e4m3 = np.append(E4M3, np.nan)
    signed = np.concatenate([e4m3, -e4m3])
    if rows.shape[-1] == V4:
        scale = power_of(rows[..., V4 - 8 : V4 - 1])
        values = signed[rows[..., :PLAIN]].reshape(*lead, PLAIN // BLOCK, BLOCK) * scale[..., None]
        both = rows[..., PLAIN : V4 - 8].reshape(*lead, WIDTH - PLAIN, 2).astype(np.uint32)
        rotated = (both[..., 0] << 16 | both[..., 1] << 24).view(np.float32)
        return np.concatenate([values.reshape(*lead, PLAIN), rotated.astype(np.float64)], -1)
    packed = rows[..., : WIDTH // 2]
    codes = np.stack([packed & 15, packed >> 4], -1)
    codes = codes.reshape(*lead, WIDTH // GROUP, GROUP)
    scale = signed[rows[..., WIDTH // 2 :]]
    return (np.concatenate([E2M1, -E2M1])[codes] * scale[..., None]).reshape(*lead, WIDTH)


unpack_cache_rows.reference(lambda rows: decode_reference(rows))


def sample_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Rows with scales of 2^-6 .. 2^1, so that sums of their values are of size 1."""
    rows = rng.integers(0, 256, shape)
    if shape[-1] == V4:
        # No code for NaN, no rotated element beyond 2.
        rows[..., :PLAIN] = np.where(rows[..., :PLAIN] % 128 == 127, 0, rows[..., :PLAIN])
        rows[..., PLAIN + 1 : V4 - 8 : 2] = rows[..., PLAIN + 1 : V4 - 8 : 2] & 0x80 | 0x3E
        rows[..., V4 - 8 : V4 - 1] = rng.integers(112, 118, (*shape[:-1], 7))
    elif shape[-1] == V41:
        rows[..., WIDTH // 2 :] = rng.integers(8, 48, (*shape[:-1], 32))
    return rows


@unpack_cache_rows.sample
def _(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    return {"rows": sample_rows(rng, (dims["B"], dims["N"], dims["R"]))}
