"""int4: asymmetric, one float32 scale and one zero point for each group along a row."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.quant.int4 import FLOOR, dequantize_int4, quantize_int4

from .._offer import offer
from ._blocks import dequantized, quantized, weights


@offer(quantize_int4, *weights("group"))
def quantize(weight: Tensor, *, group: int) -> tuple[Tensor, ...]:
    """weight ~ (q - zero) * scale over each group."""
    return quantized(weight, "int4", 1, group, torch.float32, floor=FLOOR, largest=15.0)


@offer(dequantize_int4)
def dequantize(values: Tensor, scales: Tensor, zeros: Tensor, *, group: int) -> Tensor:
    """weight = (q - zero) * scale of its group."""
    return dequantized(values, scales, zeros, "int4", 1, group)
