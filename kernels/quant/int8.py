"""int8 weights and activations: symmetric, one float32 scale for each group along a row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.kernels import _bounds as bounds
from transom.weights import weight_from

from ._blocks import from_blocks, over_tiles, to_blocks

GRID = "[*B,N,(K+group-1)//group if group>0 else 0]"
# Largest magnitude below which a group counts as zero, so that its scale stays positive.
# Source: sglang test/srt/cpu/utils.py.
FLOOR = 1e-10


@op(
    f"weight[*B,N,K] -> values[*B,N,K], scales{GRID}",
    dtypes="weight: float; values: i8; scales: f32",
    flops="4*B*N*K",
    batch="*B",
    examples=[
        dict(B=(2,), N=6, K=64, group=32),
        dict(B=(), N=4096, K=7168, group=7168),
        dict(B=(128,), N=1536, K=4096, group=4096),
    ],
)
def quantize_int8(weight: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
    """values = round(weight / scale), scale = max(max|weight|, 1e-10) / 127 over each group.

    weight   [*B,N,K], any float dtype; float64 is rounded to float32 first.
    group    neighbours along K that share a scale; K for one scale a row (per output channel, or
             per token); the last group may be partial.
    Returns values int8 in -127..127 and scales float32 [*B,N,ceil(K/group)]. Quotients are float32,
    rounded half to even. A group that holds NaN or Inf gets scale NaN and values 0.
    Raises ValueError for group < 1.
    Source: sglang, test/srt/cpu/utils.py (per token and per channel W8A8).
    """
    *lead, n, k = weight.shape
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(*lead, n, -(-k // group), dtype=torch.float32, device=weight.device)

    def quantise(tile: Tensor) -> tuple[Tensor, Tensor]:
        blocks = to_blocks(tile, 1, group)
        largest = blocks.abs().amax((-1, -3))
        # Divided by a tensor on purpose: on some devices torch multiplies by 1/127 for a number.
        scale = largest.clamp(min=FLOOR) / largest.new_full((), 127.0)
        scale = scale.masked_fill(~torch.isfinite(largest), float("nan"))
        codes = torch.round(blocks / scale.unsqueeze(-1).unsqueeze(-3)).clamp(-127, 127)
        codes = codes.nan_to_num(0).to(torch.int8)
        return from_blocks(codes, *tile.shape[-2:]), scale

    over_tiles(weight, 1, group, (values, scales), quantise)
    return values, scales


@quantize_int8.reference
def _(weight, group):
    with np.errstate(over="ignore", invalid="ignore"):
        x = weight.astype(np.float32)
        values, scales = np.zeros(x.shape, np.int8), []
        for start in range(0, x.shape[-1], group):
            part = x[..., start : start + group]
            largest = np.abs(part).max(-1)
            scale = np.maximum(largest, np.float32(FLOOR)) / np.float32(127)
            scale[~np.isfinite(largest)] = np.nan
            codes = np.rint(part / scale[..., None])
            values[..., start : start + group] = np.nan_to_num(np.clip(codes, -127, 127))
            scales.append(scale)
    grid = np.stack(scales, -1) if scales else np.zeros((*x.shape[:-1], 0), np.float32)
    return values, grid


@quantize_int8.check
def _(group):
    if group < 1:
        return f"group is {group}; must be >= 1"
    return bounds.above(bounds.BLOCK, group=group)


@op(
    f"values[*B,N,K], scales{GRID} -> weight[*B,N,K]",
    dtypes="values: i8; scales: f32; weight: f32",
    flops="B*N*K",
    batch="*B",
    examples=[
        dict(B=(2,), N=6, K=64, group=32),
        dict(B=(), N=4096, K=7168, group=7168),
        dict(B=(128,), N=1536, K=4096, group=4096),
    ],
)
def dequantize_int8(values: Tensor, scales: Tensor, *, group: int) -> Tensor:
    """weight = values * scale of its group, float32.

    values int8 [*B,N,K]; scales float32 [*B,N,ceil(K/group)]; group is elements along K. A scale of
    NaN gives NaN. Raises ValueError for group < 1.
    Source: sglang, test/srt/cpu/utils.py.
    """
    return weight_from(values, scales, None, f"int8:1x{group}").dequantize()


@dequantize_int8.reference
def _(values, scales, group):
    spread = np.repeat(scales, group, -1)[..., : values.shape[-1]]
    return (values * spread).astype(np.float32)


@dequantize_int8.check
def _(group):
    if group < 1:
        return f"group is {group}; must be >= 1"
    return bounds.above(bounds.BLOCK, group=group)


@dequantize_int8.sample
def _(rng, dims):
    shape = (*dims["B"], dims["N"], dims["K"])
    grid = (*shape[:-1], -(-dims["K"] // max(dims["group"], 1)))
    return {"values": rng.integers(-127, 128, shape), "scales": rng.uniform(0.001, 0.1, grid)}
