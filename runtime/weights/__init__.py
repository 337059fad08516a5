"""Weights: a plain tensor or a quantised one, read tile by tile.

A `QuantizedWeight` is a module that owns its payload, its scales and, for int4, its zero points as
buffers. It is accepted wherever a weight is, moves with `.to(device)`, keeps its bytes when a model
is cast, and travels through `state_dict` and safetensors together with a description of its format.

The description is one short string, the *spec*: `<format>:<rows>x<columns>`, for example
`int4:1x64` or `fp8:128x128`. Rows and columns are the size of the block that shares one scale; 0
stands for the whole extent, so that `int8:1x0` is one scale for each row. Blocks at the lower and
right edge may be partial: the grid of scales is the ceiling of the division. Whether scales are
float32 or E8M0 bytes is told by their dtype (float32 or uint8).

    quantized_weight    the module, and how a weight crosses a torch schema
    layout              the spec's grammar, shapes, and the dtypes that parts are stored in
    tiles               reading a tile or chosen rows, decoded
    codes               number formats of few bits as bytes
    host_memory         tables that a device reads in pinned host memory
    checkpoints         AWQ, GPTQ, gpt-oss MXFP4 and E4M3FNUZ, repacked value for value
"""

from __future__ import annotations

from .checkpoints import fn_from_fnuz, fnuz_from_fn
from .huge_pages import advise_huge_pages
from .layout import check_parts, checked_group, grid_size, logical_shape
from .quantized_weight import QuantizedWeight, Weight, replace_weight, weight_args, weight_from
from .tiles import gather_rows, weight_tile

__all__ = [
    "QuantizedWeight",
    "Weight",
    "advise_huge_pages",
    "check_parts",
    "checked_group",
    "fn_from_fnuz",
    "fnuz_from_fn",
    "gather_rows",
    "grid_size",
    "logical_shape",
    "replace_weight",
    "weight_args",
    "weight_from",
    "weight_tile",
]
