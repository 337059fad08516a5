"""Calls drawn from a declaration: which tensors there are, how large, of what dtypes.

`arguments` goes through a declaration once and asks for each tensor; everything that makes calls is
built on it. `describe` makes a call of any size without memory (Described stands for each tensor),
which `made` gives memory and numbers, and `without_memory` to torch's meta device. `filled` makes
one of tensors that the caller has and numbers for the others. cases.py draws the small, awkward
calls of the conformance kit.

Of NumPy and torch alone: the command line and the benchmark use it where the kit's own packages are
not installed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import transom
from transom.dtypes import QUANTIZED, Kind
from transom.facts import Facts
from transom.op import Op, kind_of
from transom.weights import weight_from
from transom.weights.layout import assumed

Make = Callable[[str, "tuple[int, ...] | None", "list[Kind]"], Any]
"""(tensor, its declared shape, or None where a dim is not known, what it may hold) -> argument."""


def defaults(op: Op[..., Any], dims: Mapping[str, Any]) -> dict[str, Any]:
    """What a declaration's expressions see: the defaults of plain arguments, and these dims."""
    plain = {
        p.name: p.default
        for p in op.parameters
        if p.role == "value" and p.default is not inspect.Parameter.empty
    }
    return {**plain, **dims}


def arguments(
    op: Op[..., Any], scope: Mapping[str, Any], dtype: torch.dtype, make: Make
) -> tuple[Any, ...]:
    """The arguments of a call in declared order: plain ones of `scope`, tensors as made.

    scope   sizes and plain arguments by name
    dtype   that the dtype rules take every tensor to hold which is not made yet (or absent)
    """
    values: list[Any] = []
    kinds: dict[str, Kind] = {}
    for p in op.parameters:
        if p.role == "value":
            if p.name not in scope:
                raise ValueError(f"{op.name}: {p.name} has no value; expected one")
            values.append(scope[p.name])
            continue
        allowed: list[Kind] = [dtype]
        if p.name in op.rules.alternatives:
            seen = {**dict.fromkeys(op.signature.inputs, dtype), **kinds}
            allowed = op.rules.allowed(p.name, seen)
        value = make(p.name, sizes_of(op, p.name, scope), allowed)
        values.append(value)
        if value is not None:
            kinds[p.name] = kind_of(value)
    return tuple(values)


def sizes_of(op: Op[..., Any], name: str, scope: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The declared shape of a tensor; None where `scope` has no size for a dim of it."""
    try:
        return tuple(int(n) for n in op.signature.inputs[name].sizes(scope))
    except (KeyError, NameError, TypeError):
        return None


def elements(op: Op[..., Any], dims: Mapping[str, Any]) -> int:
    """Of the largest tensor of a call with these dims."""
    scope = defaults(op, dims)
    shapes = (sizes_of(op, name, scope) for name in op.signature.inputs)
    return max((math.prod(shape) for shape in shapes if shape is not None), default=0)


# Without memory ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """A tensor that is described but not there."""

    shape: tuple[int, ...]
    dtype: Kind

    @property
    def nbytes(self) -> int:
        """Its size in bytes; for a quantised weight with its scales in the default layout."""
        if isinstance(self.dtype, torch.dtype):
            return math.prod(self.shape) * self.dtype.itemsize
        parts = assumed(self.dtype, self.shape)
        return sum(math.prod(p[1]) * p[3].itemsize for p in parts if isinstance(p, tuple))

    def __str__(self) -> str:
        kind = (
            f"{self.dtype} weight"
            if isinstance(self.dtype, str)
            else str(self.dtype).removeprefix("torch.")
        )
        return f"{kind}{list(self.shape)}"


@dataclass(frozen=True)
class Call:
    """The arguments of a call in declared order, tensors as Described, and which dims were taken
    from an example."""

    op: Op[..., Any]
    values: tuple[Any, ...]
    dims: Mapping[str, Any]
    assumed: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs."""
        return sum(t.nbytes for t in self.op.tensors(self.values).values())

    def facts(self, device: str, arch: str) -> Facts:
        """The facts of this call on a device of that type and architecture; ValueError or TypeError
        if it is invalid."""
        tensors, plain = self.op.tensors(self.values), self.op.arguments(self.values)
        kinds = {name: t.dtype for name, t in tensors.items()}
        bound = self.op.validate({name: t.shape for name, t in tensors.items()}, kinds, plain)
        layouts = dict.fromkeys(tensors, "contiguous")
        return Facts(device, arch, kinds, bound, layouts, plain)


def describe(
    op: Op[..., Any],
    dims: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    kinds: Mapping[str, Kind | None] | None = None,
    values: Mapping[str, Any] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Call:
    """The call of `op` with these dims; what they leave open comes from `example` (default: the
    first).

    dims     symbol -> size, a tuple of sizes for a symbol that stands for any leading dims
    dtype    of every tensor that may have it; the others take the first dtype that the declaration
             allows
    kinds    tensor -> another dtype, a quantised format, or None to leave an optional tensor out
    values   plain argument -> value

    Raises ValueError where a size or an argument is missing, or a tensor can't be left out.
    """
    wanted, plain = dict(kinds or {}), dict(values or {})
    example = op.examples[0] if example is None else example
    scope, absent = defaults(op, example), set()
    if op.sampler is not None:
        # The first example is small: its sample tells which tensors are absent and arguments that
        # dims don't give.
        for name, value in op.sampler(
            np.random.default_rng(0), {**scope, **op.examples[0]}
        ).items():
            if value is None:
                absent.add(name)
            elif name not in op.signature.inputs:
                scope.setdefault(name, value)
    scope.update({**dims, **plain})

    def make(name: str, shape: tuple[int, ...] | None, allowed: list[Kind]) -> Described | None:
        optional = op.signature.inputs[name].optional
        if name in wanted and wanted[name] is None:
            if not optional:
                raise ValueError(f"{op.name}: {name} is 'none'; it is not optional")
            return None
        if name in absent and name not in wanted:
            return None
        if shape is None:
            if optional and name not in wanted:
                return None
            raise ValueError(
                f"{op.name}: {name}{op.signature.inputs[name]} has a dim without a size; "
                "expected one for each"
            )
        kind = wanted.get(name)
        if kind is None:
            plain_kinds = [k for k in allowed if not isinstance(k, str)]
            kind = dtype if dtype in plain_kinds else plain_kinds[0]
        return Described(shape, kind)

    made = arguments(op, scope, dtype, make)
    known = {*op.signature.symbols(), *(p.name for p in op.parameters)}
    given = {*dims, *wanted, *plain}
    assumed = {s: v for s, v in example.items() if s in known and s not in given}
    return Call(op, made, dict(dims), assumed)


def without_memory(call: Call) -> tuple[Any, ...]:
    """The arguments, with tensors of torch's meta device."""
    return tuple(_meta(v) if isinstance(v, Described) else v for v in call.values)


def _meta(value: Described) -> Any:
    if isinstance(value.dtype, torch.dtype):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    *stored, spec = assumed(value.dtype, value.shape)
    return weight_from(*(p and torch.empty(p[1], dtype=p[3], device="meta") for p in stored), spec)


# With numbers -----------------------------------------------------------------------------------


def numbers(
    shape: tuple[int, ...], kind: Kind, device: torch.device, source: torch.Generator
) -> Any:
    """A tensor or QuantizedWeight of standard normal numbers; integers are 0."""
    if isinstance(kind, torch.dtype) and not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind, device=device)
    drawn = torch.randn(shape, generator=source, device=source.device, dtype=torch.float32)
    drawn = drawn.to(device)
    return transom.quantize(drawn, kind) if isinstance(kind, str) else drawn.to(kind)


def made(call: Call, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """The call's arguments with real tensors: standard normal floats, and what the operator's
    sample gives."""
    op, rng = call.op, np.random.default_rng(seed)
    tensors, plain = op.tensors(call.values), op.arguments(call.values)
    bound = op.signature.bind(op.name, {n: t.shape for n, t in tensors.items()}, plain)
    special = dict(op.sampler(rng, {**bound, **plain}) if op.sampler else {})
    source = torch.Generator(device=device).manual_seed(seed)
    values: list[Any] = []
    for p, value in zip(op.parameters, call.values, strict=True):
        found = special.get(p.name)
        if not isinstance(value, Described):
            values.append(value)
        elif found is not None and not isinstance(value.dtype, str):
            values.append(torch.from_numpy(np.ascontiguousarray(found)).to(value.dtype).to(device))
        else:
            values.append(numbers(value.shape, value.dtype, device, source))
    return tuple(values)


def filled(
    op: Op[..., Any],
    dims: Mapping[str, Any],
    dtype: torch.dtype,
    source: torch.Generator,
    **given: Any,
) -> dict[str, Any]:
    """The arguments of a call by name: those given, then defaults; required tensors that are not
    given hold standard normal numbers, optional ones are left out."""

    def make(name: str, shape: tuple[int, ...] | None, allowed: list[Kind]) -> Any:
        if name in given or op.signature.inputs[name].optional:
            return given.get(name)
        if shape is None:
            raise ValueError(f"{op.name}: {name} has a dim without a size; expected one for each")
        plain = [k for k in allowed if not isinstance(k, str)]
        kind = dtype if dtype in plain else plain[0]
        return numbers(shape, kind, torch.device("cpu"), source)

    known = {p.name for p in op.parameters}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{op.name}: {unknown[0]} is not an argument; expected some of {known}")
    values = arguments(op, defaults(op, {**dims, **given}), dtype, make)
    return dict(zip((p.name for p in op.parameters), values, strict=True))


def formats_of(op: Op[..., Any]) -> tuple[str, ...]:
    """The quantised formats that some weight of the operator may have."""
    allowed = (k for kinds in op.rules.alternatives.values() for k in kinds)
    return QUANTIZED if "quant" in allowed else ()
