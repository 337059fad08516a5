"""A call from dims and dtypes instead of tensors: what `explain` and `tune` are asked about.

The declaration says which tensors there are and their shapes; dims that are not given come from the
operator's first example. A Declared stands for a tensor of any size and holds no memory.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..dtypes import QUANTIZED, SHORT, Kind
from ..facts import Facts
from ..op import Op
from .console import Refusal

_GROUP = {"int8": 0, "int4": 128, "fp8": 128 * 128, "mxfp4": 32}
"""Elements that share one scale in each format's default layout; 0 is a whole row."""


@dataclass(frozen=True)
class Declared:
    """A tensor that is described but not there."""

    shape: tuple[int, ...]
    dtype: Kind

    @property
    def nbytes(self) -> int:
        """Its size in bytes; for a quantised weight with its scales in the default layout."""
        elements = math.prod(self.shape)
        if not isinstance(self.dtype, str):
            return elements * self.dtype.itemsize
        packed = elements // 2 if self.dtype in ("int4", "mxfp4") else elements
        group = _GROUP[self.dtype] or max(1, self.shape[-1])
        return packed + math.ceil(elements / group) * (1 if self.dtype == "mxfp4" else 4)

    def __str__(self) -> str:
        kind = (
            f"{self.dtype} weight"
            if isinstance(self.dtype, str)
            else str(self.dtype).removeprefix("torch.")
        )
        return f"{kind}{list(self.shape)}"


@dataclass(frozen=True)
class DeclaredCall:
    """The arguments of a call in declared order, and which dims were taken from the first
    example."""

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
        tensors, arguments = self.op.tensors(self.values), self.op.arguments(self.values)
        kinds = {name: t.dtype for name, t in tensors.items()}
        bound = self.op.validate({name: t.shape for name, t in tensors.items()}, kinds, arguments)
        layouts = dict.fromkeys(tensors, "contiguous")
        return Facts(device, arch, kinds, bound, layouts, arguments)


def declared_call(
    op: Op[..., Any],
    dims: Mapping[str, Any],
    dtype: torch.dtype,
    settings: Mapping[str, str] | None = None,
    example: Mapping[str, Any] | None = None,
) -> DeclaredCall:
    """The call of `op` with these dims; what they leave open comes from `example` (default: the
    first).

    dims      symbol -> size, a tuple of sizes for a symbol that stands for any leading dims
    dtype     of every tensor that may have it; the others take the first dtype that the declaration
              allows
    settings  argument -> value; tensor -> dtype, quantised format, or 'none' to leave an optional
              tensor out
    """
    settings = dict(settings or {})
    example = op.examples[0] if example is None else example
    symbols = set(op.signature.symbols()) | {p.name for p in op.parameters}
    integers = [p.name for p in op.parameters if p.role == "value" and p.type.startswith("int")]
    _refuse_unknown(op, dims, list(dict.fromkeys([*op.signature.symbols(), *integers])), "a dim")
    _refuse_unknown(op, settings, [p.name for p in op.parameters], "an argument")
    scope = {
        p.name: p.default
        for p in op.parameters
        if p.role == "value" and p.default is not inspect.Parameter.empty
    }
    scope.update(example)
    absent: set[str] = set()
    if op.sampler is not None:
        # The first example is small: its sample tells which tensors are absent and arguments that
        # dims don't give.
        first = {**scope, **op.examples[0]}
        for name, value in op.sampler(np.random.default_rng(0), first).items():
            if value is None:
                absent.add(name)
            elif name not in op.signature.inputs:
                scope.setdefault(name, value)
    given = {s: _sizes(op, s, size) for s, size in dims.items()}
    scope.update(given)
    for p in op.parameters:
        if p.role == "value" and p.name in settings:
            scope[p.name] = _argument(op, p.name, p.type, settings[p.name])
    assumed = {
        s: v for s, v in example.items() if s in symbols and s not in dims and s not in settings
    }
    values: list[Any] = []
    kinds: dict[str, Kind] = {}
    for p in op.parameters:
        if p.role == "value":
            if p.name not in scope:
                raise Refusal(f"{op.name}: {p.name} has no value; add --set {p.name}=...")
            values.append(scope[p.name])
            continue
        shape = op.signature.inputs[p.name]
        wanted = settings.get(p.name)
        leave = wanted == "none" or (wanted is None and p.name in absent)
        if wanted == "none" and not shape.optional:
            raise Refusal(f"{op.name}: {p.name} is 'none'; it is not optional")
        try:
            sizes = None if leave else shape.sizes(scope)
        except (KeyError, NameError, TypeError):
            if not shape.optional or wanted is not None:
                raise Refusal(
                    f"{op.name}: {p.name}{shape} has a dim without a size; add it to --shapes"
                ) from None
            sizes = None
        if sizes is None:
            values.append(None)
            continue
        kinds[p.name] = _kind(op, p.name, wanted, dtype, kinds)
        values.append(Declared(tuple(int(n) for n in sizes), kinds[p.name]))
    return DeclaredCall(op, tuple(values), {**given}, assumed)


def materialise(call: DeclaredCall, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """The call's arguments with real tensors: standard normal floats, and what the operator's
    sample gives."""
    op, rng = call.op, np.random.default_rng(seed)
    scope = {
        p.name: v for p, v in zip(op.parameters, call.values, strict=True) if p.role == "value"
    }
    tensors = op.tensors(call.values)
    bound = op.signature.bind(op.name, {n: t.shape for n, t in tensors.items()}, scope)
    special = dict(op.sampler(rng, {**bound, **scope}) if op.sampler else {})
    generator = torch.Generator(device=device).manual_seed(seed)
    values: list[Any] = []
    for p, value in zip(op.parameters, call.values, strict=True):
        if not isinstance(value, Declared):
            values.append(value)
            continue
        assert isinstance(value.dtype, torch.dtype)
        found = special.get(p.name)
        if found is not None:
            values.append(torch.from_numpy(np.ascontiguousarray(found)).to(value.dtype).to(device))
        elif value.dtype.is_floating_point:
            drawn = torch.randn(
                value.shape, generator=generator, device=device, dtype=torch.float32
            )
            values.append(drawn.to(value.dtype))
        else:
            values.append(torch.zeros(value.shape, dtype=value.dtype, device=device))
    return tuple(values)


def parse_pairs(text: str, option: str) -> dict[str, str]:
    """'M=4096,K=2048' as a dict; a Refusal names the piece that is not name=value."""
    out = {}
    for piece in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = piece.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise Refusal(
                f"{option}: {piece!r} was given; expected name=value, separated by commas"
            )
        out[name.strip()] = value.strip()
    return out


def _sizes(op: Op[..., Any], symbol: str, text: Any) -> Any:
    if not isinstance(text, str):
        return text
    starred = any(
        f"*{symbol}" in s.dims
        for s in (*op.signature.inputs.values(), *op.signature.outputs.values())
    )
    try:
        sizes = tuple(int(n) for n in text.split("x"))
    except ValueError:
        sizes = (-1,)
    if min(sizes) < 0 or (len(sizes) > 1 and not starred):
        form = "sizes like 8 or 2x8" if starred else "an integer of 0 or more"
        raise Refusal(f"--shapes: {symbol} is {text!r}; expected {form}")
    return sizes if starred else sizes[0]


def _argument(op: Op[..., Any], name: str, schema: str, text: str) -> Any:
    kind = schema.removesuffix("?")
    if text == "none" and schema.endswith("?"):
        return None
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind == "int[]":
            return tuple(int(n) for n in text.split("x"))
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        expected = {
            "bool": "true or false",
            "int[]": "integers like 1x2",
            "int": "an integer",
            "float": "a number",
        }[kind]
        raise Refusal(f"{op.name}: {name} is {text!r}; expected {expected}") from None


def _kind(
    op: Op[..., Any], name: str, wanted: str | None, dtype: torch.dtype, kinds: Mapping[str, Kind]
) -> Kind:
    """The dtype of one tensor: as asked, else `dtype` where it is allowed, else the first that
    is."""
    if wanted in QUANTIZED and "quant" in op.rules.alternatives.get(name, ()):
        return wanted
    if wanted is not None:
        if wanted not in SHORT:
            raise Refusal(f"{op.name}: {name} is {wanted!r}; expected one of {', '.join(SHORT)}")
        return SHORT[wanted]
    if name not in op.rules.alternatives:
        return dtype
    # A rule may name a tensor that comes later (or is absent): those count as having the dtype
    # asked for.
    allowed = op.rules.allowed(name, {**dict.fromkeys(op.signature.inputs, dtype), **kinds})
    plain: Sequence[Kind] = [k for k in allowed if not isinstance(k, str)]
    return dtype if dtype in plain else plain[0]


def _refuse_unknown(
    op: Op[..., Any], given: Mapping[str, Any], known: list[str], what: str
) -> None:
    for name in given:
        if name not in known:
            raise Refusal(f"{op.name}: {name} is not {what}; expected one of {', '.join(known)}")
