"""A table in pinned host memory as a tensor of a CUDA device, which reads it in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Bytes:
    """Memory as torch takes it from another library; holds on to its owner."""

    def __init__(self, owner: Tensor) -> None:
        self.owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (owner.nbytes,), "typestr": "|u1", "data": (owner.data_ptr(), False),
            "version": 3,
        }  # fmt: skip


def mapped(table: Tensor) -> Tensor:
    """`table` as a tensor of the current CUDA device, on the same memory: nothing is copied.

    Kernels that read a few rows of it, as the lookups do, fetch those rows over the bus. `table` is
    contiguous and pinned, and stays alive as long as what is returned. Raises ValueError for other
    memory, and where the device has another address for it.
    """
    if table.device.type != "cpu" or not table.is_contiguous() or not table.is_pinned():
        raise ValueError(
            f"mapped: table is on {table.device}, pinned = {table.is_pinned()}, contiguous ="
            f" {table.is_contiguous()}; expected contiguous pinned memory; call"
            " .contiguous().pin_memory()"
        )
    seen = torch.as_tensor(_Bytes(table))
    if seen.data_ptr() != table.data_ptr():
        raise ValueError("mapped: the device has another address for table; copy it instead")
    return seen.view(table.dtype).view(table.shape)
