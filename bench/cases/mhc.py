"""Hyper-connections: the steps around each sublayer, and the Sinkhorn iterations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..models import Model
from . import DRAWS, Case, Draw, Inputs, Wanted, by_dtype, token_rows

_EPS = dict(eps=1e-6, rms_eps=1e-6)


def cases(model: Model, wanted: Wanted) -> Iterator[Case]:
    """mhc_pre, mhc_post, mhc_head and sinkhorn for each number of tokens."""
    if not model.streams:
        return
    for dtype, _ in by_dtype(wanted):
        for tokens in wanted.tokens:
            dims = dict(T=tokens, R=model.streams, D=model.hidden, iterations=model.iterations)
            for op, make in (
                ("mhc_pre", _pre),
                ("mhc_post", _post),
                ("mhc_head", _head),
                ("sinkhorn", _sinkhorn),
            ):
                yield Case(
                    op,
                    model.name,
                    f"T = {tokens:,}",
                    dims,
                    dtype,
                    "plain",
                    make(dims),
                    sweep=("tokens", float(tokens)),
                )


def _made(
    op: str,
    axes: tuple[str, ...],
    one: Callable[[Draw], dict[str, Any]],
    same: Callable[[Draw], dict[str, Any]],
) -> Callable[[Draw], Inputs]:
    """Inputs of new tensors `one` and constant ones `same`, with the declared cost."""

    def make(draw: Draw) -> Inputs:
        from transom.registry import OPS

        constant = same(draw)
        draws = [draw.call(op, **one(draw), **constant) for _ in range(DRAWS)]
        declared = OPS[op]
        cost = declared.cost([draws[0][p.name] for p in declared.parameters])
        told = f"{DRAWS} inputs in turn"
        return Inputs(draws, cost.flops, cost.bytes, token_rows(op, *axes), cold=told)

    return make


def _pre(d: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    T, R, D, N = d["T"], d["R"], d["D"], (2 + d["R"]) * d["R"]
    return _made(
        "mhc_pre",
        ("x",),
        lambda g: dict(x=g.normal(T, R, D)),
        lambda g: dict(
            fn=g.normal(N, R * D, dtype=torch.float32, spread=(R * D) ** -0.5),
            scale=torch.ones(3),
            base=g.normal(N, dtype=torch.float32),
            iterations=d["iterations"],
            post_scale=2.0,
            **_EPS,
        ),
    )


def _post(d: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    T, R, D = d["T"], d["R"], d["D"]
    return _made(
        "mhc_post",
        ("f", "x", "post", "comb"),
        lambda g: dict(
            f=g.normal(T, D),
            x=g.normal(T, R, D),
            post=g.normal(T, R, dtype=torch.float32),
            comb=torch.softmax(g.normal(T, R, R, dtype=torch.float32), -1),
        ),
        lambda g: {},
    )


def _head(d: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    T, R, D = d["T"], d["R"], d["D"]
    return _made(
        "mhc_head",
        ("x",),
        lambda g: dict(x=g.normal(T, R, D)),
        lambda g: dict(
            fn=g.normal(R, R * D, dtype=torch.float32, spread=(R * D) ** -0.5),
            scale=torch.ones(1),
            base=g.normal(R, dtype=torch.float32),
            **_EPS,
        ),
    )


def _sinkhorn(d: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    T, R = d["T"], d["R"]
    return _made(
        "sinkhorn",
        ("logits",),
        lambda g: dict(logits=g.normal(T, R, R)),
        lambda g: dict(iterations=d["iterations"], eps=1e-6),
    )
