"""A plugin's services: memory, copies and streams of its device, and packed forms of weights."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import device as _device
from ..errors import PluginError
from ..weights import QuantizedWeight
from . import table
from .frame import MOST_WORKSPACE, addressed, described, weight_values

if TYPE_CHECKING:
    from .call import CFunction

TO_DEVICE, FROM_DEVICE, WITHIN_DEVICE = 1, 2, 3
"""Directions of a copy."""


class Services:
    """The services of a library as functions, for the Python that mounts a device on torch.

    Addresses and streams are numbers; stream 0 means: done on return. A service that the library
    lacks, or that fails, raises PluginError (MemoryError if the device's memory is exhausted).
    """

    def __init__(self, vendor: str, pointer: Any) -> None:
        self._vendor, self._table = vendor, pointer

    def has(self, service: str) -> bool:
        """True if the library offers it."""
        return bool(getattr(self._table, service))

    def allocate(self, bytes: int, device: int = 0) -> int:
        """The address of `bytes` > 0 of the device's memory, 64-byte aligned."""
        status = table.interface().new("transom_status *")
        address = int(self._number(self._get("allocate")(device, bytes, status)))
        if not address:
            text = table.message(status) or f"no {bytes} bytes on device {device}"
            raise MemoryError(f"plugin {self._vendor}: {text}")
        return address

    def release(self, address: int, device: int = 0) -> None:
        """Give back what allocate() answered."""
        self._run("release", device, self._pointer(address))

    def copy(
        self, to: int, source: int, bytes: int, direction: int, *, stream: int = 0, device: int = 0
    ) -> None:
        """Enqueue a copy; `direction` is TO_DEVICE, FROM_DEVICE or WITHIN_DEVICE."""
        ends = self._pointer(to), self._pointer(source)
        self._run("copy", device, *ends, bytes, direction, self._pointer(stream))

    def synchronize(self, stream: int = 0, device: int = 0) -> None:
        """Wait for what is enqueued on `stream`; 0: on every stream of the device."""
        self._run("synchronize", device, self._pointer(stream))

    def stream(self, device: int = 0) -> int:
        """The stream that this thread's work goes to."""
        return self._number(self._get("stream")(device))

    def _run(self, service: str, *args: Any) -> None:
        status = table.interface().new("transom_status *")
        code = self._get(service)(*args, status)
        if code:
            text = table.message(status) or "gives no reason"
            error = MemoryError if (status.code or code) == 3 else PluginError
            raise error(f"plugin {self._vendor}: {service} failed with code {code}: {text}")

    def _get(self, service: str) -> Any:
        function = getattr(self._table, service)
        if not function:
            raise PluginError(f"plugin {self._vendor}: has no service {service}")
        return function

    @staticmethod
    def _pointer(address: int) -> Any:
        return table.interface().cast("void *", address)

    @staticmethod
    def _number(pointer: Any) -> int:
        return int(table.interface().cast("uintptr_t", pointer))


State: TypeAlias = tuple[tuple[int, int, int, torch.Size, tuple[int, ...]], ...]
"""What a weight's tensors are recognised by: storage, address, version, shape, strides of each."""


class _Seen:
    """A weight that a call has brought: in which state, and its packed form in that state."""

    __slots__ = ("form", "state", "storages", "weight")

    def __init__(self, weight: weakref.ref[Tensor], parts: tuple[Tensor, ...], state: State):
        self.weight, self.state = weight, state
        # While these live no other storage is at their address; they do not keep its memory.
        self.storages = [StorageWeakRef(part.untyped_storage()) for part in parts]
        self.form: Tensor | None = None


class Budget:
    """The memory that the packed forms of a library's weights may take together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """Bytes."""
        self._lock = threading.Lock()
        self._forms: list[weakref.ref[Tensor]] = []

    def form(self, size: int, on: torch.device) -> Tensor:
        """Memory for a form; empty if that much is not left."""
        with self._lock:
            forms = [form for each in self._forms if (form := each()) is not None]
            left = self.limit - sum(form.numel() for form in forms)
            made = torch.empty(size if size <= left else 0, dtype=torch.uint8, device=on)
            self._forms = [weakref.ref(form) for form in (*forms, made)]
        return made


class Packed:
    """The packed forms of the weights of one implementation.

    A weight is packed when a call brings it for the second time unchanged, so that neither weights
    that are made for one call nor weights in training are; its form lives as long as the weight
    (as the tensor of its values, for a quantised one) and is dropped when a call finds it changed
    or is differentiated. Changes are seen by torch's version counter, address and storage: writing
    through `.data` or NumPy is not, and tensors made under inference_mode, which have no version,
    are not packed. A weight for which `budget` has no room when it is to be packed stays as it is.
    """

    def __init__(self, function: CFunction, services: Any, budget: Budget | None = None) -> None:
        self.function, self.services, self.budget = function, services, budget
        self._seen: dict[tuple[int, int], _Seen] = {}

    def form(self, at: int, weight: Tensor | QuantizedWeight) -> Tensor | None:
        """The packed form of the weight in place `at`, or None: run() takes it as it is."""
        parts = _parts(weight)
        if any(part.is_inference() for part in parts):
            return None
        state, key = _state(parts), (at, id(parts[0]))
        seen = self._seen.get(key)
        if seen is None or seen.weight() is not parts[0] or seen.state != state:
            forget = self._seen.pop
            gone = weakref.ref(parts[0], lambda _: forget(key, None))
            self._seen[key] = _Seen(gone, parts, state)
            return None
        if seen.form is None:
            seen.form = self._pack(at, weight)
        return seen.form if seen.form.numel() else None

    def forget(self, at: int, weight: Tensor | QuantizedWeight) -> None:
        """Drop what is known of a weight: it is about to change."""
        self._seen.pop((at, id(_parts(weight)[0])), None)

    def _pack(self, at: int, weight: Tensor | QuantizedWeight) -> Tensor:
        """The packed form; empty if the library wants none of this weight, or none may be kept."""
        ffi, services, impl = table.interface(), self.services, self.function.entry.pointer
        on = weight.device
        values, keep = weight_values(described(weight), on)  # data is NULL
        wanted = services.packed_bytes(impl, at, values)
        if wanted > MOST_WORKSPACE:
            self.function.greedy(wanted, "a packed weight")
        if self.budget is None:
            form = torch.empty(wanted, dtype=torch.uint8, device=on)
        else:
            form = self.budget.form(wanted, on)
        if form.numel():
            status = ffi.new("transom_status *")
            stream = ffi.cast("void *", self.function.stream(on))
            values, keep = weight_values(addressed(weight), on)
            into = ffi.cast("void *", form.data_ptr())
            code = services.pack(impl, at, values, into, stream, status)
            del keep
            if code:
                self.function.fail(code, status.code, table.message(status))
            # Later calls may come on other streams.
            _device.synchronize(on)
            if stream and services.synchronize:
                services.synchronize(on.index or 0, stream, status)
        return form


def _parts(weight: Tensor | QuantizedWeight) -> tuple[Tensor, ...]:
    if isinstance(weight, Tensor):
        return (weight,)
    buffers = weight._buffers
    return tuple(
        part for name in ("values", "scales", "zeros") if (part := buffers[name]) is not None
    )


def _state(parts: tuple[Tensor, ...]) -> State:
    return tuple(
        (part.untyped_storage()._cdata, part.data_ptr(), part._version, part.shape, part.stride())
        for part in parts
    )
