"""Parameters of an operator, read from its function, and the glue of a call compiled from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .shapes import Signature
from .weights import QuantizedWeight, host_memory, weight_args, weight_from

PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types of ordinary tensors: a subclass may change what an operation means."""

_SCHEMA = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "int | None": "int?",
    "str | None": "str?",
    "float | None": "float?",
    "tuple[int, ...]": "int[]",
    "tuple[int, ...] | None": "int[]?",
    "tuple[int, int] | None": "int[]?",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "int[]": (tuple, list),
}

_SYMBOLIC = ("SymInt", "SymFloat", "SymBool")


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operator: a tensor, a weight (a tensor or a QuantizedWeight), or a plain
    value."""

    name: str
    role: str
    """'tensor', 'weight' or 'value'."""
    type: str
    """The torch schema's type: 'Tensor', 'Tensor?', 'int', 'float?', 'int[]' ..."""
    optional: bool
    keyword_only: bool
    default: Any


def fits(value: Any, schema: str) -> bool:
    """True if `value` is of the schema's type."""
    if value is None:
        return schema.endswith("?")
    kind = schema.removesuffix("?")
    if kind in ("int", "float") and isinstance(value, bool):
        return False
    # SymInt and SymFloat stand for ints and floats while torch traces
    return isinstance(value, _TYPES[kind]) or type(value).__name__ in _SYMBOLIC


def parameters_of(function: Callable[..., Any], signature: Signature) -> tuple[Parameter, ...]:
    """The parameters of a declaration's function; TypeError where annotations and shapes
    disagree."""
    out = []
    for p in inspect.signature(function).parameters.values():
        annotation = (
            p.annotation if isinstance(p.annotation, str) else getattr(p.annotation, "__name__", "")
        )
        default = None if p.default is p.empty else p.default
        optional = annotation.endswith("| None")
        if p.name in signature.inputs:
            if optional != signature.inputs[p.name].optional:
                raise TypeError(
                    f"{function.__name__}: {p.name} is annotated {annotation!r}; "
                    "the shapes say otherwise"
                )
            role = "weight" if annotation.startswith("Weight") else "tensor"
            kind = "Tensor?" if optional else "Tensor"
        elif annotation in _SCHEMA:
            role, kind = "value", _SCHEMA[annotation]
        else:
            raise TypeError(
                f"{function.__name__}: {p.name} is annotated {annotation!r}; "
                f"expected one of {[*_SCHEMA]}"
            )
        has_default = p.default is not p.empty
        out.append(
            Parameter(
                p.name,
                role,
                kind,
                optional or has_default,
                p.kind is p.KEYWORD_ONLY,
                default if has_default else inspect.Parameter.empty,
            )
        )
    missing = signature.inputs.keys() - {p.name for p in out}
    if missing:
        raise TypeError(
            f"{function.__name__}: shapes name {sorted(missing)}; "
            "the function has no such parameters"
        )
    return tuple(out)


def autocast_rules(text: str) -> dict[str, str]:
    """`low: x weight; f32: logits` by argument."""
    out = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        mode, _, names = part.partition(":")
        if mode not in ("low", "f32"):
            raise ValueError(f"autocast: {mode!r} is unknown; expected low or f32")
        out.update(dict.fromkeys(names.split(), mode))
    return out


def call_glue(
    op: str, parameters: Sequence[Parameter], host: Sequence[str] = ()
) -> dict[str, Callable[..., Any]]:
    """Functions with the operator's own parameters, compiled once as dataclasses do: the hot path
    has no loop.

    bind     a call's arguments in declared order        invoke   implementation(arguments)
    key      what a plan depends on                      plain    every tensor is an ordinary
             torch.Tensor
    flatten  arguments of the torch operator             unflatten  the reverse
    """
    names = [p.name for p in parameters]
    scope: dict[str, Any] = {
        "_W": QuantizedWeight,
        "_args": weight_args,
        "_from": weight_from,
        "_PLAIN": PLAIN,
        "_PLAIN_WEIGHT": PLAIN | {QuantizedWeight},
        "_pinned": host_memory.pinned,
    }
    bind, invoke, key, plain, flatten, flat, unflatten = [], [], [], [], [], [], []
    star = False
    for p in parameters:
        n = p.name
        if p.keyword_only and not star:
            bind.append("*")
            star = True
        if p.default is not inspect.Parameter.empty:
            scope[f"_d_{n}"] = p.default
        bind.append(n if p.default is inspect.Parameter.empty else f"{n}=_d_{n}")
        invoke.append(f"{n}={n}" if p.keyword_only else n)
        absent = f"None if {n} is None else " if p.type == "Tensor?" else ""
        if p.role == "tensor":
            key.append(f"{absent}({n}.shape, {n}.stride(), {n}.dtype, {n}.device)")
            plain.append((f"{n} is None or " if absent else "") + f"type({n}) in _PLAIN")
            flatten.append(n)
            flat.append(n)
            unflatten.append(n)
        elif p.role == "weight":
            key.append(
                f"{absent}({n}.key if type({n}) is _W "
                f"else ({n}.shape, {n}.stride(), {n}.dtype, {n}.device))"
            )
            plain.append((f"{n} is None or " if absent else "") + f"type({n}) in _PLAIN_WEIGHT")
            flatten.append(
                f"*((None, None, None, '') if {n} is None else _args({n}))"
                if absent
                else f"*_args({n})"
            )
            flat += [n, f"{n}_scales", f"{n}_zeros", f"{n}_spec"]
            unflatten.append(f"{absent}_from({n}, {n}_scales, {n}_zeros, {n}_spec, '{op}: {n}')")
        else:
            key.append(f"None if {n} is None else tuple({n})" if p.type.startswith("int[]") else n)
            flatten.append(n)
            flat.append(n)
            unflatten.append(n)
    key += [f"_pinned({n}, {names[0]})" for n in host]
    everything = ", ".join(names)
    source = f"""
def bind({", ".join(bind)}): return ({everything},)
def invoke(_f, {everything}): return _f({", ".join(invoke)})
def key({everything}): return ({", ".join(key)},)
def plain({everything}): return {" and ".join(f"({p})" for p in plain)}
def flatten({everything}): return ({", ".join(flatten)},)
def unflatten({", ".join(flat)}): return ({", ".join(unflatten)},)
"""
    exec(compile(source, f"<transom {op}>", "exec"), scope)  # noqa: S102
    # a wrong keyword then names the operator
    scope["bind"].__name__ = scope["bind"].__qualname__ = op
    return scope
