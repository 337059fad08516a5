"""A call as C sees it: a transom_call with all that it points to, built once for many calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from ..weights import QuantizedWeight, checked_group, grid_size
from . import table

if TYPE_CHECKING:
    from ..dispatch import Facts
    from ..op import Op

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
"""The schema's type of a plain argument -> the tag of its place."""
DETERMINISTIC = 1
"""TRANSOM_CALL_DETERMINISTIC."""
MOST_WORKSPACE = 1 << 40
"""Bytes; a library that asks for more is taken to be wrong."""
FRAME_WORKSPACE = 1 << 14
"""Bytes of the largest host workspace that a frame has of its own."""
KEPT_WORKSPACE = 64 << 20
"""Bytes of the largest that a thread keeps for its next call: to be given new pages costs more than
many a kernel."""

Part: TypeAlias = tuple[int, Sequence[int], Sequence[int], torch.dtype]
"""A tensor as C sees it: address, shape, strides, dtype."""
Parts: TypeAlias = tuple[Part | str | None, ...]
"""The places of a tensor (one) or of a weight (up to four: values, scales, zeros, spec)."""


class Frame:
    """The transom_call of one signature. What changes between its calls is written in place: the
    addresses of tensors, floats (0.0 and -0.0 are one key), threads, workspace and stream. Who
    calls has it to himself meanwhile."""

    __slots__ = (
        "addresses",
        "call",
        "floats",
        "forms",
        "keep",
        "own",
        "packed",
        "state",
        "status",
        "threads",
        "wanted",
    )

    def __init__(
        self,
        op: Op[..., Any],
        values: Sequence[Any],
        outputs: Sequence[Part],
        device: str,
        index: int,
        deterministic: bool,
    ) -> None:
        """`values`: plain arguments as they are, tensors and weights as their Parts."""
        ffi = table.interface()
        places, tensors = _places(op, values)
        own = range(len(tensors), len(tensors) + len(outputs))
        c_tensors, keep = _tensors([*tensors, *outputs], device, index)
        c_args = ffi.new("transom_value[]", len(places) or 1)
        for place, (tag, value) in zip(c_args, places, strict=False):
            place.tag = tag
            if tag == _TENSOR:
                place.tensor = c_tensors + value
            elif tag == _STRING:
                raw = value.encode()
                keep.append(ffi.new("char[]", raw))
                place.string, place.count = keep[-1], len(raw)
            elif tag == _INTS:
                keep.append(ffi.new("int64_t[]", list(value) or [0]))
                place.ints, place.count = keep[-1], len(value)
            elif tag == _FLOAT:
                place.f = value
            elif tag != _NONE:
                place.i = value
        outs = ffi.new("transom_tensor *[]", [c_tensors + i for i in own] or 1)
        self.packed = ffi.new("void *[]", len(places) or 1)
        """What call.packed may point to."""
        self.forms = memoryview(ffi.buffer(self.packed)).cast("B").cast("Q")
        self.call = call = ffi.new("transom_call *")
        call.struct_size = ffi.sizeof("transom_call")
        call.n_args, call.args = len(places), c_args
        call.n_outs, call.outs = len(outputs), outs
        call.flags = DETERMINISTIC if deterministic else 0
        call.threads = self.threads = torch.get_num_threads()
        self.status = ffi.new("transom_status *")
        self.keep = [*keep, c_args, outs]
        # A tenth of the time that pointers take through cffi.
        self.addresses = memoryview(ffi.buffer(c_tensors)).cast("B").cast("Q")
        """Of tensor i at TENSOR * i."""
        self.floats = memoryview(ffi.buffer(c_args)).cast("B").cast("d")
        """Of place i at 2 * i + 1."""
        self.state = memoryview(ffi.buffer(self.status)).cast("B").cast("Q")
        """Zero in the first, and the status says nothing."""
        self.wanted = 0
        """Bytes of workspace that the call must bring."""
        self.own: Scratch | None = None

    def measure(self, workspace: Any, on: torch.device, greedy: Callable[[int], NoReturn]) -> None:
        """Ask the library for the size of its workspace, before any address is written."""
        ffi, call = table.interface(), self.call
        self.wanted = workspace(call) if workspace != ffi.NULL else 0
        if self.wanted > MOST_WORKSPACE:
            greedy(self.wanted)
        call.workspace_bytes = self.wanted
        if 0 < self.wanted <= FRAME_WORKSPACE and on.type == "cpu":
            self.own = new_scratch(self.wanted, on)
            call.workspace, self.wanted = self.own[1], 0


TENSOR = 6
"""Words of a transom_tensor."""


def _places(op: Op[..., Any], values: Sequence[Any]) -> tuple[list[tuple[int, Any]], list[Part]]:
    """(tag, value) of each place, and the tensors, which places name by number."""
    places: list[tuple[int, Any]] = []
    tensors: list[Part] = []
    for p, value in zip(op.parameters, values, strict=True):
        if p.role == "value":
            places.append((_NONE if value is None else TAGS[p.type.removesuffix("?")], value))
            continue
        parts = (None,) if value is None else value
        if p.role == "weight":
            parts = (*parts, *(None,) * (4 - len(parts)))
        for part in parts:
            if part is None or isinstance(part, str):
                places.append((_NONE if part is None else _STRING, part))
            else:
                places.append((_TENSOR, len(tensors)))
                tensors.append(part)
    return places, tensors


def _tensors(tensors: Sequence[Part], device: str, index: int) -> tuple[Any, list[Any]]:
    """An array of transom_tensor, and what must live as long as it."""
    ffi = table.interface()
    c_tensors = ffi.new("transom_tensor[]", len(tensors) or 1)
    numbers = [n for _, shape, strides, _ in tensors for n in (*shape, *strides)]
    c_numbers = ffi.new("int64_t[]", numbers or [0])
    kind, at = _DEVICES.get(device, _PRIVATE_USE), 0
    for i, (address, shape, _, dtype) in enumerate(tensors):
        t, ndim = c_tensors[i], len(shape)
        t.data = ffi.cast("void *", address)
        t.device_type, t.device_id, t.ndim = kind, index, ndim
        t.dtype_code, t.dtype_bits = _DTYPES[dtype]
        t.dtype_lanes = 1
        t.shape, t.strides = c_numbers + at, c_numbers + at + ndim
        at += 2 * ndim
    return c_tensors, [c_tensors, c_numbers]


def weight_values(parts: Parts, on: torch.device) -> tuple[Any, list[Any]]:
    """The four places of one weight, and what must live as long as they."""
    ffi = table.interface()
    tensors = [part for part in parts if isinstance(part, tuple)]
    c_tensors, keep = _tensors(tensors, on.type, on.index or 0)
    places = ffi.new("transom_value[4]")
    at = 0
    for place, part in zip(places, parts, strict=False):
        if isinstance(part, str):
            keep.append(ffi.new("char[]", part.encode()))
            place.tag, place.string, place.count = _STRING, keep[-1], len(part)
        elif part is not None:
            place.tag, place.tensor = _TENSOR, c_tensors + at
            at += 1
    return places, [*keep, places]


# Tensors as Parts ------------------------------------------------------------------------------


def _part(tensor: Tensor, address: int) -> Part:
    return address, tensor.shape, tensor.stride(), tensor.dtype


def addressed(value: Tensor | QuantizedWeight) -> Parts:
    """The parts of a tensor or weight with their addresses."""
    if isinstance(value, Tensor):
        return (_part(value, value.data_ptr()),)
    zeros = None if value.zeros is None else _part(value.zeros, value.zeros.data_ptr())
    values, scales = value.values, value.scales
    return _part(values, values.data_ptr()), _part(scales, scales.data_ptr()), zeros, value.spec


def described(value: Tensor | QuantizedWeight) -> Parts:
    """The parts of a tensor or weight without their addresses, for Facts."""
    if isinstance(value, Tensor):
        return (_part(value, 0),)
    zeros = None if value.zeros is None else _part(value.zeros, 0)
    return _part(value.values, 0), _part(value.scales, 0), zeros, value.spec


def assumed(op: Op[..., Any], name: str, facts: Facts) -> Parts | None:
    """The parts of an argument whose facts were made without tensors (`transom explain` of shapes):
    contiguous, and in a quantised format's usual groups. None if it is not given."""
    kind = facts.dtypes.get(name)
    if kind is None:
        return None
    shape = op.signature.inputs[name].sizes({**facts.arguments, **facts.dims})
    if not isinstance(kind, str):
        return (contiguous(shape, kind),)
    rows, columns = checked_group(kind, None)
    *lead, n, k = shape
    grid = (*lead, grid_size(n, rows), grid_size(k, columns))
    stored = (*lead, n, k // 2 if kind in ("int4", "mxfp4") else k)
    values = contiguous(stored, torch.int8 if kind == "int8" else torch.uint8)
    scales = contiguous(grid, torch.uint8 if kind == "mxfp4" else torch.float32)
    zeros = contiguous(grid, torch.uint8) if kind == "int4" else None
    return values, scales, zeros, f"{kind}:{rows}x{columns}"


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Part:
    """A tensor of this shape, contiguous, without an address."""
    strides = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return 0, shape, strides, dtype


# Workspace -------------------------------------------------------------------------------------

Scratch: TypeAlias = tuple[int, Any, Tensor]
"""Bytes, address as C has it, and the tensor that owns them."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.one: list[Scratch] = []


_kept = _Kept()


def take_scratch(wanted: int, on: torch.device) -> Scratch:
    """At least `wanted` bytes on `on`, those of this thread's last call if they will do."""
    if on.type == "cpu":
        try:
            scratch = _kept.one.pop()
            if scratch[0] >= wanted:
                return scratch
        except IndexError:
            pass
    return new_scratch(wanted, on)


def new_scratch(wanted: int, on: torch.device) -> Scratch:
    """New memory of `wanted` bytes on `on`."""
    tensor = torch.empty(wanted, dtype=torch.uint8, device=on)
    return wanted, table.interface().cast("void *", tensor.data_ptr()), tensor


def give_scratch(scratch: Scratch) -> None:
    """Keep them for this thread's next call, if they are few and the host's."""
    if scratch[0] <= KEPT_WORKSPACE and scratch[2].is_cpu and not _kept.one:
        _kept.one.append(scratch)
