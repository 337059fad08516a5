"""torch's own operators: 16 of them move data or metadata here; the others go round by the CPU,
which is counted."""

from __future__ import annotations

import collections
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import library, memory

MODES = ("count", "warn", "error")
fallbacks: collections.Counter[str] = collections.Counter()
"""How often each operator went round by the CPU."""
_METADATA = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "set_.source_Storage_storage_offset",
    "set_.source_Storage",
)
_kept: list[torch.library.Library] = []


def mode() -> str:
    """TRANSOM_SIM_FALLBACK: 'count', 'warn' at each operator's first time, or 'error'."""
    chosen = os.environ.get("TRANSOM_SIM_FALLBACK", "count")
    if chosen not in MODES:
        raise ValueError(f"TRANSOM_SIM_FALLBACK is {chosen!r}; expected one of {', '.join(MODES)}")
    return chosen


def register() -> None:
    """Register everything under the key PrivateUse1."""
    aten = torch.library.Library("aten", "IMPL")
    for name, function in _KERNELS.items():
        aten.impl(name, function, "PrivateUse1")
    for name in _METADATA:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, _metadata(op), "PrivateUse1")
    rest = torch.library.Library("_", "IMPL")
    # No casting rules of its own: without this every call under autocast would raise.
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    rest.fallback(by_the_cpu, "PrivateUse1")
    _kept.extend((aten, rest))


def _metadata(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: memory.metadata(op, *args, **kwargs)


# Kernels ---------------------------------------------------------------------------------------


def _empty(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    if memory_format in (torch.channels_last, torch.channels_last_3d):
        like = torch.empty(size, device="meta", memory_format=memory_format)
        return memory.new(size, like.stride(), dtype)
    return memory.new(size, None, dtype)


def _empty_strided(
    size: Any,
    stride: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
) -> Tensor:
    return memory.new(size, stride, dtype)


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    """Where copy_, to, clone, cpu and many more end: one of both is on the device."""
    if to.device.type == "cpu":
        to.copy_(memory.to_host(source))
    elif source.device.type == "cpu":
        memory.from_host(source, to)
    elif source.dtype == to.dtype:
        memory.within(source, to)
    else:
        fallbacks["aten::_copy_from (dtype)"] += 1
        memory.from_host(memory.to_host(source), to)
    return to


def _copy_from_and_resize(source: Tensor, to: Tensor) -> Tensor:
    return _copy_from(source, to.resize_(source.shape))


def _fill(self: Tensor, value: Any) -> Tensor:
    memory.fill(self, value.item() if isinstance(value, Tensor) else value)
    return self


def _zero(self: Tensor) -> Tensor:
    return _fill(self, 0)


def _item(self: Tensor) -> Any:
    return memory.to_host(self).item()


def _resize(self: Tensor, size: Any, memory_format: Any = None) -> Tensor:
    size = list(size)
    strides, here = memory.contiguous(size), self.untyped_storage()
    offset, each = self.storage_offset(), self.element_size()
    if (memory.span(size, strides) + offset) * each <= here.nbytes():
        return memory.set_storage(self, here, offset, size, strides)
    grown = memory.new(size, strides, self.dtype)
    old = self.as_strided((min(grown.numel(), here.nbytes() // each - offset),), (1,))
    memory.within(old, grown.as_strided(old.shape, (1,)))
    return memory.set_storage(self, grown.untyped_storage(), 0, size, strides)


def _record_stream(self: Tensor, stream: Any) -> None:
    number = getattr(stream, "number", stream.stream_id)
    library.exports().sim_hold(self.untyped_storage().data_ptr(), number)


_KERNELS: dict[str, Callable[..., Any]] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": _copy_from,
    "_copy_from_and_resize": _copy_from_and_resize,
    "fill_.Scalar": _fill,
    "fill_.Tensor": _fill,
    "zero_": _zero,
    "_local_scalar_dense": _item,
    "resize_": _resize,
    "record_stream": _record_stream,
}


# The rest --------------------------------------------------------------------------------------


def by_the_cpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Copy the arguments to the host, run the operator there, copy back what it made or wrote."""
    name, how = op._schema.name, mode()
    if how == "error":
        raise NotImplementedError(f"{name} has no kernel on 'sim'; TRANSOM_SIM_FALLBACK is 'error'")
    if _is_view(op):
        raise NotImplementedError(f"{name} makes a view; 'sim' cannot make one by the CPU")
    if how == "warn" and not fallbacks[name]:
        warnings.warn(f"{name} runs on the CPU for device 'sim'", stacklevel=2)
    fallbacks[name] += 1
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # of each tensor here: itself and its copy

    def down(value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "sim":
            if id(value) not in copies:
                copies[id(value)] = value, memory.to_host(value)
            return copies[id(value)][1]
        if isinstance(value, torch.device) and value.type == "sim":
            return torch.device("cpu")
        return value

    args = _numbers(op, args)
    result = op(*pytree.tree_map(down, args), **pytree.tree_map(down, kwargs))
    mine: dict[int, Tensor] = {}  # of each copy that was written: the tensor here
    for written in _written(op, args, kwargs):
        if id(written) in copies:
            here, copy = copies[id(written)]
            if here.shape != copy.shape:
                here.resize_(copy.shape)
            memory.from_host(copy, here)
            mine[id(copy)] = here

    def up(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return mine[id(value)] if id(value) in mine else value.to("sim")

    return pytree.tree_map(up, result)


def _numbers(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with numbers that came as tensors (x & 1) made tensors again."""
    kinds = (str(argument.type) for argument in op._schema.arguments)
    return tuple(
        torch.tensor(value) if kind == "Tensor" and not isinstance(value, Tensor) else value
        for value, kind in zip(args, kinds)
    )


def _is_view(op: Any) -> bool:
    """True if a result shares the memory of an argument that is not written."""
    results = (r.alias_info for r in op._schema.returns)
    return any(alias is not None and not alias.is_write for alias in results)


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the schema says are written."""
    out: list[Any] = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            by_place = i < len(args) and not argument.kwarg_only
            out += pytree.tree_leaves(args[i] if by_place else kwargs.get(argument.name))
    return out
