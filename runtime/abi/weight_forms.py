"""Forms of weights that a library's kernels would rather read: packed once, kept until changed."""

from __future__ import annotations

import threading
import weakref
from typing import Any, NoReturn, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import device as _device
from ..weights import QuantizedWeight
from ..weights.layout import addressed, described, parts
from . import library
from .frame import MOST_WORKSPACE, weight_values
from .library import Entry

State: TypeAlias = tuple[tuple[int, int, int, torch.Size, tuple[int, ...]], ...]
"""What a weight's tensors are recognised by: storage, address, version, shape, strides of each."""
SAMPLES = 256
"""Numbers of a tensor that are looked at, spread evenly over it."""


class Packer(Protocol):
    """The implementation whose weights are packed."""

    @property
    def entry(self) -> Entry: ...

    def stream(self, on: torch.device) -> int: ...

    def fail(self, code: int, status: int, raw: bytes) -> NoReturn: ...

    def greedy(self, wanted: int, what: str = ...) -> NoReturn: ...


class _Seen:
    """A weight that a call has brought: in which state, and its packed form in that state."""

    __slots__ = ("form", "samples", "state", "storages", "weight")

    def __init__(self, weight: weakref.ref[Tensor], held: tuple[Tensor, ...], state: State):
        self.weight, self.state = weight, state
        # While these live no other storage is at their address; they do not keep its memory.
        self.storages = [StorageWeakRef(part.untyped_storage()) for part in held]
        self.samples = [_sample(part).clone() for part in held if part.is_cpu]
        self.form: Tensor | None = None

    def written(self, held: tuple[Tensor, ...]) -> bool:
        """True if a sample of the weight is another number than it was. On a device nothing is
        looked at: it would wait for the device at every call."""
        return not all(
            torch.equal(_sample(part), was)
            for part, was in zip(held, self.samples, strict=False)
            if part.is_cpu
        )


def _sample(part: Tensor) -> Tensor:
    """Some of the tensor's numbers as bits, spread evenly over it."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
    count = part.numel()
    if part.is_contiguous():
        return part.detach().view(bits).view(-1)[:: max(1, count // SAMPLES)]
    at = torch.arange(0, count, max(1, count // SAMPLES), device=part.device)
    return part.detach()[torch.unravel_index(at, part.shape)].view(bits)


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
    or is differentiated. A weight for which `budget` has no room when it is to be packed stays as
    it is.

    A change is seen by torch's version counter, by address and storage, and, since writing through
    `.data` or NumPy counts nowhere, by SAMPLES numbers of each tensor on the host that are compared
    at every call. Tensors made under inference_mode, which have no version, are not packed. What
    stays unseen is a write through `.data` or NumPy that touches none of the samples (a stretch of
    less than one part in SAMPLES of the tensor), and any such write on a device. Reading every byte
    to find it would cost what the product costs.
    """

    def __init__(self, packer: Packer, services: Any, budget: Budget | None = None) -> None:
        self.packer, self.services, self.budget = packer, services, budget
        self._seen: dict[tuple[int, int], _Seen] = {}

    def form(self, at: int, weight: Tensor | QuantizedWeight) -> Tensor | None:
        """The packed form of the weight in place `at`, or None: run() takes it as it is."""
        held = _parts(weight)
        if any(part.is_inference() for part in held):
            return None
        state, key = _state(held), (at, id(held[0]))
        seen = self._seen.get(key)
        if (
            seen is None
            or seen.weight() is not held[0]
            or seen.state != state
            or seen.written(held)
        ):
            forget = self._seen.pop
            gone = weakref.ref(held[0], lambda _: forget(key, None))
            self._seen[key] = _Seen(gone, held, state)
            return None
        if seen.form is None:
            seen.form = self._pack(at, weight)
        return seen.form if seen.form.numel() else None

    def forget(self, at: int, weight: Tensor | QuantizedWeight) -> None:
        """Drop what is known of a weight: it is about to change."""
        self._seen.pop((at, id(_parts(weight)[0])), None)

    def _pack(self, at: int, weight: Tensor | QuantizedWeight) -> Tensor:
        """The packed form; empty if the library wants none of this weight, or none may be kept."""
        ffi, services, impl = library.interface(), self.services, self.packer.entry.pointer
        on = weight.device
        values, keep = weight_values(described(weight), on)  # data is NULL
        wanted = services.packed_bytes(impl, at, values)
        if wanted > MOST_WORKSPACE:
            self.packer.greedy(wanted, "a packed weight")
        if self.budget is None:
            form = torch.empty(wanted, dtype=torch.uint8, device=on)
        else:
            form = self.budget.form(wanted, on)
        if form.numel():
            status = ffi.new("transom_status *")
            stream = ffi.cast("void *", self.packer.stream(on))
            values, keep = weight_values(addressed(weight), on)
            into = ffi.cast("void *", form.data_ptr())
            code = services.pack(impl, at, values, into, stream, status)
            del keep
            if code:
                self.packer.fail(code, status.code, ffi.buffer(status.message)[:])
            # Later calls may come on other streams.
            _device.synchronize(on)
            if stream and services.synchronize:
                services.synchronize(on.index or 0, stream, status)
        return form


def _parts(weight: Tensor | QuantizedWeight) -> tuple[Tensor, ...]:
    if isinstance(weight, Tensor):
        return (weight,)
    return tuple(part for part in parts(weight)[:3] if part is not None)


def _state(parts: tuple[Tensor, ...]) -> State:
    return tuple(
        (part.untyped_storage()._cdata, part.data_ptr(), part._version, part.shape, part.stride())
        for part in parts
    )
