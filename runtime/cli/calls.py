"""A call that is asked for in text: sizes, arguments and dtypes of `transom explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..conformance.calls import Call, describe
from ..dtypes import QUANTIZED, SHORT, Kind
from ..op import Op
from .console import Refusal


def asked(
    op: Op[..., Any], shapes: Mapping[str, str], dtype: torch.dtype, settings: Mapping[str, str]
) -> Call:
    """The call of `op` with these sizes; the others are the first example's.

    shapes    symbol -> size, 2x8 for a symbol that stands for any leading dims
    dtype     of every tensor that may have it
    settings  argument -> value; tensor -> dtype, quantised format, or 'none' to leave an optional
              tensor out
    """
    symbols, parameters = op.signature.symbols(), {p.name: p for p in op.parameters}
    integers = [p.name for p in op.parameters if p.role == "value" and p.type.startswith("int")]
    _refuse_unknown(op, shapes, list(dict.fromkeys([*symbols, *integers])), "a dim")
    _refuse_unknown(op, settings, list(parameters), "an argument")
    kinds: dict[str, Kind | None] = {}
    values: dict[str, Any] = {}
    for name, text in settings.items():
        if parameters[name].role == "value":
            values[name] = _argument(op, name, parameters[name].type, text)
        else:
            kinds[name] = _kind(op, name, text)
    dims = {symbol: _sizes(op, symbol, text) for symbol, text in shapes.items()}
    return describe(op, dims, dtype, kinds=kinds, values=values)


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


def _sizes(op: Op[..., Any], symbol: str, text: str) -> Any:
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


def _kind(op: Op[..., Any], name: str, text: str) -> Kind | None:
    """A tensor's dtype or format; None for 'none'."""
    if text == "none":
        return None
    if text in QUANTIZED and "quant" in op.rules.alternatives.get(name, ()):
        return text
    if text not in SHORT:
        raise Refusal(f"{op.name}: {name} is {text!r}; expected one of {', '.join(SHORT)}")
    return SHORT[text]


def _refuse_unknown(
    op: Op[..., Any], given: Mapping[str, Any], known: list[str], what: str
) -> None:
    for name in given:
        if name not in known:
            raise Refusal(f"{op.name}: {name} is not {what}; expected one of {', '.join(known)}")
