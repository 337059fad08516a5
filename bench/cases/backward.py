"""The backward operators of a case: their inputs come from a forward call, by their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from transom import dtypes
from transom.registry import OPS

from . import PLAIN, Case, Draw, Inputs


def of_backward(case: Case) -> Iterator[Case]:
    """The cases of the operators that differentiate this one; quantised weights have none."""
    for name in [name for name in OPS if name.startswith(f"{case.op}_backward")]:
        if case.format == PLAIN and dtypes.parse(case.dtype).is_floating_point:
            yield Case(
                name,
                case.model,
                case.label,
                case.dims,
                case.dtype,
                case.format,
                _maker(case, name),
                case.scaled,
                case.uncut,
                case.sweep,
            )


def _maker(case: Case, name: str) -> Any:
    def make(draw: Draw) -> Inputs:
        forward, backward = OPS[case.op], OPS[name]
        inputs = case.make(draw)
        draws = []
        for values in inputs.draws[:2]:
            out = forward.call(**values)
            outs = out if isinstance(out, tuple) else (out,)
            results = dict(zip(forward.signature.outputs, outs, strict=True))
            draws.append({p.name: _given(p, values, results, draw) for p in backward.parameters})
        cost = backward.cost([draws[0][p.name] for p in backward.parameters])
        dense = max(1.0, forward.cost([inputs.draws[0][p.name] for p in forward.parameters]).flops)
        # useful work as in the forward: the same share of the declared one
        flops = cost.flops * inputs.flops / dense
        return Inputs(draws, flops, cost.bytes, None, cold="two inputs in turn")

    return make


def _given(p: Any, values: Any, results: Any, draw: Draw) -> Any:
    """One argument: of the forward call, of its results, or the gradient of a result."""
    if p.name in values and values[p.name] is not None:
        return values[p.name]
    if p.name in results:
        return results[p.name]
    of = results.get(p.name[1:])
    hashed = "moduli" in values
    if p.name.startswith("d") and of is not None and not hashed:
        return torch.randn(of.shape, generator=draw.source).to(of.dtype)
    if p.name == "rows":
        return values["table"].shape[0]
    if p.name == "dy":  # of the lookup, its last dim split in columns and elements
        y, columns = results["y"], values["moduli"].numel()
        made = torch.randn((*y.shape[:2], columns, y.shape[2] // columns), generator=draw.source)
        return made.to(y.dtype)
    if p.name == "sink":
        heads = values["q"].shape[2]
        return torch.full((heads,), -torch.inf, dtype=values["q"].dtype)
    if p.name == "local_kv":
        return values["kv"][:, :0]
    return None
