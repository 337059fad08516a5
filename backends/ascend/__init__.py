"""Huawei Ascend: the vendor's operators of torch_npu, and our Triton kernels beside them.

Where a call is within the limits of an operator that the vendor ships (npu_grouped_matmul and so
on) that operator runs; elsewhere the backend `triton` does, through triton-ascend. What can be
shown of either without a device, `transom verify --target ascend` shows: see
transom.conformance.ascend.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

DEVICES = ("npu",)

OLDEST = (2, 14)
"""Of torch_npu, whose operators' schemas the adapter is written against (_schemas.py)."""


def probe() -> str | None:
    """None if torch_npu is installed, new enough and has a device, else the sentence why not."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed; expected torch_npu >= 2.14; pip install torch-npu"
    try:
        seen = version("torch_npu")
    except PackageNotFoundError:
        return "torch_npu has no version; expected torch_npu >= 2.14; pip install torch-npu"
    if tuple(int(part) for part in seen.split(".")[:2] if part.isdigit()) < OLDEST:
        return f"torch_npu is {seen}; expected >= 2.14; pip install -U torch-npu"
    import torch

    try:
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError) as error:  # it loads the driver's libraries
        return f"torch_npu failed to import: {error}"
    if not torch.npu.is_available():
        return "torch_npu sees no device; expected an Ascend NPU with its driver"
    return None
