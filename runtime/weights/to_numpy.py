"""Arguments as references take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .quantized_weight import QuantizedWeight


def as_numpy(value: Any) -> Any:
    """A call's argument as its reference takes it: float64, int64 or bool arrays; plain values as
    they are."""
    if isinstance(value, QuantizedWeight):
        value = value.dequantize()
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    if value.dtype.is_floating_point:
        return value.double().numpy()
    return value.numpy() if value.dtype.itemsize == 1 else value.long().numpy()
