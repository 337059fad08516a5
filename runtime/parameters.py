"""Parameters of an operator, read from its function, and the glue of a call compiled from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .shapes import Signature
from .weights import weight_args, weight_from

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
    if kind == "int[]":
        return isinstance(value, (tuple, list)) and all(fits(v, "int") for v in value)
    # SymInt and SymFloat stand for ints and floats while torch traces
    return isinstance(value, _TYPES[kind]) or type(value).__name__ in _SYMBOLIC


def schema_of(parameter: inspect.Parameter) -> str | None:
    """The torch schema's type of a plain parameter; None for tensors and objects of ours."""
    return _SCHEMA.get(parameter.annotation)


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


def call_glue(op: str, parameters: Sequence[Parameter]) -> dict[str, Callable[..., Any]]:
    """Functions with the operator's own parameters, compiled once as dataclasses do: a loop over
    the parameters takes four times as long, and torch.compile would guard every one of them.

    bind     a call's arguments in declared order        invoke     implementation(arguments)
    flatten  arguments of the torch operator             unflatten  the reverse
    """
    scope: dict[str, Any] = {"_args": weight_args, "_from": weight_from}
    bind, invoke, flatten, flat, unflatten = [], [], [], [], []
    for p in parameters:
        n = p.name
        if p.keyword_only and "*" not in bind:
            bind.append("*")
        if p.default is not inspect.Parameter.empty:
            scope[f"_d_{n}"] = p.default
        bind.append(n if p.default is inspect.Parameter.empty else f"{n}=_d_{n}")
        invoke.append(f"{n}={n}" if p.keyword_only else n)
        if p.role != "weight":
            flatten.append(n)
            flat.append(n)
            unflatten.append(n)
            continue
        optional = p.type == "Tensor?"
        absent = f"(None, None, None, '') if {n} is None else " if optional else ""
        flatten.append(f"*({absent}_args({n}))")
        flat += [n, f"{n}_scales", f"{n}_zeros", f"{n}_spec"]
        whole = f"_from({n}, {n}_scales, {n}_zeros, {n}_spec, '{op}: {n}')"
        unflatten.append(f"None if {n} is None else {whole}" if optional else whole)
    everything = ", ".join(p.name for p in parameters)
    source = f"""
def bind({", ".join(bind)}): return ({everything},)
def invoke(_f, {everything}): return _f({", ".join(invoke)})
def flatten({everything}): return ({", ".join(flatten)},)
def unflatten({", ".join(flat)}): return ({", ".join(unflatten)},)
"""
    exec(compile(source, f"<transom {op}>", "exec"), scope)  # noqa: S102
    # a wrong keyword then names the operator
    scope["bind"].__name__ = scope["bind"].__qualname__ = op
    return scope
