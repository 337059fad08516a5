"""The layout of a quantised weight: its spec, its shapes, the dtypes its parts are stored in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

FORMATS = ("int8", "int4", "fp8", "mxfp4")
DEFAULT_GROUP = {"int8": (1, 0), "int4": (1, 128), "fp8": (128, 128), "mxfp4": (1, 32)}
SCALES = {
    "int8": (torch.float32,),
    "int4": (torch.float32,),
    "fp8": (torch.float32, torch.uint8),
    "mxfp4": (torch.uint8,),
}
"""The dtypes that a format's scales are stored in; uint8 is E8M0."""
_SPEC = re.compile(rf"({'|'.join(FORMATS)}):(0|[1-9]\d{{0,17}})x(0|[1-9]\d{{0,17}})")


def logical_shape(values_shape: Sequence[int], spec: str) -> tuple[int, ...]:
    """The shape in elements of a payload of that shape (sizes may be symbolic); "" is a tensor."""
    if spec.startswith(("int4", "mxfp4")):
        return (*values_shape[:-1], values_shape[-1] * 2)
    return tuple(values_shape)


def parse_spec(spec: str) -> tuple[str, int, int]:
    """ "fp8:128x64" -> ("fp8", 128, 64)."""
    format, _, group = spec.partition(":")
    rows, _, columns = group.partition("x")
    return format, int(rows), int(columns)


def grid_size(extent: int, block: int) -> int:
    """How many blocks cover `extent` elements; a block of 0 is the whole extent."""
    return -(-extent // block) if block else min(extent, 1)


def checked_group(
    format: str, group: int | tuple[int, int] | None, caller: str = "QuantizedWeight"
) -> tuple[int, int]:
    """(rows, columns) of `group` for `format`: an int is (group, group) for fp8, whose blocks are
    square, and (1, group) for the others; None is the format's default. A size of -1, as
    configurations write it, is 0 here: the whole extent.

    Raises ValueError if there is no such format or the format has no such group, TypeError for
    what is neither an int nor two.
    """
    if format not in FORMATS:
        raise ValueError(f"{caller}: format is {format!r}; expected one of {', '.join(FORMATS)}")
    if group is None:
        return DEFAULT_GROUP[format]
    if type(group) is int:
        rows, columns = (group, group) if format == "fp8" else (1, group)
    elif isinstance(group, (tuple, list)) and [type(size) for size in group] == [int, int]:
        rows, columns = group
    else:
        raise TypeError(f"{caller}: group is {group!r}; expected an int or (rows, columns)")
    if rows < -1 or columns < -1:
        raise ValueError(
            f"{caller}: group is {group}; expected sizes >= 1, or 0 or -1 for the whole extent"
        )
    rows, columns = max(rows, 0), max(columns, 0)
    if format == "mxfp4" and (rows, columns) != (1, 32):
        raise ValueError(f"{caller}: group is {rows}x{columns}; mxfp4 has one scale for each 1x32")
    return rows, columns


def check_grid(
    what: str,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: str,
    rows: int,
    columns: int,
) -> None:
    """Raise ValueError unless scales and zero points have the grid of shape and the device that
    this payload in groups of rows x columns needs; `what` begins the message."""
    if values.ndim < 2:
        raise ValueError(f"{what} values have shape {list(values.shape)}; expected [..., N, K]")
    *lead, n, k = logical_shape(values.shape, format)
    grid = [*lead, grid_size(n, rows), grid_size(k, columns)]
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is None:
            continue
        if list(tensor.shape) != grid:
            raise ValueError(
                f"{what} {name} have shape {list(tensor.shape)}; {format} weight "
                f"{[*lead, n, k]} in groups of {rows}x{columns} needs {grid}"
            )
        if tensor.device != values.device:
            raise ValueError(f"{what} {name} are on {tensor.device}; values are on {values.device}")


def check_parts(what: str, values: Tensor, scales: Tensor, zeros: Tensor | None, spec: str) -> None:
    """Raise ValueError or TypeError unless the parts of a quantised weight fit each other, as a
    QuantizedWeight makes sure when it is constructed. Parts can come another way: through
    torch.ops, or by assigning a module's buffer. `what` begins the message.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        known = ", ".join(FORMATS)
        raise ValueError(
            f"{what} spec is {spec[:60]!r}; expected <format>:<rows>x<columns> with a format of "
            f"{known}"
        )
    format, rows, columns = found[1], int(found[2]), int(found[3])
    if format == "mxfp4" and (rows, columns) != (1, 32):
        raise ValueError(f"{what} spec is {spec!r}; mxfp4 has one scale for each 1x32")
    if (zeros is None) == (format == "int4"):
        raise ValueError(
            f"{what} zeros are {'missing' if zeros is None else 'given'}; "
            f"{format} has {'a zero point for each group' if zeros is None else 'none'}"
        )
    stored = torch.int8 if format == "int8" else torch.uint8
    for name, tensor, allowed in (
        ("values", values, (stored,)),
        ("scales", scales, SCALES[format]),
        ("zeros", zeros, (torch.uint8,)),
    ):
        if tensor is not None and tensor.dtype not in allowed:
            seen, *expected = (str(d).removeprefix("torch.") for d in (tensor.dtype, *allowed))
            raise TypeError(f"{what} {name} are {seen}; {format} expects {' or '.join(expected)}")
    check_grid(what, values, scales, zeros, format, rows, columns)


class Stored(Protocol):
    """What a quantised weight is to those who read it: buffers values, scales and zeros, and how
    they are laid out."""

    spec: str
    _buffers: dict[str, Any]


def parts(weight: Stored) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """(values, scales, zeros, spec): all that reading `weight` needs."""
    held = weight._buffers  # nn.Module.__getattr__ is three times as slow
    return held["values"], held["scales"], held["zeros"], weight.spec


# Parts as C sees them

Part: TypeAlias = tuple[int, Sequence[int], Sequence[int], torch.dtype]
"""A tensor as C sees it: address, shape, strides, dtype."""
Parts: TypeAlias = tuple[Part | str | None, ...]
"""What a tensor (one) or a weight (up to four: values, scales, zeros, spec) consists of."""


def described(value: Tensor | Stored) -> Parts:
    """The parts of a tensor or weight without their addresses."""
    if isinstance(value, Tensor):
        return (_part(value, 0),)
    values, scales, zeros, spec = parts(value)
    return _part(values, 0), _part(scales, 0), None if zeros is None else _part(zeros, 0), spec


def addressed(value: Tensor | Stored) -> Parts:
    """The parts of a tensor or weight with their addresses."""
    if isinstance(value, Tensor):
        return (_part(value, value.data_ptr()),)
    values, scales, zeros, spec = parts(value)
    last = None if zeros is None else _part(zeros, zeros.data_ptr())
    return _part(values, values.data_ptr()), _part(scales, scales.data_ptr()), last, spec


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Part:
    """A contiguous tensor of this shape, without an address."""
    return 0, shape, contiguous_strides(shape), dtype


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor of this shape, in elements."""
    strides = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return strides


def assumed(format: str, shape: Sequence[int]) -> Parts:
    """The parts of a contiguous weight in a format's usual groups, without addresses."""
    rows, columns = checked_group(format, None)
    *lead, n, k = shape
    grid = (*lead, grid_size(n, rows), grid_size(k, columns))
    stored = (*lead, n, k // 2 if format in ("int4", "mxfp4") else k)
    values = contiguous(stored, torch.int8 if format == "int8" else torch.uint8)
    scales = contiguous(grid, torch.uint8 if format == "mxfp4" else torch.float32)
    zeros = contiguous(grid, torch.uint8) if format == "int4" else None
    return values, scales, zeros, f"{format}:{rows}x{columns}"


def _part(tensor: Tensor, address: int) -> Part:
    return address, tensor.shape, tensor.stride(), tensor.dtype


# Parts as they are stored


def stored_values(format: str, values: Tensor) -> Tensor:
    """The payload as bytes, viewed, never converted."""
    stored = torch.int8 if format == "int8" else torch.uint8
    same_bytes = {
        "int8": (),
        "fp8": ("float8_e4m3fn",),
        "int4": ("int8",),
        "mxfp4": ("int8", "float4_e2m1fn_x2"),
    }
    if values.dtype != stored:
        name = str(values.dtype).removeprefix("torch.")
        if name not in same_bytes[format]:
            hint = "; convert with fn_from_fnuz" if name == "float8_e4m3fnuz" else ""
            expected = " or ".join((str(stored).removeprefix("torch."), *same_bytes[format]))
            raise TypeError(
                f"QuantizedWeight: values are {name}; {format} expects {expected}{hint}"
            )
        return values.view(stored)
    return values


def stored_scales(format: str, scales: Tensor, scale_format: str | None) -> Tensor:
    """float32, or E8M0 bytes as uint8."""
    if scale_format not in (None, "f32", "e8m0"):
        raise ValueError(f"QuantizedWeight: scale_format is {scale_format!r}; expected f32 or e8m0")
    name = str(scales.dtype).removeprefix("torch.")
    if name == "float8_e8m0fnu":
        scales = scales.view(torch.uint8)
    elif scales.dtype in (torch.float16, torch.bfloat16):
        scales = scales.float()
    seen = {torch.uint8: "e8m0", torch.float32: "f32"}.get(scales.dtype)
    allowed = {"mxfp4": ("e8m0",), "fp8": ("f32", "e8m0")}.get(format, ("f32",))
    if scale_format is not None:
        allowed = tuple(kind for kind in allowed if kind == scale_format)
    if seen not in allowed:
        words = {"f32": "float32", "e8m0": "E8M0 bytes (uint8 or float8_e8m0fnu)"}
        if not allowed:
            raise ValueError(
                f"QuantizedWeight: scale_format is {scale_format}; {format} has none such"
            )
        hint = (
            "; unpack the four E8M0 bytes of each int32 into rows first"
            if scales.dtype == torch.int32
            else ""
        )
        raise TypeError(
            f"QuantizedWeight: scales are {name}; {format} expects "
            f"{' or '.join(words[kind] for kind in allowed)}{hint}"
        )
    return scales


def stored_zeros(format: str, zeros: Tensor | None) -> Tensor | None:
    """uint8 for int4, nothing for the other formats."""
    if (zeros is None) == (format == "int4"):
        raise ValueError(
            f"QuantizedWeight: zeros are {'missing' if zeros is None else 'given'}; "
            f"{format} has {'a zero point for each group' if zeros is None else 'none'}"
        )
    if zeros is not None and zeros.dtype != torch.uint8:
        raise TypeError(
            f"QuantizedWeight: zeros are {str(zeros.dtype).removeprefix('torch.')}; expected uint8"
        )
    return zeros


def dtype_and_shape(tensor: Tensor) -> str:
    """ "float32 [2, 3]": a tensor as error messages show it."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
