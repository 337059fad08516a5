"""int8: symmetric, one float32 scale for each group along a row."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.quant.int8 import FLOOR, dequantize_int8, quantize_int8

from .._offer import offer
from ._blocks import dequantized, quantized, weights


@offer(quantize_int8, *weights("group"))
def quantize(weight: Tensor, *, group: int) -> tuple[Tensor, ...]:
    """values = round(weight / scale), scale = max(max|weight|, 1e-10) / 127."""
    return quantized(weight, "int8", 1, group, torch.float32, floor=FLOOR, largest=127.0)


@offer(dequantize_int8)
def dequantize(values: Tensor, scales: Tensor, *, group: int) -> Tensor:
    """weight = values * scale of its group."""
    return dequantized(values, scales, None, "int8", 1, group)
