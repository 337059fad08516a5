"""Op: the declaration of an operator, as data and rules.

The decorated function is the composite: the operator's meaning in torch, on any device. From its
signature and the shape and dtype texts follow the torch schema, the checks with their messages, the
fake kernel, the inputs of property tests, the cost and the tolerance. Implementations are added to
an Op with `.impl`. What makes a declaration callable is its engine, which declare.py gives it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .dtypes import Kind, Rules
from .errors import shown
from .parameters import autocast_rules, call_glue, fits, parameters_of, schema_of
from .requires import Requirement, device
from .shapes import Bound, Expression, Signature
from .weights import QuantizedWeight

P = ParamSpec("P")
R = TypeVar("R")
Q = ParamSpec("Q")
S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])

Weight: TypeAlias = Tensor | QuantizedWeight
"""A weight argument: a tensor, or a QuantizedWeight that is decoded where it is used."""

_compiling = torch.compiler.is_compiling
_registrant: str | None = None


@contextlib.contextmanager
def registering(plugin: str) -> Iterator[None]:
    """Within the block, what is registered belongs to this plugin."""
    global _registrant
    before, _registrant = _registrant, plugin
    try:
        yield
    finally:
        _registrant = before


def registrant() -> str | None:
    """The plugin whose register() is running."""
    return _registrant


def backend_of(module: str) -> str:
    """The backend that a module's implementations belong to: its folder in transom.backends, or its
    plugin."""
    parts = module.split(".")
    if parts[:2] == ["transom", "backends"] and len(parts) > 2:
        return parts[2]
    return _registrant or parts[0]


@dataclass(frozen=True)
class Impl:
    """One function that computes an operator, and what it requires of a call."""

    op: str
    name: str
    backend: str
    function: Callable[..., Any]
    requires: tuple[Requirement, ...] = ()
    tier: str = "portable"
    deterministic: bool = True
    capturable: bool = False
    version: str = "1"
    unavailable: str | None = None
    """Why its backend cannot be used on this machine, or None."""
    host: tuple[str, ...] = ()
    """Arguments that it reads in place from pinned host memory, for a call on a device."""


@dataclass(frozen=True)
class Gradient:
    """How an operator is differentiated: what to save, and the function that calls the backward
    operators."""

    save: tuple[str, ...]
    constant: tuple[str, ...]
    """Float inputs that have no gradient by the operator's definition."""
    function: Callable[..., Mapping[str, Tensor | None]]


@dataclass(frozen=True)
class Rule:
    """A rule on a call: a function, and the names of what it asks for."""

    function: Callable[..., str | None]
    asks: tuple[str, ...]

    @classmethod
    def of(cls, function: Callable[..., str | None]) -> Rule:
        """The rule that asks for the function's parameters."""
        return cls(function, tuple(inspect.signature(function).parameters))


@dataclass(frozen=True)
class Cost:
    """The work of one call: floating-point operations, and bytes that must move at least."""

    flops: float
    bytes: float


class Engine(Protocol):
    """What runs an operator's calls."""

    torch_op: Any
    """The overload of torch.ops.transom.<name>."""

    def enter(self, *values: Any) -> Any:
        """The result of an eager call with every declared argument in order."""

    def run(self, values: tuple[Any, ...], gradient: bool) -> Any:
        """The result of a call that torch's dispatcher has let through."""

    def explain(self, *args: Any, **kwargs: Any) -> Any:
        """Which implementation a public call would take, and why; nothing is computed."""

    def arguments(self, *args: Any, **kwargs: Any) -> tuple[Op[..., Any], tuple[Any, ...]]:
        """The declared operator that a public call reaches, and its arguments in order."""

    def forget_plans(self) -> None:
        """Plans are made anew from the next call on."""


class Op(Generic[P, R]):
    """An operator: call it, explain() it, add implementations to it with impl()."""

    engine: Engine

    def __init__(
        self, function: Callable[P, R], shapes: str, dtypes: str, options: Mapping[str, Any]
    ) -> None:
        self.name = function.__name__.lstrip("_")
        self.module = function.__module__
        parts = self.module.split(".")
        self.family = parts[-2] if parts[:2] == ["transom", "kernels"] else ""
        self.path = f"{self.family}/{parts[-1]}" if self.family else ""
        """Where its implementations stand below each backend's folder; '' for operators of
        plugins."""
        self.signature = Signature.parse(shapes)
        self.rules = Rules.parse(dtypes)
        self.shapes_text, self.dtypes_text = shapes, dtypes
        self.parameters = parameters_of(function, self.signature)
        self.position = {p.name: i for i, p in enumerate(self.parameters)}
        """Of each parameter among the declared arguments."""
        self.flops = Expression(options["flops"])
        self.bytes = Expression(options["bytes"]) if options["bytes"] else None
        self.accumulate = Expression(options["accumulate"])
        self.autocast = autocast_rules(options["autocast"])
        self.batch: str | None = options["batch"]
        self.mutates = tuple(options["mutates"].split())
        self.host: tuple[str, ...] = tuple(options["host"].split())
        self.varying = frozenset(options["varying"].split())
        self.examples: list[dict[str, Any]] = options["examples"]
        self.impls: dict[str, Impl] = {}
        self.loaded: set[str] = set()
        """Device types whose implementations are known; '' for those of this tree."""
        self.reference_of: Callable[..., Any] | None = None
        self.rule: Rule | None = None
        self.rule_on_values: Rule | None = None
        self.sampler: Callable[..., Mapping[str, Any]] | None = None
        self.differentiated: Gradient | None = None
        self.public: Callable[..., Any] | None = None
        """The function that a user calls, where it differs from the declaration."""
        self._public_tensors: list[tuple[int, str, bool, bool]] = []
        self._public_values: list[tuple[int, str, str]] = []
        glue = call_glue(self.name, self.parameters)
        self.bind, self.invoke = glue["bind"], glue["invoke"]
        self.flatten, self.unflatten = glue["flatten"], glue["unflatten"]
        self.__doc__ = function.__doc__
        self.__name__ = self.name
        self.__signature__ = inspect.signature(function)
        self.impls["composite"] = Impl(
            self.name, "composite", "composite", function, tier="composite"
        )

    def __repr__(self) -> str:
        return f"<transom operator {self.name}: {self.shapes_text}>"

    # What a declaration adds -------------------------------------------------------------------

    def reference(self, function: F) -> F:
        """The operator in NumPy: float64 arrays in (a QuantizedWeight dequantised), arrays out."""
        self.reference_of = function
        run = _through_numpy(self, function)
        self.add(Impl(self.name, "reference", "reference", run, (device("cpu"),), tier="reference"))
        return function

    def check(self, function: F) -> F:
        """A rule on dims and plain arguments, asked for by parameter name; answers None or the text
        of the error."""
        self.rule = Rule.of(function)
        return function

    def check_values(self, function: F) -> F:
        """A rule on the values of tensors; runs on CPU tensors, and elsewhere with
        TRANSOM_DEBUG=1."""
        self.rule_on_values = Rule.of(function)
        return function

    def sample(self, function: F) -> F:
        """(rng, dims) -> values of the arguments that standard normal numbers would get wrong."""
        self.sampler = function
        return function

    def gradient(self, *, save: str, constant: str = "") -> Callable[[F], F]:
        """(saved, *output gradients) -> {input: gradient}, calling backward operators.

        save        the inputs and outputs that the function reads
        constant    float inputs that are constants by definition (a selection bias): all others
                    must get a gradient
        """

        def declare(function: F) -> F:
            self.differentiated = Gradient(tuple(save.split()), tuple(constant.split()), function)
            return function

        return declare

    def front(self, function: Callable[Q, S]) -> Op[Q, S]:
        """This operator with `function` as its public call, where that differs from the declared
        one: it reaches the operator once, by call()."""
        self.public = function
        function.__name__ = function.__qualname__ = self.name  # a missing argument names it
        self.__doc__ = function.__doc__ or self.__doc__
        self.__signature__ = inspect.signature(function)
        declared = {p.name: p for p in self.parameters}
        for i, p in enumerate(self.__signature__.parameters.values()):
            known = declared.get(p.name)
            if known is not None and known.role != "value":
                self._public_tensors.append(
                    (i, p.name, known.role == "weight", known.type.endswith("?"))
                )
            elif (schema := schema_of(p)) and (known is None or known.type != schema):
                self._public_values.append((i, p.name, schema))
        return cast("Op[Q, S]", self)

    def impl(
        self,
        *,
        requires: Sequence[Requirement] = (),
        tier: str = "portable",
        deterministic: bool = True,
        capturable: bool = False,
        version: str = "1",
        host: tuple[str, ...] = (),
    ) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
        """Register a function with the declaration's parameters as an implementation; its name is
        the function's.

        tier            'tuned' (made for the device it requires) or 'portable' (a real kernel,
                        untuned)
        deterministic   same inputs give the same bits; capturable: no host synchronisation, no
                        allocation on the host
        version         changes when results or speed change: measured choices of another version
                        are void
        host            arguments that it reads in place from pinned host memory
        """
        if tier not in ("portable", "tuned"):
            raise ValueError(f"{self.name}: tier is {tier!r}; expected portable or tuned")
        known = {*self.position, *self.signature.symbols()}
        for requirement in requires:
            for fact in requirement.reads:
                dim = fact.partition(":")[2] or fact
                if dim not in known and fact not in ("device", "arch", "gradient"):
                    raise ValueError(
                        f"{self.name}: a requirement reads {fact!r}; expected a dim or an argument"
                    )

        def register(function: Callable[P, Any]) -> Callable[P, Any]:
            if [*inspect.signature(function).parameters] != [p.name for p in self.parameters]:
                raise TypeError(
                    f"{self.name}: impl {function.__name__!r} takes "
                    f"{[*inspect.signature(function).parameters]}; "
                    f"expected {[p.name for p in self.parameters]}"
                )
            self.add(
                Impl(
                    self.name,
                    function.__name__,
                    backend_of(function.__module__),
                    function,
                    tuple(requires),
                    tier,
                    deterministic,
                    capturable,
                    version,
                    host=host,
                )
            )
            return function

        return register

    def add(self, impl: Impl) -> None:
        """Take an implementation in; ValueError if another one has its name."""
        if impl.name in self.impls:
            raise ValueError(
                f"{self.name}: has an implementation {impl.name!r}; expected a name of its own"
            )
        self.impls[impl.name] = impl
        self.engine.forget_plans()

    # Calling -----------------------------------------------------------------------------------

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.public is None:
            result: R = self.call(*args, **kwargs)
            return result
        for at, name, weight, optional in self._public_tensors:
            if at < len(args) or name in kwargs:
                value = args[at] if at < len(args) else kwargs[name]
                if type(value) is not Tensor and not (optional and value is None):
                    self._check_tensor(name, value, weight)
        for at, name, schema in self._public_values:
            if at < len(args) or name in kwargs:
                self._check_value(name, args[at] if at < len(args) else kwargs[name], schema)
        result = self.public(*args, **kwargs)
        return result

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The declared operator, without its front."""
        values = self.bind(*args, **kwargs)
        if _compiling():
            self.check_types(values)
            return self.engine.torch_op(*self.flatten(*values))
        return self.engine.enter(*values)

    def explain(self, *args: Any, **kwargs: Any) -> Any:
        """Which implementation this call would take, why, and each other one's reasons."""
        return self.engine.explain(*args, **kwargs)

    @property
    def torch_op(self) -> Any:
        """The operator's overload in torch.ops.transom."""
        return self.engine.torch_op

    # Facts derived from a call -----------------------------------------------------------------

    def tensors(self, values: Sequence[Any]) -> dict[str, Any]:
        """The tensors and weights of a call that were given, by name."""
        return {
            p.name: v
            for p, v in zip(self.parameters, values, strict=True)
            if p.role != "value" and v is not None
        }

    def arguments(self, values: Sequence[Any]) -> dict[str, Any]:
        """The plain arguments of a call, by name."""
        return {
            p.name: v for p, v in zip(self.parameters, values, strict=True) if p.role == "value"
        }

    def check_types(self, values: Sequence[Any]) -> None:
        """TypeError unless every declared argument is of its parameter's type."""
        for p, value in zip(self.parameters, values, strict=True):
            if p.role == "value":
                self._check_value(p.name, value, p.type)
            elif not (value is None and p.type == "Tensor?"):
                self._check_tensor(p.name, value, p.role == "weight")

    def _check_value(self, name: str, value: Any, schema: str) -> None:
        if not fits(value, schema):
            expected = schema.replace("?", " or None")
            raise TypeError(f"{self.name}: {name} is {shown(value)}; expected {expected}")

    def _check_tensor(self, name: str, value: Any, weight: bool) -> None:
        if not isinstance(value, Tensor) and not (weight and isinstance(value, QuantizedWeight)):
            kind = "torch.Tensor or QuantizedWeight" if weight else "torch.Tensor"
            raise TypeError(f"{self.name}: {name} is {type(value).__name__}; expected a {kind}")

    def validate(
        self,
        shapes: Mapping[str, Sequence[int]],
        kinds: Mapping[str, Kind],
        arguments: Mapping[str, Any],
    ) -> Bound:
        """Check one call by its shapes, dtypes and plain arguments; its symbols. Raises ValueError
        or TypeError."""
        bound = self.signature.bind(self.name, shapes, arguments)
        self.rules.check(self.name, kinds)
        if self.rule is not None:
            known = {**bound, **arguments, "given": frozenset(shapes)}
            text = self.rule.function(*(known.get(n) for n in self.rule.asks))
            if text:
                raise ValueError(f"{self.name}: {text}")
        return bound

    def check_devices(self, devices: Mapping[str, torch.device]) -> torch.device:
        """The device that the tensors of a call share, but those that may lie in host memory;
        ValueError names one that is elsewhere."""
        (first, device), *others = devices.items()
        for name, other in others:
            if other == device or name in self.host and _reads_host(device, other):
                continue
            raise ValueError(f"{self.name}: {name} is on {other}; {first} is on {device}")
        return device

    def outputs(self, bound: Bound, kinds: Mapping[str, Kind]) -> list[tuple[tuple[int, ...], Any]]:
        """Shape and dtype of every output."""
        return [
            (shape.sizes(bound), self.rules.output(name, kinds))
            for name, shape in self.signature.outputs.items()
        ]

    def cost(self, values: Sequence[Any]) -> Cost:
        """The work of a call: from the declared expressions, else each input and output moved
        once."""
        tensors, arguments = self.tensors(values), self.arguments(values)
        bound = self.signature.bind(self.name, {n: t.shape for n, t in tensors.items()}, arguments)
        kinds = {n: kind_of(t) for n, t in tensors.items()}
        sizes = {n: t.nbytes / max(1, _count(t.shape)) for n, t in tensors.items()}
        scope = {
            # dims that only tensors which were not given have
            **dict.fromkeys(self.signature.symbols(), 0),
            **{k: _count(v) if isinstance(v, tuple) else v for k, v in bound.items()},
            **arguments,
        }
        outputs = [] if self.mutates else self.outputs({**arguments, **bound}, kinds)
        for (_, dtype), name in zip(outputs, self.signature.outputs, strict=True):
            sizes[name] = dtype.itemsize
        scope["size"] = SimpleNamespace(**sizes)
        moved = sum(t.nbytes for t in tensors.values()) + sum(
            _count(s) * d.itemsize for s, d in outputs
        )
        return Cost(float(self.flops(scope)), float(self.bytes(scope) if self.bytes else moved))


def kind_of(tensor: Any) -> Kind:
    """A tensor's dtype, or a QuantizedWeight's format."""
    return tensor.format if isinstance(tensor, QuantizedWeight) else tensor.dtype


def as_numpy(value: Any) -> Any:
    """A call's argument as its reference takes it: float64, int64 or bool arrays; plain values as
    they are."""
    if isinstance(value, QuantizedWeight):
        value = value.dequantize()
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    if value.dtype.is_floating_point:
        return value.double().numpy()
    return value.numpy() if value.dtype.itemsize == 1 else value.long().numpy()


def _reads_host(device: torch.device, where: torch.device) -> bool:
    """True if an argument may lie in memory `where` of a call on `device`: pages of the host have
    an address on CUDA devices."""
    return where.type == "cpu" and device.type == "cuda"


def _count(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _through_numpy(op: Op[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as an implementation: torch in, torch out, dtypes as declared."""

    def reference(*args: Any, **kwargs: Any) -> Any:
        values = op.bind(*args, **kwargs)
        tensors, arguments = op.tensors(values), op.arguments(values)
        bound = op.signature.bind(op.name, {n: t.shape for n, t in tensors.items()}, arguments)
        with np.errstate(all="ignore"):  # torch says nothing about Inf and NaN either
            results = function(*(as_numpy(v) for v in values))
        results = results if isinstance(results, tuple) else (results,)
        kinds = {n: kind_of(t) for n, t in tensors.items()}
        outputs = [
            torch.as_tensor(r).to(dtype).reshape(shape).contiguous()
            for r, (shape, dtype) in zip(
                results, op.outputs({**arguments, **bound}, kinds), strict=True
            )
        ]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return reference
