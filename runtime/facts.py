"""Facts: what selection and requirements may look at of a call, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .dtypes import Kind


@dataclass(frozen=True)
class Facts:
    """What selection may look at, and nothing else."""

    device: str
    arch: str
    dtypes: Mapping[str, Kind]
    """By tensor, for those given: its dtype, or the format of a QuantizedWeight."""
    dims: Mapping[str, Any]
    layouts: Mapping[str, str]
    """'contiguous', 'rows' (last dim of stride 1) or 'strided'."""
    arguments: Mapping[str, Any]
    gradient: bool = False
    deterministic: bool = False
    capturing: bool = False
    parts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    """By tensor: shape, strides and dtype, of a QuantizedWeight those of its tensors and spec."""
    host: Mapping[str, bool] = field(default_factory=dict)
    """By argument that lies in host memory, of a call on a device: whether it is pinned."""
