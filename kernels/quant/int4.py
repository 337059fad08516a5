"""int4 weights: asymmetric, one float32 scale and one zero point for each group along a row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.kernels import _bounds as bounds
from transom.weights import weight_from
from transom.weights.codes import pack_nibbles

from ._blocks import from_blocks, over_tiles, to_blocks

GRID = "[*B,N,(K+group-1)//group if group>0 else 0]"
PACKED_GRID = GRID.replace("K", "2*P")
# Smallest range of a group, so that its scale stays positive.
FLOOR = 1e-10


@op(
    f"weight[*B,N,K] -> values[*B,N,K//2], scales{GRID}, zeros{GRID}",
    dtypes="weight: float; values: u8; scales: f32; zeros: u8",
    flops="6*B*N*K",
    batch="*B",
    examples=[
        dict(B=(2,), N=6, K=64, group=32),
        dict(B=(), N=4096, K=7168, group=128),
        dict(B=(128,), N=1536, K=4096, group=64),
    ],
)
def quantize_int4(weight: Tensor, *, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight ~ (q - zero) * scale, q and zero in 0..15, over each group.

    With hi = max(0, max w) and lo = min(0, min w): scale = max(hi/15 + (-lo)/15, 1e-10/15),
    zero = round(-lo/scale), q = clamp(round(w/scale) + zero, 0, 15). 0 is always represented
    exactly, and every element to half a scale.

    weight   [*B,N,K], K even, any float dtype; float64 is rounded to float32 first.
    group    neighbours along K that share scale and zero point, usually 32, 64 or 128; the last may
             be partial.
    Returns values uint8 [*B,N,K/2] (low nibble: even element), scales float32 and zeros uint8
    [*B,N,ceil(K/group)]. Quotients are float32, rounded half to even. A group that holds NaN or Inf
    gets scale NaN, values and zero point 0. Raises ValueError for group < 1 and odd K.
    Source: AWQ and GPTQ checkpoints (4 bits, zero point a group); Jacob et al. 2018,
    arXiv:1712.05877, eq. 1.
    """
    *lead, n, k = weight.shape
    groups = -(-k // group)
    values = torch.empty(*lead, n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(*lead, n, groups, dtype=torch.float32, device=weight.device)
    zeros = torch.empty(*lead, n, groups, dtype=torch.uint8, device=weight.device)

    def quantise(tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = to_blocks(tile, 1, group)
        high = blocks.amax((-1, -3)).clamp(min=0)
        low = (-blocks).amax((-1, -3)).clamp(min=0)
        # Divided by a tensor on purpose: on some devices torch multiplies by 1/15 for a number.
        # Each side is divided first, because high + low may overflow.
        fifteen = high.new_full((), 15.0)
        scale = torch.maximum(high / fifteen + low / fifteen, high.new_full((), FLOOR) / fifteen)
        scale = scale.masked_fill(~(torch.isfinite(high) & torch.isfinite(low)), float("nan"))
        zero = torch.round(low / scale)
        codes = torch.round(blocks / scale.unsqueeze(-1).unsqueeze(-3))
        codes = (codes + zero.unsqueeze(-1).unsqueeze(-3)).clamp(0, 15).nan_to_num(0)
        packed = pack_nibbles(from_blocks(codes.to(torch.uint8), *tile.shape[-2:]))
        return packed, scale, zero.nan_to_num(0).to(torch.uint8)

    over_tiles(weight, 1, group, (values, scales, zeros), quantise)
    return values, scales, zeros


@quantize_int4.reference
def _(weight, group):
    with np.errstate(over="ignore", invalid="ignore"):
        x = weight.astype(np.float32)
        codes, scales, zeros = np.zeros(x.shape, np.uint8), [], []
        for start in range(0, x.shape[-1], group):
            part = x[..., start : start + group]
            high, low = np.maximum(part.max(-1), 0), np.maximum((-part).max(-1), 0)
            fifteen = np.float32(15)
            scale = np.maximum(high / fifteen + low / fifteen, np.float32(FLOOR) / fifteen)
            scale[~np.isfinite(part).all(-1)] = np.nan
            zero = np.rint(low / scale)
            q = np.clip(np.rint(part / scale[..., None]) + zero[..., None], 0, 15)
            codes[..., start : start + group] = np.nan_to_num(q)
            scales.append(scale)
            zeros.append(np.nan_to_num(zero).astype(np.uint8))
    values = codes[..., 0::2] + 16 * codes[..., 1::2]
    if not scales:
        empty = np.zeros((*x.shape[:-1], 0))
        return values, empty, empty
    return values, np.stack(scales, -1), np.stack(zeros, -1)


@quantize_int4.check
def _(K, group):
    if group < 1:
        return f"group is {group}; must be >= 1"
    if K % 2:
        return f"K is {K}; must be even, two 4-bit elements share a byte"
    return bounds.above(bounds.BLOCK, group=group)


@op(
    f"values[*B,N,P], scales{PACKED_GRID}, zeros{PACKED_GRID} -> weight[*B,N,2*P]",
    dtypes="values: u8; scales: f32; zeros: u8; weight: f32",
    flops="4*B*N*P",
    batch="*B",
    examples=[
        dict(B=(2,), N=6, P=32, group=32),
        dict(B=(), N=4096, P=3584, group=128),
        dict(B=(128,), N=1536, P=2048, group=64),
    ],
)
def dequantize_int4(values: Tensor, scales: Tensor, zeros: Tensor, *, group: int) -> Tensor:
    """weight = (q - zero) * scale of its group, float32.

    values uint8 [*B,N,K/2], low nibble: even element; scales float32 and zeros uint8
    [*B,N,ceil(K/group)]; zero points above 15 are legal (GPTQ has 16). A scale of NaN gives NaN.
    Raises ValueError for group < 1.
    Source: AWQ and GPTQ checkpoints.
    """
    return weight_from(values, scales, zeros, f"int4:1x{group}").dequantize()


@dequantize_int4.reference
def _(values, scales, zeros, group):
    q = np.stack((values % 16, values // 16), -1).reshape(*values.shape[:-1], 2 * values.shape[-1])
    spread = [np.repeat(g, group, -1)[..., : q.shape[-1]] for g in (scales, zeros)]
    return ((q.astype(np.float64) - spread[1]) * spread[0]).astype(np.float32)


@dequantize_int4.check
def _(group):
    if group < 1:
        return f"group is {group}; must be >= 1"
    return bounds.above(bounds.BLOCK, group=group)


@dequantize_int4.sample
def _(rng, dims):
    shape = (*dims["B"], dims["N"], dims["P"])
    grid = (*shape[:-1], -(-2 * dims["P"] // max(dims["group"], 1)))
    return {
        "values": rng.integers(0, 256, shape),
        "scales": rng.uniform(0.001, 0.1, grid),
        "zeros": rng.integers(0, 17, grid),
    }
