"""Op: the declaration of an operator; @op makes one from a function.

The decorated function is the composite: the operator's meaning in torch, on any device. From its
signature and the shape and dtype texts follow the torch schema, the checks with their messages, the
fake kernel, the inputs of property tests, the cost and the tolerance. Implementations are added to
an Op with `.impl`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from . import dispatch, guard, torch_op
from .dtypes import Kind, Rules
from .parameters import Parameter, autocast_rules, call_glue, fits, parameters_of
from .requires import Requirement, device
from .shapes import Bound, Expression, Signature
from .weights import QuantizedWeight, host_memory
from .weights.to_numpy import as_numpy

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

Weight: TypeAlias = Tensor | QuantizedWeight
"""A weight argument: a tensor, or a QuantizedWeight that is decoded where it is used."""

OPS: dict[str, Op[..., Any]] = {}
"""Every declared operator by name."""


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

    def reasons(self, facts: dispatch.Facts) -> list[str]:
        """Every sentence why this implementation cannot run the call; empty if it can."""
        if self.unavailable:
            return [self.unavailable]
        if (held := guard.reason(self, facts.device)) is not None:
            return [held]
        out = [sentence for r in self.requires if (sentence := r(facts)) is not None]
        out += host_memory.reasons(facts, self.host)
        if facts.deterministic and not self.deterministic:
            out.append(
                "torch.use_deterministic_algorithms is on; its results may differ between runs"
            )
        if facts.capturing and not self.capturable:
            out.append("a stream is being captured; it synchronises with the host")
        return out


@dataclass(frozen=True)
class Gradient:
    """How an operator is differentiated: what to save, and the function that calls the backward
    operators."""

    save: tuple[str, ...]
    constant: tuple[str, ...]
    """Float inputs that have no gradient by the operator's definition."""
    function: Callable[..., Mapping[str, Tensor | None]]


@dataclass(frozen=True)
class Cost:
    """The work of one call: floating-point operations, and bytes that must move at least."""

    flops: float
    bytes: float


class Op(Generic[P, R]):
    """An operator: call it, explain() it, add implementations to it with impl()."""

    def __init__(
        self, function: Callable[P, R], shapes: str, dtypes: str, options: Mapping[str, Any]
    ) -> None:
        self.name = function.__name__
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
        self._reference: Callable[..., Any] | None = None
        self._check: Callable[..., str | None] | None = None
        self._check_asks: tuple[str, ...] = ()
        self._check_values_asks: tuple[str, ...] = ()
        self._check_values: Callable[..., str | None] | None = None
        self._sample: Callable[..., Mapping[str, Any]] | None = None
        self._gradient: Gradient | None = None
        self._front: Callable[..., Any] | None = None
        self._front_tensors: tuple[tuple[int, str, bool, bool], ...] = ()
        self._plans: dict[Any, dispatch.Plan] = {}
        self._loaded: set[str] = set()
        glue = call_glue(self.name, self.parameters, self.host)
        self._bind, self._invoke, self._key = glue["bind"], glue["invoke"], glue["key"]
        self._plain, self._flatten = glue["plain"], glue["flatten"]
        self._unflatten = glue["unflatten"]
        self._rank = {p.name: i for i, p in enumerate(self.parameters)}
        self.__doc__ = function.__doc__
        self.__name__ = self.name
        self.__signature__ = inspect.signature(function)
        self._add(Impl(self.name, "composite", "composite", function, tier="composite"))
        if self.name in OPS:
            raise ValueError(
                f"{self.name}: declared in {OPS[self.name].module}; expected a name of its own"
            )
        OPS[self.name] = self
        self.torch_op = torch_op.define(self)

    def __repr__(self) -> str:
        return f"<transom operator {self.name}: {self.shapes_text}>"

    # What a declaration adds -------------------------------------------------------------------

    def reference(self, function: F) -> F:
        """The operator in NumPy: float64 arrays in (a QuantizedWeight dequantised), arrays out."""
        self._reference = function
        run = _through_numpy(self, function)
        self._add(
            Impl(self.name, "reference", "reference", run, (device("cpu"),), tier="reference")
        )
        return function

    def check(self, function: F) -> F:
        """A rule on dims and plain arguments, asked for by parameter name; answers None or the text
        of the error."""
        self._check, self._check_asks = function, tuple(inspect.signature(function).parameters)
        return function

    def check_values(self, function: F) -> F:
        """A rule on the values of tensors; runs on CPU tensors, and elsewhere with
        TRANSOM_DEBUG=1."""
        self._check_values = function
        self._check_values_asks = tuple(inspect.signature(function).parameters)
        return function

    def sample(self, function: F) -> F:
        """(rng, dims) -> values of the arguments that standard normal numbers would get wrong."""
        self._sample = function
        return function

    def gradient(self, *, save: str, constant: str = "") -> Callable[[F], F]:
        """(saved, *output gradients) -> {input: gradient}, calling backward operators.

        save        the inputs and outputs that the function reads
        constant    float inputs that are constants by definition (a selection bias): all others
                    must get a gradient
        """

        def declare(function: F) -> F:
            self._gradient = Gradient(tuple(save.split()), tuple(constant.split()), function)
            return function

        return declare

    def front(self, function: F) -> F:
        """The public call, when it differs from the declared one: (call, ...) -> result, calling
        `call` once."""
        self._front = function
        function.__name__ = function.__qualname__ = self.name  # a missing argument names it
        self.__doc__ = function.__doc__ or self.__doc__
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1:]
        self.__signature__ = signature.replace(parameters=parameters)
        self._front_tensors = tuple(
            (i, p.name, str(p.annotation).startswith("Weight"), "None" in str(p.annotation))
            for i, p in enumerate(parameters)
            if str(p.annotation).startswith(("Tensor", "Weight"))
        )
        return function

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
        known = {*self._rank, *self.signature.symbols()}
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
            backend = dispatch.backend_of(function.__module__)
            self._add(
                Impl(
                    self.name,
                    function.__name__,
                    backend,
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

    def _add(self, impl: Impl) -> None:
        if impl.name in self.impls:
            raise ValueError(
                f"{self.name}: has an implementation {impl.name!r}; expected a name of its own"
            )
        self.impls[impl.name] = impl
        dispatch.forget_plans()

    # Calling -----------------------------------------------------------------------------------

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._front is not None:
            for at, name, weight, optional in self._front_tensors:
                if at < len(args) or name in kwargs:
                    value = args[at] if at < len(args) else kwargs[name]
                    if type(value) is not Tensor and not (optional and value is None):
                        self._check_tensor(name, value, weight)
            return self._front(self.call, *args, **kwargs)
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The declared operator, without its front."""
        values = self._bind(*args, **kwargs)
        if not torch_op.compiling():
            result = self._direct(*values)
            if result is not NotImplemented:
                return result
        self._check_types(values)
        if torch_op.transformed(self):
            return torch_op.apply_transformed(self, self._flatten(*values))
        return self.torch_op(*self._flatten(*values))

    def _direct(self, *values: Any) -> Any:
        """The result of an eager call that nothing in torch wants to see, else NotImplemented; the
        first call puts what abi/direct.py makes in this method's place."""
        from .abi.direct import entrance

        self._direct = entrance(self)  # type: ignore[method-assign]
        return self._direct(*values)

    def explain(self, *args: Any, **kwargs: Any) -> dispatch.Explanation:
        """Which implementation this call would take, why, and each other one's reasons."""
        values = self._declared(*args, **kwargs)
        return dispatch.select(self, dispatch.facts_of(self, values))

    def _declared(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The declared arguments of a public call."""
        if self._front is None:
            return self._bind(*args, **kwargs)
        try:
            self._front(_Ask(self), *args, **kwargs)
        except _Asked as asked:
            return asked.values
        raise AssertionError(f"{self.name}: its front did not call the operator")

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

    def _check_types(self, values: Sequence[Any]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            if p.role == "value":
                if not fits(value, p.type):
                    raise TypeError(
                        f"{self.name}: {p.name} is {value!r}; "
                        f"expected {p.type.replace('?', ' or None')}"
                    )
            elif not (value is None and p.type == "Tensor?"):
                self._check_tensor(p.name, value, p.role == "weight")

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
        if self._check is not None:
            known = {**bound, **arguments, "given": frozenset(shapes)}
            text = self._check(*(known.get(n) for n in self._check_asks))
            if text:
                raise ValueError(f"{self.name}: {text}")
        return bound

    def check_devices(self, devices: Mapping[str, torch.device]) -> torch.device:
        """The device that the tensors of a call share, but those that may lie in host memory;
        ValueError names one that is elsewhere."""
        (first, device), *others = devices.items()
        for name, other in others:
            if other == device or name in self.host and host_memory.may_be_there(other, device):
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


class _Asked(Exception):
    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values


class _Ask:
    """Stands in for the operator in its front, to learn the declared arguments without
    computing."""

    def __init__(self, op: Op[..., Any]) -> None:
        self.op = op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Asked(self.op._bind(*args, **kwargs))


def op(
    shapes: str,
    *,
    dtypes: str,
    flops: str = "0",
    bytes: str | None = None,
    accumulate: str = "1",
    autocast: str = "",
    batch: str | None = None,
    mutates: str = "",
    host: str = "",
    varying: str = "B T S M",
    examples: list[dict[str, Any]],
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an operator; the decorated function is its composite.

    shapes      `x[*B, D], bias?[E] -> y[*B, D]`: see shapes.py
    dtypes      `x: float; weight: x | f32 | quant; y: x`: see dtypes.py
    flops       operations of one call, an expression over dims and arguments; bytes likewise
                (default: all, once)
    accumulate  terms of the longest sum: drives the tolerance of tests
    autocast    `low: x weight; f32: logits`: what autocast casts; nothing by default
    batch       the leading dim over which calls are independent: torch.vmap folds into it
    mutates     names of arguments that are written; such an operator returns nothing
    host        names of arguments that may lie in host memory, for implementations that read there
    varying     dims that change from call to call: measured choices round them to powers of two
    examples    dims and arguments for tests (the first, small) and benchmarks (model shapes)
    """
    options = dict(
        flops=flops,
        bytes=bytes,
        accumulate=accumulate,
        autocast=autocast,
        batch=batch,
        mutates=mutates,
        host=host,
        varying=varying,
        examples=examples,
    )
    return lambda function: Op(function, shapes, dtypes, options)


def kind_of(tensor: Any) -> Kind:
    """A tensor's dtype, or a QuantizedWeight's format."""
    return tensor.format if isinstance(tensor, QuantizedWeight) else tensor.dtype


def _count(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _through_numpy(op: Op[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as an implementation: torch in, torch out, dtypes as declared."""

    def reference(*args: Any, **kwargs: Any) -> Any:
        import torch

        values = op._bind(*args, **kwargs)
        tensors, arguments = op.tensors(values), op.arguments(values)
        bound = op.signature.bind(op.name, {n: t.shape for n, t in tensors.items()}, arguments)
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


def lookup(which: str | Op[..., Any]) -> Op[..., Any]:
    """The operator of a name ('grouped_gemm' or 'moe/grouped_gemm'); ValueError lists what there
    is."""
    if isinstance(which, Op):
        return which
    found = OPS.get(which.rpartition("/")[2])
    if found is None:
        raise ValueError(f"{which}: is not an operator; expected one of {', '.join(sorted(OPS))}")
    return found


__all__ = [
    "OPS",
    "Cost",
    "Gradient",
    "Impl",
    "Op",
    "Parameter",
    "Weight",
    "as_numpy",
    "kind_of",
    "lookup",
    "op",
]
