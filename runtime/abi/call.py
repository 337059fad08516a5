"""Calls of C implementations through cffi: frames, outputs and workspace, errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import NotSupported, PluginError
from ..weights import QuantizedWeight
from . import table
from .frame import (
    TENSOR,
    Frame,
    Part,
    assumed,
    contiguous,
    described,
    give_scratch,
    take_scratch,
)

if TYPE_CHECKING:
    from ..dispatch import Facts
    from ..op import Op

_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: NotSupported, 3: MemoryError}
KEPT = 1024
"""Signatures that an implementation keeps frames of; past it all are dropped."""

Run = Callable[..., Any]
"""A function of an operator's declared arguments, all of them in order."""


class CFunction:
    """A library's implementation as a function with the operator's parameters."""

    def __init__(self, op: Op[..., Any], entry: table.Entry, library: table.Library) -> None:
        self.op, self.entry, self.library = op, entry, library
        self.__name__ = entry.name
        self._prepared: dict[Any, Run] = {}

    def __repr__(self) -> str:
        return f"<{self.op.name} of {self.library.path.name}: {self.entry.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.op._bind(*args, **kwargs))

    def _run(self, values: Sequence[Any]) -> Any:
        key = self.op._key(*values), torch.are_deterministic_algorithms_enabled()
        run = self._prepared.get(key)
        if run is None:
            if len(self._prepared) >= KEPT:
                self._prepared.clear()
            run = self._prepared[key] = self.prepared(values)
        return run(*values)

    def prepared(self, values: Sequence[Any], gradient: bool = False) -> Run:
        """A function for calls of the same key as `values`, in the same state of
        torch.use_deterministic_algorithms. Several threads may call it at once, and it itself."""
        op, impl = self.op, self.entry.pointer
        run, ask = impl.run, impl.workspace
        who, threads_now = self._text(), torch.get_num_threads
        deterministic = torch.are_deterministic_algorithms_enabled()
        on = next(v.device for v in values if isinstance(v, (Tensor, QuantizedWeight)))
        far = on.type != "cpu"
        shapes = self._outputs_of(values)
        plain, quantised, floats, count = self._addresses(values)
        allocate = [_allocator(shape, dtype, on) for shape, dtype in shapes]
        only = allocate[0] if len(allocate) == 1 else None
        written = [op._rank[name] for name in op.mutates]
        free: list[Frame] = []

        def frame_of(values: Sequence[Any]) -> Frame:
            kinds = (Tensor, QuantizedWeight)
            parts = [described(v) if isinstance(v, kinds) else v for v in values]
            outputs: list[Part] = [contiguous(shape, dtype) for shape, dtype in shapes]
            frame = Frame(op, parts, outputs, on.type, on.index or 0, deterministic)
            frame.measure(ask, on, who)
            return frame

        def call(*values: Any) -> Any:
            try:
                frame = free.pop()
            except IndexError:
                frame = frame_of(values)
            if frame.threads != threads_now():
                frame = frame_of(values)
            addresses = frame.addresses
            for i, word, signed in plain:
                value = values[i]
                if signed and value.is_neg():
                    # A view that negates when read (of a complex tensor's conjugate): C reads
                    # memory as it is.
                    return self._run([v.resolve_neg() if isinstance(v, Tensor) else v
                                      for v in values])  # fmt: skip
                addresses[word] = value.data_ptr()
            for i, name, word in quantised:
                addresses[word] = values[i]._buffers[name].data_ptr()
            for i, place in floats:
                frame.floats[place] = values[i]
            result: Any
            if only is not None:
                result = only()
                addresses[count] = result.data_ptr()
            else:
                result = tuple([make() for make in allocate])
                for i, output in enumerate(result):
                    addresses[count + TENSOR * i] = output.data_ptr()
            scratch = None
            if frame.wanted:
                scratch = take_scratch(frame.wanted, on)
                frame.call.workspace = scratch[1]
            if far:
                frame.call.stream = self._stream(on)
            code = run(frame.call, frame.status)
            if code:
                self.fail(code, frame.status.code, table.message(frame.status))
            if scratch is not None:
                give_scratch(scratch)
            frame.state[0] = 0
            free.append(frame)
            if written:
                increment_version([values[i] for i in written])
                return None
            return result

        return call

    def fail(self, code: int, status: int, text: str) -> NoReturn:
        """Raise what a failed call means: its own number, and what it wrote into the status."""
        text = text or "gives no reason"
        error = _ERRORS.get(status or code)
        if error is None:
            raise PluginError(f"{self._text()}: failed with code {status or code}: {text}")
        raise error(f"{self.op.name}: {text}")

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
                outputs.append(contiguous(shape, dtype))
        frame = Frame(self.op, values, outputs, facts.device, 0, facts.deterministic)
        if impl.supports(frame.call, frame.status) == 1:
            return None
        sentence = table.message(frame.status)
        return sentence or f"{self.library.vendor}'s library refuses it unexplained"

    def _text(self) -> str:
        return f"{self.op.name}: implementation {self.entry.name!r} of plugin {self.library.vendor}"

    def _outputs_of(self, values: Sequence[Any]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        op = self.op
        if op.mutates:
            return []
        tensors, arguments = op.tensors(values), op.arguments(values)
        bound = op.signature.bind(op.name, {n: t.shape for n, t in tensors.items()}, arguments)
        kinds = {
            n: t.format if isinstance(t, QuantizedWeight) else t.dtype for n, t in tensors.items()
        }
        return op.outputs({**arguments, **bound}, kinds)

    def _addresses(
        self, values: Sequence[Any]
    ) -> tuple[list[tuple[int, int, bool]], list[tuple[int, str, int]], list[tuple[int, int]], int]:
        """What each call writes: (argument, word, may negate) of plain tensors; (argument, buffer,
        word) of quantised weights; (argument, place) of floats; the word of the first output."""
        plain, quantised, floats = [], [], []
        word = place = 0
        for i, (p, value) in enumerate(zip(self.op.parameters, values, strict=True)):
            if isinstance(value, QuantizedWeight):
                for name in ("values", "scales", "zeros"):
                    if value._buffers[name] is not None:
                        quantised.append((i, name, word))
                        word += TENSOR
            elif isinstance(value, Tensor):
                plain.append((i, word, value.dtype.is_floating_point))
                word += TENSOR
            elif value is not None and p.type in ("float", "float?"):
                floats.append((i, 2 * place + 1))
            place += 4 if p.role == "weight" else 1
        return plain, quantised, floats, word

    def _stream(self, device: torch.device) -> Any:
        """The current stream's native handle; NULL for devices whose torch names none."""
        ffi = table.interface()
        module = getattr(torch, device.type, None)
        if module is None or not hasattr(module, "current_stream"):
            return ffi.NULL
        stream = module.current_stream(device)
        return ffi.cast("void *", int(getattr(stream, f"{device.type}_stream", 0) or 0))


def _allocator(
    shape: tuple[int, ...], dtype: torch.dtype, on: torch.device
) -> Callable[[], Tensor]:
    """A function that makes the same empty tensor each time. On the host by a prototype without
    memory: empty_like() has no arguments to parse and takes half the time of empty()."""
    if on.type != "cpu":
        return functools.partial(torch.empty, shape, dtype=dtype, device=on)
    prototype = torch.empty(shape, dtype=dtype)
    prototype.untyped_storage().resize_(0)
    return functools.partial(torch.empty_like, prototype)
