"""A call as C sees it: a transom_call with all that it points to, built anew for each call.

This is the slow road, of a Python without transom._C, and how a library is asked what it supports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..op import Op
from ..weights.layout import Part, Parts
from . import library

# torch dtype -> DLPack's code and bits (DLPack 1.1 for float8).
_DTYPES: dict[torch.dtype, tuple[int, int]] = {
    torch.float64: (2, 64),
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
    torch.int32: (0, 32),
    torch.int16: (0, 16),
    torch.int8: (0, 8),
    torch.uint8: (1, 8),
    torch.bool: (6, 8),
    torch.float8_e4m3fn: (10, 8),
}
_DEVICES = {"cpu": 1, "cuda": 10 if torch.version.hip else 2, "mps": 8, "xpu": 14}
_PRIVATE_USE = 12
_NONE, _TENSOR, _INT, _FLOAT, _BOOL, _STRING, _INTS = range(7)
TAGS = {"int": _INT, "float": _FLOAT, "bool": _BOOL, "str": _STRING, "int[]": _INTS}
DETERMINISTIC = 1
"""Flag of a call while torch.use_deterministic_algorithms is on."""
MOST_WORKSPACE = 1 << 40
"""Bytes; a library that asks for more is taken to be wrong."""


class Frame:
    """One transom_call. `values`: plain arguments as they are, tensors and weights as their Parts;
    `outputs`: the Parts of what the call writes."""

    def __init__(
        self,
        op: Op[..., Any],
        values: Sequence[Any],
        outputs: Sequence[Part],
        on: tuple[str, int],
        deterministic: bool,
    ) -> None:
        ffi = library.interface()
        arguments, tensors = _arguments(op, values)
        own = range(len(tensors), len(tensors) + len(outputs))
        self._parts = [*tensors, *outputs]
        self._tensors, keep = _tensors(self._parts, *on)
        c_args = ffi.new("transom_value[]", len(arguments) or 1)
        for argument, (tag, value) in zip(c_args, arguments, strict=False):
            argument.tag = tag
            if tag == _TENSOR:
                argument.tensor = self._tensors + value
            elif tag == _STRING:
                raw = value.encode()
                keep.append(ffi.new("char[]", raw))
                argument.string, argument.count = keep[-1], len(raw)
            elif tag == _INTS:
                keep.append(ffi.new("int64_t[]", list(value) or [0]))
                argument.ints, argument.count = keep[-1], len(value)
            elif tag == _FLOAT:
                argument.f = value
            elif tag != _NONE:
                argument.i = value
        outs = ffi.new("transom_tensor *[]", [self._tensors + i for i in own] or 1)
        self.call = call = ffi.new("transom_call *")
        call.struct_size = ffi.sizeof("transom_call")
        call.n_args, call.args = len(arguments), c_args
        call.n_outs, call.outs = len(outputs), outs
        call.flags = DETERMINISTIC if deterministic else 0
        call.threads = torch.get_num_threads()
        self.status = ffi.new("transom_status *")
        self._keep = [*keep, c_args, outs]
        self._count = len(arguments)

    def reach(self) -> None:
        """Write the addresses of the tensors, which supports() and workspace() don't see."""
        for i, (address, *_) in enumerate(self._parts):
            self._tensors[i].data = library.interface().cast("void *", address)

    def pack(self, forms: dict[int, int]) -> None:
        """Give the call packed forms of its weights: addresses, by each weight's first place."""
        ffi = library.interface()
        packed = ffi.new("void *[]", self._count or 1)
        for at, address in forms.items():
            packed[at] = ffi.cast("void *", address)
        self._keep.append(packed)
        self.call.packed = packed


def _arguments(op: Op[..., Any], values: Sequence[Any]) -> tuple[list[tuple[int, Any]], list[Part]]:
    """(tag, value) of each argument of the call, and the tensors, which arguments name by
    number."""
    arguments: list[tuple[int, Any]] = []
    tensors: list[Part] = []
    for p, value in zip(op.parameters, values, strict=True):
        if p.role == "value":
            arguments.append((_NONE if value is None else TAGS[p.type.removesuffix("?")], value))
            continue
        parts = (None,) if value is None else value
        if p.role == "weight":
            parts = (*parts, *(None,) * (4 - len(parts)))
        for part in parts:
            if part is None or isinstance(part, str):
                arguments.append((_NONE if part is None else _STRING, part))
            else:
                arguments.append((_TENSOR, len(tensors)))
                tensors.append(part)
    return arguments, tensors


def _tensors(tensors: Sequence[Part], device: str, index: int) -> tuple[Any, list[Any]]:
    """An array of transom_tensor, and what must live as long as it."""
    ffi = library.interface()
    c_tensors = ffi.new("transom_tensor[]", len(tensors) or 1)
    numbers = [n for _, shape, strides, _ in tensors for n in (*shape, *strides)]
    c_numbers = ffi.new("int64_t[]", numbers or [0])
    kind, at = _DEVICES.get(device, _PRIVATE_USE), 0
    for i, (_, shape, _, dtype) in enumerate(tensors):
        t, ndim = c_tensors[i], len(shape)
        t.device_type, t.device_id, t.ndim = kind, index, ndim
        t.dtype_code, t.dtype_bits = _DTYPES[dtype]
        t.dtype_lanes = 1
        t.shape, t.strides = c_numbers + at, c_numbers + at + ndim
        at += 2 * ndim
    return c_tensors, [c_tensors, c_numbers]


def weight_values(parts: Parts, on: torch.device) -> tuple[Any, list[Any]]:
    """The four arguments of one weight, and what must live as long as they."""
    ffi = library.interface()
    tensors = [part for part in parts if isinstance(part, tuple)]
    c_tensors, keep = _tensors(tensors, on.type, on.index or 0)
    for i, (address, *_) in enumerate(tensors):
        c_tensors[i].data = ffi.cast("void *", address)
    arguments = ffi.new("transom_value[4]")
    at = 0
    for argument, part in zip(arguments, parts, strict=False):
        if isinstance(part, str):
            keep.append(ffi.new("char[]", part.encode()))
            argument.tag, argument.string, argument.count = _STRING, keep[-1], len(part)
        elif part is not None:
            argument.tag, argument.tensor = _TENSOR, c_tensors + at
            at += 1
    return arguments, [*keep, arguments]
