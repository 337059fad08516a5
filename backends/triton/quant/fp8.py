"""fp8 E4M3FN with float32 or E8M0 scales, one for each block."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.quant.fp8 import FLOOR, dequantize_fp8, quantize_fp8, quantize_fp8_e8m0
from transom.weights.codes import E4M3_MAX

from .._offer import offer
from ._blocks import dequantized, quantized, weights


@offer(quantize_fp8, *weights("rows", "columns"))
def quantize(weight: Tensor, *, rows: int, columns: int) -> tuple[Tensor, ...]:
    """values = E4M3(weight / scale), scale = max(max|weight|, 1e-4) / 448."""
    return quantized(weight, "fp8", rows, columns, torch.float32, floor=FLOOR, largest=E4M3_MAX)


@offer(quantize_fp8_e8m0, *weights("rows", "columns"))
def quantize_powers(weight: Tensor, *, rows: int, columns: int) -> tuple[Tensor, ...]:
    """As `quantize`, with the power of two at or above as scale."""
    return quantized(weight, "fp8", rows, columns, torch.uint8, floor=FLOOR, largest=E4M3_MAX)


@offer(dequantize_fp8)
def dequantize(values: Tensor, scales: Tensor, *, rows: int, columns: int) -> Tensor:
    """weight = value(code) * scale of its block."""
    return dequantized(values, scales, None, "fp8", rows, columns)
