"""Calls of C implementations: outputs and workspace, errors; through the extension or cffi."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import NotSupported, PluginError
from ..weights import QuantizedWeight
from . import kept_memory, road, table
from .frame import (
    TAGS,
    TENSOR,
    Frame,
    Part,
    assumed,
    contiguous,
    described,
    give_scratch,
    take_scratch,
)
from .services import Packed

if TYPE_CHECKING:
    from ..dispatch import Facts
    from ..op import Op

_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: NotSupported, 3: MemoryError}
KEPT = 1024
"""Signatures that an implementation keeps frames of; past it all are dropped."""

Run: TypeAlias = Callable[..., Any]
"""A function of an operator's declared arguments, all of them in order."""
Maker: TypeAlias = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any] | None]
"""A function, its arguments and keywords."""


class CFunction:
    """A library's implementation as a function with the operator's parameters."""

    def __init__(self, op: Op[..., Any], entry: table.Entry, library: table.Library) -> None:
        self.op, self.entry, self.library = op, entry, library
        self.__name__ = entry.name
        self._prepared: dict[Any, Run] = {}
        self._bound: dict[bool, Run] = {}
        services = library.services
        budget = library.budget
        allowed = budget is None or budget.limit > 0
        packs = allowed and services is not None and services.packed_bytes and services.pack
        self.packed = Packed(self, services, budget) if packs else None
        """Of weights; None where the library packs none, or may not."""

    def __repr__(self) -> str:
        return f"<{self.op.name} of {self.library.path.name}: {self.entry.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.op._bind(*args, **kwargs))

    def _run(self, values: Sequence[Any]) -> Any:
        if road.extension() is not None:
            return self.through_extension()(*values)
        key = self.op._key(*values), torch.are_deterministic_algorithms_enabled()
        run = self._prepared.get(key)
        if run is None:
            if len(self._prepared) >= KEPT:
                self._prepared.clear()
            run = self._prepared[key] = self.prepared(values)
        return run(*values)

    def prepared(self, values: Sequence[Any], gradient: bool = False) -> Run:
        """A function for calls of the same key as `values`, in the same state of
        torch.use_deterministic_algorithms. Several threads may call it at once, and it itself.

        gradient   the call is differentiated: its weights are about to change
        """
        if road.extension() is None:
            return self.through_cffi(values, gradient)
        return self.through_extension(gradient)

    def through_extension(self, gradient: bool = False) -> Run:
        """The function that transom._C makes; it serves every signature."""
        if gradient not in self._bound:
            self._bound[gradient] = self._bind(gradient)
        return self._bound[gradient]

    def _bind(self, gradient: bool) -> Run:
        op, extension = self.op, road.extension()
        kinds = {"tensor": extension.TENSOR, "weight": extension.WEIGHT}
        parameters = [
            (p.name, kinds.get(p.role) or TAGS[p.type.removesuffix("?")], p.type.endswith("?"))
            for p in op.parameters
        ]

        def fail(code: int, status: int, raw: bytes) -> NoReturn:
            self.fail(code, status, table.one_line(raw))

        address = int(table.interface().cast("uintptr_t", self.entry.pointer))
        call: Run = extension.bind(
            address,
            op.name,
            parameters,
            self._makers_of,
            fail,
            self.greedy,
            self._far,
            self._look(gradient),
            [op._rank[name] for name in op.mutates],
        )
        return call

    def _makers_of(self, values: Sequence[Any]) -> tuple[Maker, ...]:
        on = _device_of(values)
        return tuple(self.maker(shape, dtype, on) for shape, dtype in self._outputs_of(values))

    def _far(self, on: torch.device, wanted: int) -> tuple[int, Tensor | None]:
        workspace = torch.empty(wanted, dtype=torch.uint8, device=on) if wanted else None
        return self.stream(on), workspace

    def _look(self, gradient: bool) -> Callable[[int, Any], Tensor | None] | None:
        """What a call asks for the packed form of each of its weights."""
        if self.packed is None:
            return None
        return self.packed.forget if gradient else self.packed.form

    def through_cffi(self, values: Sequence[Any], gradient: bool = False) -> Run:
        """The same in Python, for this signature: its structs are built once, in frames."""
        op, impl = self.op, self.entry.pointer
        run, ask = impl.run, impl.workspace
        threads_now = torch.get_num_threads
        deterministic = torch.are_deterministic_algorithms_enabled()
        on = _device_of(values)
        far = on.type != "cpu"
        shapes = self._outputs_of(values)
        plain, quantised, floats, count = self._addresses(values)
        made = [self.maker(shape, dtype, on) for shape, dtype in shapes]
        makers = [functools.partial(make, *args, **(more or {})) for make, args, more in made]
        only = makers[0] if len(makers) == 1 else None
        written = [op._rank[name] for name in op.mutates]
        look = self._look(gradient)
        weights = self._weights(values) if look else []
        free: list[Frame] = []

        def frame_of(values: Sequence[Any]) -> Frame:
            kinds = (Tensor, QuantizedWeight)
            parts = [described(v) if isinstance(v, kinds) else v for v in values]
            outputs: list[Part] = [contiguous(shape, dtype) for shape, dtype in shapes]
            frame = Frame(op, parts, outputs, on.type, on.index or 0, deterministic)
            frame.measure(ask, on, self.greedy)
            if weights:
                frame.call.packed = frame.packed
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
                    return self._run(
                        [v.resolve_neg() if isinstance(v, Tensor) else v for v in values]
                    )
                addresses[word] = value.data_ptr()
            held = []
            for i, name, word in quantised:
                held.append(part := values[i]._buffers[name])
                addresses[word] = part.data_ptr()
            for i, place in weights:
                form = look(place, values[i])  # type: ignore[misc]
                frame.forms[place] = 0 if form is None else form.data_ptr()
                held.append(form)
            for i, place in floats:
                frame.floats[place] = values[i]
            result: Any
            if only is not None:
                result = only()
                addresses[count] = result.data_ptr()
            else:
                result = tuple([make() for make in makers])
                for i, output in enumerate(result):
                    addresses[count + TENSOR * i] = output.data_ptr()
            scratch = None
            if frame.wanted:
                scratch = take_scratch(frame.wanted, on)
                frame.call.workspace = scratch[1]
            if far:
                frame.call.stream = table.interface().cast("void *", self.stream(on))
            if written:  # before they are: Ctrl-C during the call is raised by what follows it
                increment_version([values[i] for i in written])
            code = run(frame.call, frame.status)
            if code:
                self.fail(code, frame.status.code, table.message(frame.status))
            if scratch is not None:
                give_scratch(scratch)
            frame.state[0] = 0
            free.append(frame)
            return None if written else result

        return call

    def fail(self, code: int, status: int, text: str) -> NoReturn:
        """Raise what a failed call means: its own number, and what it wrote into the status."""
        text = text or "gives no reason"
        error = _ERRORS.get(status or code)
        if error is None:
            raise PluginError(f"{self._text()}: failed with code {status or code}: {text}")
        raise error(f"{self.op.name}: {text}")

    def greedy(self, wanted: int, what: str = "workspace") -> NoReturn:
        """Refuse that many bytes."""
        raise PluginError(f"{self._text()}: asks for {wanted} bytes of {what}")

    def refusal(self, facts: Facts) -> str | None:
        """What the library's supports() says against a call of these facts."""
        ffi, impl = table.interface(), self.entry.pointer
        if impl.supports == ffi.NULL:
            return None
        values = [
            facts.arguments[p.name]
            if p.role == "value"
            else facts.parts.get(p.name) or assumed(self.op, p.name, facts)
            for p in self.op.parameters
        ]
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

    def _weights(self, values: Sequence[Any]) -> list[tuple[int, int]]:
        """(argument, first place) of each weight that is given."""
        found, place = [], 0
        for i, (p, value) in enumerate(zip(self.op.parameters, values, strict=True)):
            if p.role == "weight" and value is not None:
                found.append((i, place))
            place += 4 if p.role == "weight" else 1
        return found

    def maker(self, shape: tuple[int, ...], dtype: torch.dtype, on: torch.device) -> Maker:
        """What makes an output: the same empty tensor each time. On the host from a prototype
        without memory: empty_like() parses no arguments and takes half the time of empty(); a large
        one in memory that is kept."""
        if on.type != "cpu":
            return torch.empty, (shape,), {"dtype": dtype, "device": on}
        if kept_memory.worth(prod(shape) * dtype.itemsize):
            return kept_memory.empty, (shape, dtype), None
        prototype = torch.empty(shape, dtype=dtype)
        prototype.untyped_storage().resize_(0)
        return torch.empty_like, (prototype,), None

    def stream(self, on: torch.device) -> int:
        """The current stream's native handle: torch's, else that of the library's service, else
        0."""
        if on.type == "cpu":
            return 0
        module = getattr(torch, on.type, None)
        if module is not None and hasattr(module, "current_stream"):
            handle = getattr(module.current_stream(on), f"{on.type}_stream", None)
            if handle is not None:
                return int(handle)
        services = self.library.services
        if services is None or not services.stream:
            return 0
        return int(table.interface().cast("uintptr_t", services.stream(on.index or 0)))


def _device_of(values: Sequence[Any]) -> torch.device:
    return next(v.device for v in values if isinstance(v, (Tensor, QuantizedWeight)))
