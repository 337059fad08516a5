"""mxfp4: E2M1 elements, one E8M0 scale for each 32 neighbours of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.quant.mxfp4 import BLOCK, FLOOR, dequantize_mxfp4, quantize_mxfp4
from transom.weights.codes import E2M1_MAX

from .._offer import offer
from ._blocks import dequantized, quantized, weights


@offer(quantize_mxfp4, *weights())
def quantize(weight: Tensor) -> tuple[Tensor, ...]:
    """values = E2M1(weight / scale), scale = the power of two at or above max|weight| / 6."""
    return quantized(weight, "mxfp4", 1, BLOCK, torch.uint8, floor=FLOOR, largest=E2M1_MAX)


@offer(dequantize_mxfp4)
def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """weight = value(nibble) * 2^(byte-127)."""
    return dequantized(values, scales, None, "mxfp4", 1, BLOCK)
