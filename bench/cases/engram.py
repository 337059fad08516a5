"""Engram: hashing n-grams, gathering the rows that they name, gate and convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from transom.weights import QuantizedWeight

from ..models import Model
from . import PLAIN, Case, Draw, Inputs, Wanted, by_dtype, bytes_per_element, of_the_model
from .mhc import _made

VOCABULARY = 99_092


def cases(model: Model, wanted: Wanted) -> Iterator[Case]:
    """ngram_hash, hashed_embedding (new memory, the caller's, pooled), engram_gate, short_conv."""
    engram = model.engram
    if engram is None:
        return
    columns = (engram.sizes - 1) * engram.heads
    dims: dict[str, Any] = dict(n=engram.sizes, h=engram.heads, d=engram.dim, rows=engram.rows)
    for tokens in wanted.tokens:
        here = {**dims, "S": tokens}
        sweep = ("tokens", float(tokens))
        if PLAIN in wanted.formats:
            yield Case(
                "ngram_hash",
                model.name,
                f"{tokens:,} tokens",
                here,
                "i64",
                PLAIN,
                _hash(here),
                sweep=sweep,
            )
        for dtype, format in by_dtype(wanted, formats=True):
            one = engram.dim * bytes_per_element(dtype, format)
            # a power of two below what fits: one figure for every machine of about this size
            fit = max(1 << 10, 1 << int(wanted.memory / (one * columns)).bit_length() - 1)
            rows = min(engram.rows, fit)
            table = {**here, "rows": rows}
            scaled = of_the_model(rows, engram.rows, "rows of each column")
            for op in ("hashed_embedding", "hashed_embedding_out", "hashed_embedding_pooled"):
                yield Case(
                    op,
                    model.name,
                    f"{tokens:,} tokens",
                    table,
                    dtype,
                    format,
                    _gather(op, table, format),
                    scaled,
                    {"V": columns * engram.rows},
                    sweep,
                )
        for dtype, _ in by_dtype(wanted):
            wide = dict(T=tokens, R=model.streams, D=model.hidden, n=engram.sizes)
            yield Case(
                "engram_gate",
                model.name,
                f"T = {tokens:,}",
                wide,
                dtype,
                PLAIN,
                _gate(wide),
                sweep=sweep,
            )
            yield Case(
                "short_conv",
                model.name,
                f"{tokens:,} tokens",
                wide,
                dtype,
                PLAIN,
                _conv(wide),
                sweep=sweep,
            )


def _numbers(draw: Draw, d: Mapping[str, Any]) -> dict[str, Tensor]:
    """Multipliers, moduli and offsets; odd moduli that differ, as a model's primes do."""
    columns = (d["n"] - 1) * d["h"]
    moduli = d["rows"] - 1 - 2 * torch.arange(columns) - d["rows"] % 2
    return dict(
        multipliers=2 * draw.integers((1 << 62) // VOCABULARY, d["n"]) + 1,
        moduli=moduli.view(d["n"] - 1, d["h"]),
        offsets=torch.arange(columns) * d["rows"],
    )


def _hash(d: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    return _made_hash("ngram_hash", d, lambda g: _numbers(g, d))


def _made_hash(op: str, d: Mapping[str, Any], same: Any) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        one = _made(
            op,
            ("tokens",),
            lambda g: dict(tokens=g.integers(VOCABULARY, 1, d["S"])),
            lambda g: dict(pad=2, **same(g)),
        )(draw)
        one.few = None  # a token's rows depend on the tokens before it: the whole is compared
        one.cold = "tokens new each call"
        return one

    return make


def _gather(op: str, d: Mapping[str, Any], format: str) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        columns = (d["n"] - 1) * d["h"]
        count = columns * d["rows"]
        table = _table(draw, count, d["d"], format)
        plain = table if isinstance(table, Tensor) else table.values
        wide = draw.dtype if isinstance(table, Tensor) else torch.float32
        width = d["d"] if op == "hashed_embedding_pooled" else columns * d["d"]
        out = torch.empty(1, d["S"], width, dtype=wide)
        into: dict[str, Any] = {}
        if op == "hashed_embedding_out":
            into = {"out": out}

        def same(g: Draw) -> dict[str, Any]:
            return dict(table=table, **_numbers(g, d), **into)

        made = _made_hash(op, d, same)(draw)
        row = table.nbytes / count
        read = d["S"] * columns * row
        made.bytes = read + out.nbytes + d["S"] * 8
        # a row and what is written of it: the probe copies rows of the table's size
        made.table, made.table_bytes = plain, read
        from transom.cli import units

        made.cold = (
            f"{d['S'] * columns:,} rows of {row:.0f} bytes, new each call, of a table of "
            f"{units.memory(table.nbytes)}"
        )
        return made

    return make


def _table(draw: Draw, count: int, width: int, format: str) -> Tensor | QuantizedWeight:
    """[count, width] filled piece by piece with one drawn piece, so that it takes no minutes."""
    piece = draw.normal(1 << 14, width, dtype=torch.float32)
    if format == PLAIN:
        return _filled(piece.to(draw.dtype), count)
    import transom

    group: dict[str, Any] = {"fp8": dict(group=(1, 32), scale_format="e8m0")}.get(format, {})
    if format == "int4":
        group = dict(group=min(128, width))
    q = transom.quantize(piece, format, **group)
    values, scales = _filled(q.values, count), _filled(q.scales, count)
    zeros = None if q.zeros is None else _filled(q.zeros, count)
    return QuantizedWeight(format, values, scales, zeros, group=q.group)


def _filled(piece: Tensor, count: int) -> Tensor:
    out = torch.empty((count, *piece.shape[1:]), dtype=piece.dtype)
    for start in range(0, count, piece.shape[0]):
        some = min(piece.shape[0], count - start)
        out[start : start + some] = piece[:some]
    return out


def _gate(d: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    T, R, D = d["T"], d["R"], d["D"]
    return _made(
        "engram_gate",
        ("x", "key", "value"),
        lambda g: dict(x=g.normal(T, R, D), key=g.normal(T, R, D), value=g.normal(T, D)),
        lambda g: dict(weight=g.normal(R, D), eps=1e-6),
    )


def _conv(d: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    channels = d["R"] * d["D"]

    def make(draw: Draw) -> Inputs:
        made = _made(
            "short_conv",
            ("v",),
            lambda g: dict(v=g.normal(1, d["T"], channels)),
            lambda g: dict(weight=g.normal(channels, 4), dilation=d["n"]),
        )(draw)
        made.few = None
        return made

    return make
