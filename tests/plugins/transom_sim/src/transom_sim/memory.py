"""Tensors over the device's memory, without a line of C++: storages are made of its addresses."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import library

TO_DEVICE, FROM_DEVICE, WITHIN_DEVICE = 1, 2, 3
DEVICE = torch.device("cpu")
"""Of all tensors; `register` sets it, once torch knows its name."""
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_set = torch.ops.aten.set_.source_Storage_storage_offset


def metadata(op: Any, *args: Any, **kwargs: Any) -> Any:
    """A CPU kernel that only rewrites sizes and strides: it reads no memory, whoever's it is."""
    return op.redispatch(_CPU, *args, **kwargs)


def storage(nbytes: int) -> torch.UntypedStorage:
    """New memory, full of poison; given back when the last tensor on it dies."""
    services = library.services()
    try:
        address = services.allocate(max(nbytes, 1))
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error)) from None
    made = torch._C._construct_storage_from_data_pointer(address, DEVICE, nbytes)
    weakref.finalize(made, services.release, address).atexit = False
    return made


def set_storage(
    tensor: Tensor,
    on: torch.UntypedStorage,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """`tensor`, from now on a view of this storage."""
    return metadata(_set, tensor, on, offset, size, stride)


def contiguous(size: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    strides = [1] * len(size)
    for i in reversed(range(len(size) - 1)):
        strides[i] = strides[i + 1] * max(1, size[i + 1])
    return strides


def span(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last one of a tensor."""
    return 0 if 0 in size else sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1


def new(
    size: Sequence[int], stride: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor on the device, not initialised."""
    size = [int(n) for n in size]
    dtype = dtype or torch.get_default_dtype()
    stride = contiguous(size) if stride is None else [int(s) for s in stride]
    tensor = torch._C._acc.create_empty_tensor((0,), dtype)
    return set_storage(tensor, storage(span(size, stride) * dtype.itemsize), 0, size, stride)


def integers(values: Sequence[int]) -> Any:
    """A C array of int64."""
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def to_host(tensor: Tensor) -> Tensor:
    """A copy with the same strides; waits for the current stream."""
    size, stride, dtype = tensor.size(), tensor.stride(), tensor.dtype
    elements = span(size, stride)
    flat = torch.empty(elements, dtype=dtype)
    if elements:
        services, stream = library.services(), library.stream_handle()
        address = tensor.data_ptr()
        services.copy(flat.data_ptr(), address, flat.nbytes, FROM_DEVICE, stream=stream)
        services.synchronize(stream)
    return flat.as_strided(size, stride)


def from_host(source: Tensor, to: Tensor) -> None:
    """Enqueue the copy of a host tensor of the same shape."""
    source = source.to(to.dtype).expand(to.shape).contiguous()
    if not source.numel():
        return
    into = to if to.is_contiguous() else new(to.shape, None, to.dtype)
    stream = library.stream_handle()
    address = into.data_ptr()
    library.services().copy(address, source.data_ptr(), source.nbytes, TO_DEVICE, stream=stream)
    if into is not to:
        within(into, to)


def within(source: Tensor, to: Tensor) -> None:
    """Enqueue the copy of a device tensor of the same dtype."""
    source = source.expand(to.shape)
    if source.numel():
        library.checked(
            library.exports().sim_copy,
            to.data_ptr(),
            integers(to.stride()),
            source.data_ptr(),
            integers(source.stride()),
            to.element_size(),
            to.dim(),
            integers(to.shape),
            library.stream_handle(),
        )


def fill(tensor: Tensor, value: Any) -> None:
    """Enqueue tensor[...] = value."""
    if tensor.numel():
        one = torch.tensor(value, dtype=tensor.dtype)
        library.checked(
            library.exports().sim_fill,
            tensor.data_ptr(),
            integers(tensor.stride()),
            one.data_ptr(),
            tensor.element_size(),
            tensor.dim(),
            integers(tensor.shape),
            library.stream_handle(),
        )


# deepcopy, pickle, torch.save and torch.load work on storages, below the dispatcher --------------


def _bytes(of: torch.UntypedStorage) -> Tensor:
    """The storage as a tensor of bytes."""
    tensor = torch._C._acc.create_empty_tensor((0,), torch.uint8)
    return set_storage(tensor, of, 0, (of.nbytes(),), (1,))


def _loaded(stored: Any, location: str) -> Any:
    if not location.startswith("sim"):
        return None
    untyped = stored._untyped_storage if hasattr(stored, "_untyped_storage") else stored
    made = storage(untyped.nbytes())
    host = torch.empty(0, dtype=torch.uint8).set_(untyped)
    from_host(host, _bytes(made))
    return made


def register() -> None:
    """Take part in copying and saving storages."""
    global DEVICE
    DEVICE = torch.device("sim", 0)
    clone, cpu = torch.UntypedStorage.clone, torch.UntypedStorage.cpu

    def clone_here(self: torch.UntypedStorage) -> torch.UntypedStorage:
        if self.device.type != "sim":
            return clone(self)
        made = storage(self.nbytes())
        within(_bytes(self), _bytes(made))
        return made

    def cpu_from_here(self: torch.UntypedStorage) -> torch.UntypedStorage:
        if self.device.type != "sim":
            return cpu(self)
        return to_host(_bytes(self)).untyped_storage()

    torch.UntypedStorage.clone = clone_here  # type: ignore[method-assign]
    torch.UntypedStorage.cpu = cpu_from_here  # type: ignore[method-assign]
    torch.serialization.register_package(
        15, lambda stored: "sim:0" if stored.device.type == "sim" else None, _loaded
    )
