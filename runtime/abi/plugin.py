"""Implementations in C: what a library offers, registered, and its functions called.

An implementation that was compiled for another declaration of its operator is registered as
unavailable, with a sentence that explain() shows. A call goes through transom._C (extension.py);
where that is not built, through cffi, plainly and slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import config
from ..errors import NotSupported, PluginError
from ..facts import Facts
from ..op import Impl, Op, kind_of, registrant
from ..registry import OPS, RENAMED
from ..requires import Requirement, device
from ..weights import QuantizedWeight
from ..weights.layout import addressed, assumed, contiguous
from . import extension, library, output_memory
from .frame import MOST_WORKSPACE, Frame
from .library import Entry, Library
from .services import Services
from .weight_forms import Budget, Packed

_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: NotSupported, 3: MemoryError}

Outputs: TypeAlias = list[tuple[tuple[int, ...], torch.dtype]]
Maker: TypeAlias = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any] | None]
"""A function, its arguments and keywords."""


class CPlugin:
    """A vendor's library, opened from this path, with all that it offers registered.

    path     of the shared library; must name a file.

    Raises PluginError, with one sentence, if it cannot be opened, has no transom_plugin_v1, refuses
    this transom, or if its table is damaged. What could not be registered stands in `refused`.
    """

    def __init__(self, path: str | Path) -> None:
        self.library = library.open_library(path)
        self.refused: dict[str, str] = {}
        """By 'operator/implementation': why it cannot be used."""
        offered = {(entry.op, entry.name) for entry in self.library.entries}
        for entry in self.library.entries:
            if (RENAMED.get(entry.op), entry.name) in offered:
                continue  # the library serves this version and the one before
            reason = register(self.library, entry)
            if reason is not None:
                self.refused[f"{entry.op}/{entry.name}"] = reason
        _refused.setdefault(registrant() or self.library.vendor, {}).update(self.refused)

    @property
    def services(self) -> Services | None:
        """What the library does for its device beside computing; None for nothing."""
        lib = self.library
        return None if lib.services is None else Services(lib.vendor, lib.services)

    def __repr__(self) -> str:
        lib = self.library
        return (
            f"<plugin {lib.vendor} {lib.version} for {lib.device_type}: "
            f"{len(lib.entries) - len(self.refused)} implementations, {len(self.refused)} refused>"
        )


_refused: dict[str, dict[str, str]] = {}


def refusals(plugin: str) -> dict[str, str]:
    """What could not be registered of the libraries that a plugin opened, by
    'operator/implementation'."""
    return dict(_refused.get(plugin, {}))


def register(
    lib: Library, entry: Entry, backend: str | None = None, budget: Budget | None = None
) -> str | None:
    """Add one entry of a library to its operator; None, or the sentence why it cannot be used.

    An entry for another schema is added as unavailable; one under the operator's former name is
    compared under that. Registering twice does nothing. `budget` bounds the packed forms of its
    weights; None is no limit.
    """
    op = OPS.get(RENAMED.get(entry.op, entry.op))
    if op is None:
        return f"this transom has no operator {entry.op!r}; upgrade transom"
    known = op.impls.get(entry.name)
    if known is not None:
        if isinstance(known.function, CFunction) and known.function.entry == entry:
            return known.unavailable
        return f"{op.name} has an implementation {entry.name!r}; expected a name of its own"
    mismatch = None
    declared = library.schema_hash(op, entry.op)
    if entry.schema_hash != declared:
        mismatch = (
            f"plugin {lib.vendor} {lib.version} was compiled for {op.name} as "
            f"{entry.schema_hash:016x}; this transom declares {declared:016x}; "
            "compile it with this transom's headers"
        )
    function = CFunction(op, entry, lib, budget)

    def supports(facts: Facts) -> str | None:
        # The requirement on the device has said so.
        return None if facts.device != lib.device_type else function.refusal(facts)

    asks = Requirement(f"what {lib.vendor}'s library says of the call", (), supports)
    op.add(
        Impl(
            op.name,
            entry.name,
            backend or registrant() or lib.vendor,
            function,
            (device(lib.device_type), asks),
            entry.tier,
            entry.deterministic,
            entry.capturable,
            lib.version,
            mismatch,
        )
    )
    return mismatch


class CFunction:
    """A library's implementation as a function with the operator's parameters."""

    def __init__(
        self, op: Op[..., Any], entry: Entry, lib: Library, budget: Budget | None = None
    ) -> None:
        self.op, self.entry, self.library = op, entry, lib
        self.__name__ = entry.name
        services = lib.services
        allowed = budget is None or budget.limit > 0
        packs = allowed and services is not None and services.packed_bytes and services.pack
        self.packed = Packed(self, services, budget) if packs else None
        """Of weights; None where the library packs none, or may not."""
        self._made: dict[bool, Any] = {}

    def __repr__(self) -> str:
        return f"<{self.op.name} of {self.library.path.name}: {self.entry.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.prepared()(*self.op.bind(*args, **kwargs))

    def prepared(self, gradient: bool = False) -> Callable[..., Any]:
        """A function of the declared arguments, all of them in order; several threads may call it
        at once, and it itself. `gradient`: the calls are differentiated, so that their weights are
        about to change."""
        module = extension.module()
        if module is None:
            return lambda *values: self.through_cffi(values, gradient)
        if gradient not in self._made:
            self._made[gradient] = module.implementation(
                self, self._look(gradient), extension.operator(self.op)
            )
        return self._made[gradient]

    # What the extension asks for ---------------------------------------------------------------

    @property
    def address(self) -> int:
        """Of the transom_impl."""
        return int(library.interface().cast("uintptr_t", self.entry.pointer))

    @property
    def written(self) -> list[int]:
        """Positions of the arguments that a call writes."""
        return [self.op.position[name] for name in self.op.mutates]

    def unreadable(self, *values: Any) -> NoReturn:
        """Say which argument of a call can't be handed to C."""
        self.op.check_types(values)
        raise TypeError(f"{self.op.name}: a tensor has no memory that C can read")

    def makers(self, values: Sequence[Any]) -> tuple[Maker, ...]:
        """What makes the outputs of a call with these arguments."""
        on = _device_of(values)
        return tuple(self._maker(shape, dtype, on) for shape, dtype in self._outputs(values))

    def far(self, on: torch.device, wanted: int) -> tuple[int, Tensor | None]:
        """The stream and the workspace of a call on an accelerator."""
        workspace = torch.empty(wanted, dtype=torch.uint8, device=on) if wanted else None
        return self.stream(on), workspace

    def fail(self, code: int, status: int, raw: bytes) -> NoReturn:
        """Raise what a failed call means: its own number, and what it wrote into the status."""
        text = library.one_line(raw) or "gives no reason"
        error = _ERRORS.get(status or code)
        if error is None:
            raise PluginError(f"{self._text()}: failed with code {status or code}: {text}")
        raise error(f"{self.op.name}: {text}")

    def greedy(self, wanted: int, what: str = "workspace") -> NoReturn:
        """Refuse that many bytes."""
        raise PluginError(f"{self._text()}: asks for {wanted} bytes of {what}")

    def _text(self) -> str:
        return f"{self.op.name}: implementation {self.entry.name!r} of plugin {self.library.vendor}"

    def _look(self, gradient: bool) -> Callable[[int, Any], Tensor | None] | None:
        """What a call asks for the packed form of each of its weights."""
        if self.packed is None:
            return None
        return self.packed.forget if gradient else self.packed.form

    def _outputs(self, values: Sequence[Any]) -> Outputs:
        op = self.op
        if op.mutates:
            return []
        tensors, arguments = op.tensors(values), op.arguments(values)
        bound = op.signature.bind(op.name, {n: t.shape for n, t in tensors.items()}, arguments)
        return op.outputs({**arguments, **bound}, {n: kind_of(t) for n, t in tensors.items()})

    @staticmethod
    def _maker(shape: tuple[int, ...], dtype: torch.dtype, on: torch.device) -> Maker:
        """What makes an output: the same empty tensor each time. On the host from a prototype
        without memory: empty_like() parses no arguments and takes half the time of empty(); a large
        one in memory that is used again."""
        if on.type != "cpu":
            return torch.empty, (shape,), {"dtype": dtype, "device": on}
        if output_memory.worth(shape, dtype):
            return output_memory.empty, (shape, dtype), None
        prototype = torch.empty(shape, dtype=dtype, device="cpu")
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
        return int(library.interface().cast("uintptr_t", services.stream(on.index or 0)))

    # Through cffi ------------------------------------------------------------------------------

    def refusal(self, facts: Facts) -> str | None:
        """What the library's supports() says against a call of these facts."""
        op, ffi, impl = self.op, library.interface(), self.entry.pointer
        if impl.supports == ffi.NULL:
            return None
        values: list[Any] = []
        for p in op.parameters:
            if p.role == "value":
                values.append(facts.arguments[p.name])
            else:
                values.append(facts.parts.get(p.name) or _assumed(op, p.name, facts))
        outputs: Outputs = []
        if not op.mutates:
            outputs = op.outputs({**facts.arguments, **facts.dims}, facts.dtypes)
        written = [contiguous(shape, dtype) for shape, dtype in outputs]
        frame = Frame(op, values, written, (facts.device, 0), facts.deterministic)
        frame.call.workspace_limit = config.workspace_bytes()
        if impl.supports(frame.call, frame.status) == 1:
            return None
        sentence = library.message(frame.status)
        return sentence or f"{self.library.vendor}'s library refuses it unexplained"

    def through_cffi(self, values: Sequence[Any], gradient: bool = False) -> Any:
        """A call with these arguments, without transom._C."""
        op, ffi, impl = self.op, library.interface(), self.entry.pointer
        # A view that negates when read (of a complex tensor's conjugate): C reads memory as it is.
        values = [v.resolve_neg() if isinstance(v, Tensor) else v for v in values]
        on = _device_of(values)
        made = [make(*args, **(more or {})) for make, args, more in self.makers(values)]
        kinds = (Tensor, QuantizedWeight)
        frame = Frame(
            op,
            [addressed(v) if isinstance(v, kinds) else v for v in values],
            [addressed(output)[0] for output in made],  # type: ignore[misc]
            (on.type, on.index or 0),
            torch.are_deterministic_algorithms_enabled(),
        )
        call = frame.call
        call.workspace_limit = config.workspace_bytes()
        forms = self._forms(values, gradient)
        if forms:
            frame.pack({at: form.data_ptr() for at, form in forms.items()})
        wanted = impl.workspace(call) if impl.workspace != ffi.NULL else 0
        if wanted > MOST_WORKSPACE:
            self.greedy(wanted)
        scratch = torch.empty(wanted, dtype=torch.uint8, device=on)
        if wanted:
            call.workspace_bytes, call.workspace = wanted, ffi.cast("void *", scratch.data_ptr())
        frame.reach()
        call.stream = ffi.cast("void *", self.stream(on))
        if self.written:  # before they are: Ctrl-C during the call is raised by what follows it
            increment_version([values[i] for i in self.written])
        code = impl.run(call, frame.status)
        if code:
            self.fail(code, frame.status.code, ffi.buffer(frame.status.message)[:])
        if op.mutates:
            return None
        return made[0] if len(made) == 1 else tuple(made)

    def _forms(self, values: Sequence[Any], gradient: bool) -> dict[int, Tensor]:
        """The packed forms of a call's weights, by each weight's first place."""
        look, found, at = self._look(gradient), {}, 0
        for p, value in zip(self.op.parameters, values, strict=True):
            if p.role == "weight" and value is not None and look is not None:
                form = look(at, value)
                if form is not None:
                    found[at] = form
            at += 4 if p.role == "weight" else 1
        return found


def _assumed(op: Op[..., Any], name: str, facts: Facts) -> Any:
    """The parts of an argument whose facts were made without tensors (`transom explain` of shapes):
    contiguous, and in a quantised format's usual groups. None if it is not given."""
    kind = facts.dtypes.get(name)
    if kind is None:
        return None
    shape = op.signature.inputs[name].sizes({**facts.arguments, **facts.dims})
    return assumed(kind, shape) if isinstance(kind, str) else (contiguous(shape, kind),)


def _device_of(values: Sequence[Any]) -> torch.device:
    return next(v.device for v in values if isinstance(v, (Tensor, QuantizedWeight)))
