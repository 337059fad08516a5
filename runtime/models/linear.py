"""Products with 16-bit weights through `grouped_gemm`, where PyTorch's own are slow.

Without AVX-512 PyTorch multiplies bfloat16 and float16 matrices on an x86 CPU at a fraction of
float32's rate; `grouped_gemm` widens the weights as it packs them and keeps that rate.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor, nn

import transom

_slow: bool | None = None


def look() -> bool:
    """Whether this CPU multiplies 16-bit matrices faster with transom's kernels than with torch;
    found out once, before anything is traced."""
    global _slow
    if _slow is None:
        _slow = (
            platform.machine() in ("x86_64", "AMD64")
            and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
            and transom.backends()["native"] is None
        )
    return _slow


def slow_here() -> bool:
    """What look() found; False in a traced call of a process in which it has not looked yet."""
    if _slow is None and torch.compiler.is_compiling():
        return False
    return look()


def narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these is one that torch is slow at on such a CPU."""
    return (
        x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.device.type == weight.device.type == "cpu"
        and x.dim() > 1
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x[..., K] times weight[N, K] turned, both of 16 bits: [..., N]."""
    *lead, inner = x.shape
    rows = x.reshape(-1, inner)
    y = transom.grouped_gemm(rows, weight[None], ends(1, rows.shape[0]))
    return y.view(*lead, weight.shape[0])


def ends(groups: int, rows: int) -> Tensor:
    """The inclusive ends of `groups` groups of `rows` rows each; not to be written to."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return torch.arange(1, groups + 1, device="cpu") * rows  # a constant of no traced graph
    return _ends(groups, rows)


@functools.lru_cache(256)
def _ends(groups: int, rows: int) -> Tensor:
    with torch.inference_mode(False):  # made here, they may be saved for a gradient later
        return torch.arange(1, groups + 1, device="cpu") * rows


class Linear(nn.Linear):
    """A linear layer without bias."""

    def forward(self, input: Tensor) -> Tensor:
        """As the original; other dtypes and devices run the original."""
        weight = self.weight
        fast = type(weight) is nn.Parameter and narrow(input, weight)
        return product(input, weight) if fast else super().forward(input)


def _replacement(kind: type) -> type[nn.Linear] | None:
    """What a linear layer of exactly this class becomes."""
    if kind is nn.Linear:
        return Linear
    if kind.__name__ == "DeepseekV4GroupedLinear" and kind.__module__.startswith("transformers."):
        from . import deepseek_v4

        found: type[nn.Linear] = deepseek_v4.DeepseekV4GroupedLinear
        return found if found.__mro__[1] is kind else None
    return None


def patch_linear(module: nn.Module) -> str | None:
    """Replaces a linear layer that is slow here, and says by what; None for other modules."""
    if not isinstance(module, nn.Linear):
        return None
    if type(module).__module__.startswith(f"{__package__}."):
        return "grouped_gemm"
    replacement = _replacement(type(module))
    if replacement is None or "forward" in vars(module):
        return None
    weight, bias = module.weight, module.bias
    if bias is not None or type(weight) is not nn.Parameter or not narrow(weight, weight):
        return None
    if not slow_here():
        return None
    module.__class__ = replacement
    return "grouped_gemm"


def unpatch_linear(module: nn.Module) -> None:
    """Gives a layer that `patch_linear` replaced its class back; leaves others."""
    if type(module).__module__.startswith(f"{__package__}.") and isinstance(module, nn.Linear):
        module.__class__ = type(module).__mro__[1]
