"""Products with 16-bit weights through `grouped_gemm`, where PyTorch's own are slow.

Without AVX-512 PyTorch multiplies bfloat16 and float16 matrices on an x86 CPU at a fraction of
float32's rate; `grouped_gemm` widens the weights as it packs them and keeps that rate.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor, nn

import transom

_ops: Any = transom


@functools.cache
def slow_here() -> bool:
    """Whether this CPU multiplies 16-bit matrices faster with transom's kernels than with torch."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        and transom.backends()["native"] is None
    )


def narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these is one that torch is slow at on such a CPU."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.device.type == weight.device.type == "cpu"
        and x.dim() > 1
    )


class Linear(nn.Linear):
    """A linear layer without bias."""

    def forward(self, input: Tensor) -> Tensor:
        """As the original; other dtypes and devices run the original."""
        if not narrow(input, self.weight):
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        y = _ops.grouped_gemm(rows, self.weight[None], torch.full((1,), rows.shape[0]))
        return y.view(*input.shape[:-1], self.out_features)


REPLACEMENTS: dict[type[nn.Linear], type[nn.Linear]] = {nn.Linear: Linear}
"""By original; families add those that they have."""


def patch_linear(module: nn.Module) -> str | None:
    """Replaces a linear layer that is slow here, and says by what; None for other modules."""
    if type(module) in REPLACEMENTS.values():
        return "grouped_gemm"
    if type(module) not in REPLACEMENTS or "forward" in vars(module):
        return None
    weight, bias = module.weight, module.bias
    if bias is not None or type(weight) is not nn.Parameter or not narrow(weight, weight):
        return None
    if not slow_here():
        return None
    module.__class__ = REPLACEMENTS[type(module)]
    return "grouped_gemm"


def unpatch_linear(module: nn.Module) -> None:
    """Gives a layer that `patch_linear` replaced its class back; leaves others."""
    for original, replacement in REPLACEMENTS.items():
        if type(module) is replacement:
            module.__class__ = original
