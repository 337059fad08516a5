"""mxfp4 weights: E2M1 elements, one E8M0 scale for each 32 neighbours of a row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.weights import weight_from
from transom.weights.codes import E2M1_MAX, decode_e8m0, encode_e2m1, encode_e8m0, pack_nibbles

from ._blocks import from_blocks, over_tiles, to_blocks
from ._minifloat import E2M1, nearest_code, power_above, power_of

BLOCK = 32
# The least scale is 2^-126, the smallest float32 that is not subnormal.
FLOOR = 6 * 2.0**-126
# The byte of 2^126, the largest scale that float32 weights ask for: 4 * 2^126 is no float32.
TOP = 253


@op(
    "weight[*B,N,K] -> values[*B,N,K//2], scales[*B,N,(K+31)//32]",
    dtypes="weight: float; values: u8; scales: u8",
    flops="4*B*N*K",
    batch="*B",
    examples=[dict(B=(2,), N=6, K=64), dict(B=(), N=4096, K=7168), dict(B=(128,), N=5760, K=2880)],
)
def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """values = E2M1(weight / scale), scale = the power of two at or above max(max|weight|,
    6*2^-126)/6.

    One scale for each 32 neighbours along K; the last block may be partial. Rounding the scale up
    means that nothing is clipped, but for weights of 3.5 * 2^126 (2.98e38) and more: they become
    3 * 2^126, since 4 * 2^126 would read back as Inf.

    weight   [*B,N,K], K even, any float dtype; float64 is rounded to float32 first.
    Returns values uint8 [*B,N,K/2], low nibble: even element, each nibble sign and magnitude of
    {0, .5, 1, 1.5, 2, 3, 4, 6}; scales uint8 E8M0 [*B,N,ceil(K/32)], of value 2^(byte-127).
    Quotients go to the nearest code, ties to the even one (0.75 -> 1, 1.75 -> 2, 3.5 -> 4,
    0.25 -> 0, 2.5 -> 2, 5 -> 4). A block that holds NaN or Inf gets byte 255 (NaN) and values 0.
    Raises ValueError for odd K.
    Source: OCP Microscaling Formats 1.0; tie and scale rules of deepseek-ai/TileKernels.
    """
    *lead, n, k = weight.shape
    values = torch.empty(*lead, n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(*lead, n, -(-k // BLOCK), dtype=torch.uint8, device=weight.device)

    def quantise(tile: Tensor) -> tuple[Tensor, Tensor]:
        blocks = to_blocks(tile, 1, BLOCK)
        largest = blocks.abs().amax((-1, -3))
        # Divided by a tensor on purpose: on some devices torch multiplies by 1/6 for a number.
        stored = encode_e8m0(largest.clamp(min=FLOOR) / largest.new_full((), E2M1_MAX))
        scale = decode_e8m0(stored)
        largest_code = torch.where(stored >= TOP, 3.0, E2M1_MAX).unsqueeze(-1).unsqueeze(-3)
        quotients = blocks / scale.unsqueeze(-1).unsqueeze(-3)
        codes = encode_e2m1(quotients.clamp(-largest_code, largest_code))
        codes = codes.masked_fill((stored == 255).unsqueeze(-1).unsqueeze(-3), 0)
        return pack_nibbles(from_blocks(codes, *tile.shape[-2:])), stored

    over_tiles(weight, 1, BLOCK, (values, scales), quantise)
    return values, scales


@quantize_mxfp4.reference
def _(weight):
    with np.errstate(over="ignore", invalid="ignore"):
        x = weight.astype(np.float32)
    codes, scales = np.zeros(x.shape, np.uint8), []
    for start in range(0, x.shape[-1], BLOCK):
        part = x[..., start : start + BLOCK]
        largest = np.abs(part).max(-1)
        byte = power_above(np.maximum(largest, np.float32(FLOOR)) / np.float32(6))
        with np.errstate(invalid="ignore"):
            quotient = part / power_of(byte)[..., None]
        sign = np.where(np.signbit(quotient), 8, 0)
        code = nearest_code(quotient, E2M1)
        code = np.where((byte >= TOP)[..., None] & (E2M1[code] > 3), list(E2M1).index(3), code)
        found = code + sign
        codes[..., start : start + BLOCK] = np.where((byte == 255)[..., None], 0, found)
        scales.append(byte)
    values = codes[..., 0::2] + 16 * codes[..., 1::2]
    return values, np.stack(scales, -1) if scales else np.zeros((*x.shape[:-1], 0), np.uint8)


@quantize_mxfp4.check
def _(K):
    if K % 2:
        return f"K is {K}; must be even, two 4-bit elements share a byte"


@op(
    "values[*B,N,P], scales[*B,N,(2*P+31)//32] -> weight[*B,N,2*P]",
    dtypes="values: u8; scales: u8; weight: f32",
    flops="2*B*N*P",
    batch="*B",
    examples=[dict(B=(2,), N=6, P=32), dict(B=(), N=4096, P=3584), dict(B=(128,), N=5760, P=1440)],
)
def dequantize_mxfp4(values: Tensor, scales: Tensor) -> Tensor:
    """weight = value(nibble) * 2^(byte-127), float32.

    values uint8 [*B,N,K/2], low nibble: even element; scales uint8 E8M0 [*B,N,ceil(K/32)]. Byte 255
    gives NaN; byte 0 is the subnormal 2^-127, which arithmetic that flushes subnormals reads as 0.
    Source: OCP Microscaling Formats 1.0.
    """
    return weight_from(values, scales, None, "mxfp4:1x32").dequantize()


@dequantize_mxfp4.reference
def _(values, scales):
    codes = np.stack((values % 16, values // 16), -1).reshape(
        *values.shape[:-1], 2 * values.shape[-1]
    )
    value = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])
    spread = np.repeat(power_of(scales), BLOCK, -1)[..., : codes.shape[-1]]
    with np.errstate(over="ignore"):
        return (value * spread).astype(np.float32)


@dequantize_mxfp4.sample
def _(rng, dims):
    shape = (*dims["B"], dims["N"], dims["P"])
    grid = (*shape[:-1], -(-2 * dims["P"] // BLOCK))
    return {"values": rng.integers(0, 256, shape), "scales": rng.integers(110, 130, grid)}
