"""Calls of C implementations: arguments as a transom_call, outputs and workspace allocated here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NotSupported, PluginError
from ..weights import QuantizedWeight, checked_group, grid_size
from . import table

if TYPE_CHECKING:
    from ..dispatch import Facts
    from ..op import Op

# torch dtype -> DLPack's code and bits (DLPack 1.1 for float8).
_DTYPES: dict[torch.dtype, tuple[int, int]] = {
    torch.float64: (2, 64), torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16),
    torch.int64: (0, 64), torch.int32: (0, 32), torch.int16: (0, 16), torch.int8: (0, 8),
    torch.uint8: (1, 8), torch.bool: (6, 8), torch.float8_e4m3fn: (10, 8),
}  # fmt: skip
_DEVICES = {"cpu": 1, "cuda": 10 if torch.version.hip else 2, "mps": 8, "xpu": 14}
_PRIVATE_USE = 12
_NONE, _TENSOR, _INT, _FLOAT, _BOOL, _STRING, _INTS = range(7)
_TAGS = {"int": _INT, "float": _FLOAT, "bool": _BOOL, "str": _STRING, "int[]": _INTS}
_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: NotSupported, 3: MemoryError}
MOST_WORKSPACE = 1 << 40
"""Bytes; a library that asks for more is taken to be wrong."""
KEPT = 1024
"""Output shapes kept per implementation, one entry a distinct call; past it all are dropped."""

Part = tuple[int, Sequence[int], Sequence[int], torch.dtype]
"""A tensor as C sees it: address, shape, strides, dtype."""


class CFunction:
    """A library's implementation as a function with the operator's parameters."""

    def __init__(self, op: Op[..., Any], entry: table.Entry, library: table.Library) -> None:
        self.op, self.entry, self.library = op, entry, library
        self.__name__ = entry.name
        self._tags = [_TAGS.get(p.type.removesuffix("?"), _NONE) for p in op.parameters]
        self._outputs: dict[Any, list[tuple[tuple[int, ...], torch.dtype]]] = {}

    def __repr__(self) -> str:
        return f"<{self.op.name} of {self.library.path.name}: {self.entry.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ffi, impl = table.interface(), self.entry.pointer
        values = self.op._bind(*args, **kwargs)
        # A view that negates when read (of a complex tensor's conjugate): C reads memory as it is.
        values = tuple(
            v.resolve_neg() if isinstance(v, Tensor) and v.is_neg() else v for v in values
        )
        on = next(v.device for v in values if isinstance(v, (Tensor, QuantizedWeight)))
        outputs = [torch.empty(s, dtype=d, device=on) for s, d in self._outputs_of(values)]
        call, keep = self._call(
            [_parts(v) if isinstance(v, (Tensor, QuantizedWeight)) else v for v in values],
            [_part(t) for t in outputs], on.type, on.index or 0,
        )  # fmt: skip
        if impl.workspace != ffi.NULL and (wanted := impl.workspace(call)):
            if wanted > MOST_WORKSPACE:
                raise PluginError(f"{self._text()}: asks for {wanted} bytes of workspace")
            workspace = torch.empty(wanted, dtype=torch.uint8, device=on)
            call.workspace = ffi.cast("void *", workspace.data_ptr())
            call.workspace_bytes = wanted
        call.stream = ffi.cast("void *", _stream(on))
        status = ffi.new("transom_status *")
        code = impl.run(call, status)
        del keep
        if code:
            text = table.message(status) or "gives no reason"
            error = _ERRORS.get(status.code or code)
            if error is None:
                raise PluginError(f"{self._text()}: failed with code {status.code or code}: {text}")
            raise error(f"{self.op.name}: {text}")
        if self.op.mutates:
            return None
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def refusal(self, facts: Facts) -> str | None:
        """What the library's supports() says against a call of these facts."""
        ffi, impl = table.interface(), self.entry.pointer
        if impl.supports == ffi.NULL:
            return None
        values = [
            facts.arguments[p.name] if p.role == "value"
            else facts.parts.get(p.name) or assumed(self.op, p.name, facts)
            for p in self.op.parameters
        ]  # fmt: skip
        outputs: list[Part] = []
        if not self.op.mutates:
            for shape, dtype in self.op.outputs({**facts.arguments, **facts.dims}, facts.dtypes):
                outputs.append(_contiguous(shape, dtype))
        call, keep = self._call(values, outputs, facts.device, 0)
        status = ffi.new("transom_status *")
        answer = impl.supports(call, status)
        del keep
        if answer == 1:
            return None
        return table.message(status) or f"{self.library.vendor}'s library refuses it unexplained"

    def _text(self) -> str:
        return f"{self.op.name}: implementation {self.entry.name!r} of plugin {self.library.vendor}"

    def _outputs_of(self, values: tuple[Any, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        op = self.op
        if op.mutates:
            return []
        key = op._key(*values)
        found = self._outputs.get(key)
        if found is None:
            tensors, arguments = op.tensors(values), op.arguments(values)
            shapes = {n: t.shape for n, t in tensors.items()}
            bound = op.signature.bind(op.name, shapes, arguments)
            kinds = {
                n: t.format if isinstance(t, QuantizedWeight) else t.dtype
                for n, t in tensors.items()
            }
            if len(self._outputs) >= KEPT:
                self._outputs.clear()
            found = self._outputs[key] = op.outputs({**arguments, **bound}, kinds)
        return found

    def _call(
        self, values: Sequence[Any], outputs: Sequence[Part], device: str, index: int
    ) -> tuple[Any, list[Any]]:
        """The call in C, and what must live as long as it."""
        ffi = table.interface()
        places: list[tuple[int, Any]] = []
        tensors: list[Part] = []
        for p, tag, value in zip(self.op.parameters, self._tags, values, strict=True):
            if p.role == "value":
                places.append((_NONE if value is None else tag, value))
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
        tensors += outputs
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
        c_args = ffi.new("transom_value[]", len(places) or 1)
        keep = [c_tensors, c_numbers, c_args]
        for i, (tag, value) in enumerate(places):
            place = c_args[i]
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
        first = len(tensors) - len(outputs)
        own = [c_tensors + first + i for i in range(len(outputs))]
        outs = ffi.new("transom_tensor *[]", own or 1)
        call = ffi.new("transom_call *")
        call.struct_size = ffi.sizeof("transom_call")
        call.n_args, call.args = len(places), c_args
        call.n_outs, call.outs = len(outputs), outs
        call.threads = torch.get_num_threads()
        keep += [outs, call]
        return call, keep


def _part(tensor: Tensor) -> Part:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _parts(value: Tensor | QuantizedWeight) -> tuple[Part | str | None, ...]:
    if isinstance(value, Tensor):
        return (_part(value),)
    zeros = None if value.zeros is None else _part(value.zeros)
    return _part(value.values), _part(value.scales), zeros, value.spec


def described(value: Tensor | QuantizedWeight) -> tuple[Part | str | None, ...]:
    """The parts of a tensor or weight without their addresses, for Facts."""
    if isinstance(value, Tensor):
        return ((0, value.shape, value.stride(), value.dtype),)
    zeros = None if value.zeros is None else described(value.zeros)[0]
    return described(value.values)[0], described(value.scales)[0], zeros, value.spec


def assumed(op: Op[..., Any], name: str, facts: Facts) -> tuple[Part | str | None, ...] | None:
    """The parts of an argument whose facts were made without tensors (`transom explain` of shapes):
    contiguous, and in a quantised format's usual groups. None if it is not given."""
    kind = facts.dtypes.get(name)
    if kind is None:
        return None
    shape = op.signature.inputs[name].sizes({**facts.arguments, **facts.dims})
    if not isinstance(kind, str):
        return (_contiguous(shape, kind),)
    rows, columns = checked_group(kind, None)
    *lead, n, k = shape
    grid = (*lead, grid_size(n, rows), grid_size(k, columns))
    stored = (*lead, n, k // 2 if kind in ("int4", "mxfp4") else k)
    values = _contiguous(stored, torch.int8 if kind == "int8" else torch.uint8)
    scales = _contiguous(grid, torch.uint8 if kind == "mxfp4" else torch.float32)
    zeros = _contiguous(grid, torch.uint8) if kind == "int4" else None
    return values, scales, zeros, f"{kind}:{rows}x{columns}"


def _contiguous(shape: Sequence[int], dtype: torch.dtype) -> Part:
    strides = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return 0, shape, strides, dtype


def _stream(device: torch.device) -> int:
    """The current stream's native handle; 0 for the host and for devices whose torch names none."""
    if device.type == "cpu":
        return 0
    module = getattr(torch, device.type, None)
    if module is None or not hasattr(module, "current_stream"):
        return 0
    stream = module.current_stream(device)
    return int(getattr(stream, f"{device.type}_stream", 0) or 0)
