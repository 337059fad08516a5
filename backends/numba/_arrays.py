"""Tensors as the arrays that kernels take, and the requirements that all kernels share.

Arrays share the tensors' memory and are C arrays, so that each kernel is compiled once for a dtype.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.requires import Requirement, device, dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CODES = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


def floats(*tensors: str) -> tuple[Requirement, ...]:
    """On the CPU, with these tensors in the dtypes whose sums are float32."""
    return (device("cpu"), *(dtype(name, *FLOATS) for name in tensors))


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as a C array, copied only if it is not contiguous; bfloat16 as uint16 and
    float16 as int16 codes, which `wide` reads."""
    tensor = tensor.detach().resolve_neg().contiguous()
    code = _CODES.get(tensor.dtype)
    return (tensor if code is None else tensor.view(code)).numpy()


def given(tensor: Tensor | None, dims: int, dtype: torch.dtype) -> np.ndarray:
    """The tensor's array in this dtype; an array without elements where there is no tensor."""
    if tensor is None:
        return torch.empty((0,) * dims, dtype=dtype).numpy()
    return array(tensor.to(dtype))


def flat(tensor: Tensor) -> np.ndarray:
    """All memory from the tensor's first to its last element, as one row; kernels find rows in it
    by the tensor's strides."""
    tensor = tensor.detach().resolve_neg()
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return array(tensor.as_strided((size if tensor.numel() else 0,), (1,)))


def scratch(threads: int, *shape: int) -> np.ndarray:
    """float32 workspace, [threads, *shape], not initialised."""
    return np.empty((threads, *shape), np.float32)
