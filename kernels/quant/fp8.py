"""fp8 E4M3FN weights and activations with float32 or E8M0 scales, one for each block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.kernels import _bounds as bounds
from transom.weights import weight_from
from transom.weights.codes import E4M3_MAX, decode_e8m0, encode_e4m3, encode_e8m0

from ._blocks import from_blocks, over_tiles, to_blocks
from ._minifloat import E4M3, nearest_code, power_above, power_of

# Largest magnitude below which a block counts as zero, so that its scale stays positive.
# Source: DeepSeek-V3's activation quantisation; DeepGEMM uses it for weights too.
FLOOR = 1e-4

GRID = "[*B,(N+rows-1)//rows if rows>0 else 0,(K+columns-1)//columns if columns>0 else 0]"
EXAMPLES = [
    dict(B=(2,), N=9, K=64, rows=4, columns=32),
    dict(B=(), N=4096, K=7168, rows=128, columns=128),
    dict(B=(), N=4096, K=7168, rows=1, columns=128),
    dict(B=(128,), N=1536, K=4096, rows=32, columns=32),
]


@op(
    f"weight[*B,N,K] -> values[*B,N,K], scales{GRID}",
    dtypes="weight: float; values: u8; scales: f32",
    flops="4*B*N*K",
    batch="*B",
    examples=EXAMPLES,
)
def quantize_fp8(weight: Tensor, *, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """values = E4M3(weight / scale), scale = max(max|weight|, 1e-4) / 448 over each block.

    weight         [*B,N,K], any float dtype; float64 is rounded to float32 first. Activations are
                   the case rows = 1, columns = 128.
    rows, columns  the block that shares a scale: 128x128, 32x32, 1x128; edges may be partial.
    Returns values uint8 (codes of E4M3FN) and scales float32 [*B,ceil(N/rows),ceil(K/columns)].
    Quotients are float32 and go to the nearest code, ties to the even one, saturating. A block that
    holds NaN or Inf gets scale NaN and values 0. Raises ValueError for rows or columns < 1.
    Source: DeepSeek-V3 report, arXiv:2412.19437, section 3.3; OCP 8-bit floating point 1.0.
    """
    return _quantize(weight, rows, columns, torch.float32)


@quantize_fp8.reference
def _(weight, rows, columns):
    return _quantize_reference(weight, rows, columns, powers=False)


@op(
    f"weight[*B,N,K] -> values[*B,N,K], scales{GRID}",
    dtypes="weight: float; values: u8; scales: u8",
    flops="4*B*N*K",
    batch="*B",
    examples=EXAMPLES,
)
def quantize_fp8_e8m0(weight: Tensor, *, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """values = E4M3(weight / scale), scale = the power of two at or above max(max|weight|,
    1e-4)/448.

    As `quantize_fp8`, with scales as E8M0 bytes: uint8, of value 2^(byte-127). Rounding the scale
    up means that nothing is clipped. A block that holds NaN or Inf gets byte 255 (NaN) and values
    0.
    Source: DeepSeek-V4 report, arXiv:2606.19348; OCP Microscaling Formats 1.0.
    """
    return _quantize(weight, rows, columns, torch.uint8)


@quantize_fp8_e8m0.reference
def _(weight, rows, columns):
    return _quantize_reference(weight, rows, columns, powers=True)


@quantize_fp8.check
@quantize_fp8_e8m0.check
def _block_check(rows, columns):
    if rows < 1 or columns < 1:
        return f"block is {rows}x{columns}; rows and columns must be >= 1"
    return bounds.above(bounds.BLOCK, rows=rows, columns=columns)


def _quantize(
    weight: Tensor, rows: int, columns: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    *lead, n, k = weight.shape
    values = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grid = (*lead, -(-n // rows), -(-k // columns))
    scales = torch.empty(grid, dtype=scale_dtype, device=weight.device)

    def quantise(tile: Tensor) -> tuple[Tensor, Tensor]:
        blocks = to_blocks(tile, rows, columns)
        largest = blocks.abs().amax((-1, -3))
        # Divided by a tensor on purpose: on some devices torch multiplies by 1/448 for a number.
        scale = largest.clamp(min=FLOOR) / largest.new_full((), E4M3_MAX)
        finite = torch.isfinite(largest)
        stored = scale.masked_fill(~finite, float("nan"))
        if scale_dtype == torch.uint8:
            stored = encode_e8m0(stored)
            scale = decode_e8m0(stored)
        codes = encode_e4m3(blocks / scale.unsqueeze(-1).unsqueeze(-3))
        codes = codes.masked_fill(~finite.unsqueeze(-1).unsqueeze(-3), 0)
        return from_blocks(codes, *tile.shape[-2:]), stored

    over_tiles(weight, rows, columns, (values, scales), quantise)
    return values, scales


def _quantize_reference(weight, rows, columns, powers):
    with np.errstate(over="ignore", invalid="ignore"):
        x = weight.astype(np.float32)
    n, k = x.shape[-2:]
    values = np.zeros(x.shape, np.uint8)
    grid = (*x.shape[:-2], -(-n // rows), -(-k // columns))
    scales = np.zeros(grid, np.uint8 if powers else np.float32)
    for i in range(grid[-2]):
        for j in range(grid[-1]):
            place = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            largest = np.abs(x[place]).max((-1, -2))
            finite = np.isfinite(largest)
            scale = np.maximum(largest, np.float32(FLOOR)) / np.float32(448)
            scale = np.where(finite, scale, np.float32("nan"))
            scales[..., i, j] = power_above(scale) if powers else scale
            if powers:
                scale = power_of(scales[..., i, j]).astype(np.float32)
            with np.errstate(invalid="ignore"):
                quotient = x[place] / scale[..., None, None]
            sign = np.where(np.signbit(quotient), 0x80, 0)
            codes = nearest_code(quotient.astype(np.float64), E4M3) + sign
            values[place] = np.where(finite[..., None, None], codes, 0)
    return values, scales


@op(
    f"values[*B,N,K], scales{GRID} -> weight[*B,N,K]",
    dtypes="values: u8; scales: f32 | u8; weight: f32",
    flops="B*N*K",
    batch="*B",
    examples=EXAMPLES,
)
def dequantize_fp8(values: Tensor, scales: Tensor, *, rows: int, columns: int) -> Tensor:
    """weight = value(code) * scale of its block, float32.

    values uint8 codes of E4M3FN [*B,N,K]; scales [*B,ceil(N/rows),ceil(K/columns)], float32 or E8M0
    bytes. Codes 0x7F and 0xFF, scale NaN and byte 255 give NaN. Raises ValueError for rows or
    columns < 1. Hugging Face's `weight_scale_inv` is this scale, a multiplier.
    Source: OCP 8-bit floating point 1.0.
    """
    return weight_from(values, scales, None, f"fp8:{rows}x{columns}").dequantize()


dequantize_fp8.check(_block_check)


@dequantize_fp8.reference
def _(values, scales, rows, columns):
    n, k = values.shape[-2:]
    magnitude = np.append(E4M3, np.nan)[values & 0x7F]
    value = np.where(values & 0x80, -magnitude, magnitude)
    scale = power_of(scales) if scales.dtype == np.uint8 else scales
    spread = np.repeat(np.repeat(scale, rows, -2), columns, -1)[..., :n, :k]
    with np.errstate(over="ignore"):
        return (value * spread).astype(np.float32)


@dequantize_fp8.sample
def _(rng, dims):
    rows, columns = max(dims["rows"], 1), max(dims["columns"], 1)
    shape = (*dims["B"], dims["N"], dims["K"])
    grid = (*dims["B"], -(-dims["N"] // rows), -(-dims["K"] // columns))
    codes = rng.integers(0, 0x7F, shape) + 0x80 * rng.integers(0, 2, shape)
    # Integers, because both readings are sensible: 2^-9..2^4 as E8M0, 118..131 as float32.
    return {"values": codes, "scales": rng.integers(118, 132, grid)}
