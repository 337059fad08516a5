"""Mixture of experts: routing, the grouped product, and the whole block of experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from transom.weights import QuantizedWeight

from ..models import Experts, Model
from . import (
    DRAWS,
    Case,
    Draw,
    Inputs,
    Wanted,
    by_dtype,
    bytes_per_element,
    fitting,
    of_the_model,
    token_rows,
)

CHECKED_BYTES = 1.3e9
"""Of experts in float64 that the reference is given."""


def cases(model: Model, wanted: Wanted) -> Iterator[Case]:
    """moe_experts, grouped_gemm (its first product) and route for each number of tokens."""
    block = model.experts
    if block is None:
        return
    for dtype, format in by_dtype(wanted, formats=True):
        one = 3 * block.width * model.hidden * bytes_per_element(dtype, format)
        most = fitting(block.count, block.chosen, one, wanted.memory)
        cut = [min(max(n, block.chosen), most) for n in wanted.experts]
        for count, tokens in itertools.product(dict.fromkeys(cut or [most]), wanted.tokens):
            scaled = of_the_model(count, block.count, "experts")
            dims = dict(
                T=tokens,
                D=model.hidden,
                I=block.width,
                E=count,
                K=block.chosen,
                activation=block.activation,
                limit=block.limit,
                interleaved=block.interleaved,
            )
            whole = {"E": block.count}
            sweep = ("experts", float(count)) if cut else ("tokens", float(tokens))
            integer = format in ("int8", "int4", "mxfp4")
            label = f"T = {tokens:,}" + (f", {count} experts" if cut else "")
            yield Case(
                "moe_experts",
                model.name,
                label,
                dims,
                dtype,
                format,
                _experts(dims, block, format),
                scaled,
                whole,
                sweep,
                integer,
            )
            rows = dict(M=tokens * block.chosen, K=model.hidden, N=2 * block.width, E=count)
            yield Case(
                "grouped_gemm",
                model.name,
                f"{label}, gate and up",
                rows,
                dtype,
                format,
                _product(dims, format),
                scaled,
                whole,
                sweep,
                integer,
            )
    for dtype, _ in by_dtype(wanted):
        for tokens in wanted.tokens:
            dims = dict(T=tokens, E=block.count, k=block.chosen, score=block.score)
            yield Case(
                "route",
                model.name,
                f"T = {tokens:,}",
                dims,
                dtype,
                "plain",
                _route(dims, block),
                sweep=("tokens", float(tokens)),
            )


def _slots(draw: Draw, dims: Mapping[str, Any]) -> Tensor:
    """ids[T,K]: for each token K different experts, all choices alike."""
    scores = torch.rand(dims["T"], dims["E"], generator=draw.source)
    return scores.topk(dims["K"]).indices


def _experts(dims: Mapping[str, Any], block: Experts, format: str) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        T, D, I, E, K = (dims[n] for n in "TDIEK")
        gate_up, down = draw.experts(E, 2 * I, D, format), draw.experts(E, D, I, format)
        biases: dict[str, Tensor] = {}
        if block.bias:
            biases = dict(gate_up_bias=draw.normal(E, 2 * I), down_bias=draw.normal(E, D))
        same: dict[str, Any] = dict(
            gate_up=gate_up,
            down=down,
            **biases,
            activation=block.activation,
            limit=block.limit,
            interleaved=block.interleaved,
        )
        slots = _slots(draw, dims)
        draws = []
        for _ in range(DRAWS):
            # The same work for other experts: the numbers of experts are dealt anew.
            ids = draw.order(E)[slots]
            weights = torch.softmax(draw.normal(T, K, dtype=torch.float32), -1)
            x = draw.normal(T, D)
            draws.append(draw.call("moe_experts", x=x, ids=ids, weights=weights, **same))
        used = slots.unique().numel()
        item, held = draw.dtype.itemsize, gate_up.nbytes + down.nbytes
        moved = used * held / E + 2 * T * D * item + T * K * 12
        told = f"experts of each call dealt anew: {used} of {E} in a call, {_size(held)} in all"
        return Inputs(draws, 6.0 * T * K * D * I, moved, _few_tokens, cold=told)

    return make


def _few_tokens(values: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """A few tokens with only their experts: the reference wants the weights in float64."""
    T, K = values["ids"].shape
    one = 8 * (values["gate_up"].shape[1] + values["down"].shape[2]) * values["x"].shape[1]
    most = max(1, int(CHECKED_BYTES / (K * one)))
    chosen = torch.unique(torch.tensor([0, T // 2, T - 1]))[:most]
    used, places = values["ids"][chosen].unique(return_inverse=True)
    fewer = {**values, "ids": places}
    for name in ("x", "weights"):
        fewer[name] = values[name][chosen]
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        if values[name] is not None:
            fewer[name] = _picked(values[name], used)
    return fewer, lambda out: out[chosen]


def _picked(weight: Tensor | QuantizedWeight, used: Tensor) -> Tensor | QuantizedWeight:
    if isinstance(weight, Tensor):
        return weight[used]
    zeros = None if weight.zeros is None else weight.zeros[used]
    parts = weight.values[used], weight.scales[used]
    return QuantizedWeight(weight.format, *parts, zeros, group=weight.group)


def _product(dims: Mapping[str, Any], format: str) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        D, E, rows, N = dims["D"], dims["E"], dims["T"] * dims["K"], 2 * dims["I"]
        weight = draw.experts(E, N, D, format)
        counts = torch.bincount(_slots(draw, dims).flatten(), minlength=E)
        draws = [
            dict(x=draw.normal(rows, D), weight=weight, offsets=counts[draw.order(E)].cumsum(0))
            for _ in range(DRAWS)
        ]
        used = int((counts > 0).sum())
        moved = used * weight.nbytes / E + rows * (D + N) * draw.dtype.itemsize
        told = f"experts of each call dealt anew: {used} of {E} have rows, {_size(weight.nbytes)}"
        return Inputs(draws, 2.0 * rows * D * N, moved, _few_rows, cold=told)

    return make


def _few_rows(values: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    rows = values["x"].shape[0]
    chosen = torch.unique(torch.tensor([0, rows // 2, rows - 1]))
    # the expert of row r is the first whose end lies beyond it
    experts = torch.searchsorted(values["offsets"], chosen, right=True)
    used, places = experts.unique(return_inverse=True)
    ends = torch.bincount(places, minlength=used.numel()).cumsum(0)
    fewer = dict(x=values["x"][chosen], weight=_picked(values["weight"], used), offsets=ends)
    return fewer, lambda out: out[chosen]


def _route(dims: Mapping[str, Any], block: Experts) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        T, E, k = dims["T"], dims["E"], dims["k"]
        bias = None
        if block.score in ("sigmoid", "sqrtsoftplus"):
            bias = draw.normal(E, dtype=torch.float32, spread=0.1)
        # steps that every dtype holds, and no two alike in a row: a tie has no one answer
        steps = torch.linspace(-4.0, 4.0, E)
        draws = [
            draw.call(
                "route",
                logits=torch.stack([steps[draw.order(E)] for _ in range(min(T, 64))])
                .repeat(-(-T // 64), 1)[:T]
                .to(draw.dtype),
                bias=bias,
                k=k,
                score=block.score,
                groups=block.groups,
                top_groups=block.top_groups,
                scale=block.scale,
            )
            for _ in range(DRAWS)
        ]
        moved = T * E * draw.dtype.itemsize + T * k * 8
        few = token_rows("route", "logits")
        return Inputs(draws, 8.0 * T * E + 3.0 * T * k, moved, few, cold="logits new each call")

    return make


def _size(value: float) -> str:
    from transom.cli import units

    return units.memory(value)
