"""Cases: calls of operators with the shapes of real models.

A Case is a description, cheap to make; `make` allocates its tensors. What a call reads anew in a
real model (routing, tokens, queries, another layer's cache) is drawn several times, and the calls
of a measurement take the draws in turn: a result must not rest on what the call before left in a
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from transom import dtypes
from transom.conformance.calls import filled
from transom.registry import OPS
from transom.weights import QuantizedWeight

from ..models import MODELS, Model

DRAWS = 8
"""Different inputs of a case, taken in turn."""

PLAIN = "plain"
"""The --format of weights that are not quantised."""


@dataclass(frozen=True)
class Wanted:
    """What to make cases of."""

    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    dtypes: tuple[str, ...]
    formats: tuple[str, ...]
    memory: int
    """Bytes that the tensors of one case may take."""
    experts: tuple[int, ...] = ()
    """Numbers of experts to cut a model to; empty: as many as the memory holds."""


@dataclass
class Inputs:
    """The tensors of a case and the work of one call."""

    draws: Sequence[Mapping[str, Any]]
    """Arguments of the declared operator by name; all draws have the same weights."""
    flops: float
    """Of the useful work: pairs that are attended, slots that have an expert."""
    bytes: float
    """That must move at least: what is touched, once."""
    few: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Callable[[Any], Any]]] | None = None
    """(a call of a few tokens of these arguments, how their results are found in the whole)."""
    table: Tensor | None = None
    """Rows of this are read at random: the ceiling is that of such reads."""
    table_bytes: float = 0.0
    """Bytes of rows read."""
    cold: str = ""
    """What is new in each call, and what the caches could hold, for the report."""


@dataclass(frozen=True)
class Case:
    """One call to measure."""

    op: str
    model: str
    label: str
    """What it is among the cases of its operator and model: 'T = 64', 'prefill 4k, CSA'."""
    dims: Mapping[str, Any]
    dtype: str
    format: str
    make: Callable[[Draw], Inputs] = field(compare=False, repr=False)
    scaled: str = ""
    """How much smaller than the model it is, to fit the memory; empty if it is not."""
    uncut: Mapping[str, int] = field(default_factory=dict)
    """Dims of the operator that the model has larger: a measured choice is stored for these."""
    sweep: tuple[str, float] | None = None
    """The axis that it is a point of ('tokens', 64), for the scaling charts."""
    integer: bool = False
    """True: the format allows integer dot products, so that their rate is the ceiling."""

    @property
    def title(self) -> str:
        """Its name in tables."""
        kind = self.dtype if self.format == PLAIN else f"{self.dtype}, {self.format} weights"
        return f"{MODELS[self.model].title}, {self.label}, {kind}"


_kept: dict[tuple[Any, ...], Any] = {}
"""The last weights that were drawn: the cases of one model differ in their tokens alone."""


def forget() -> None:
    """Free the weights that are kept for the next case."""
    _kept.clear()


class Draw:
    """Seeded random tensors."""

    def __init__(self, dtype: str, seed: int = 0) -> None:
        self.dtype = dtypes.parse(dtype)
        self.source = torch.Generator().manual_seed(seed)

    def call(self, op: str, sizes: Mapping[str, Any] | None = None, **given: Any) -> dict[str, Any]:
        """The arguments of a call by name: these, the declaration's defaults, and normal numbers
        in tensors of these sizes; optional tensors that are not given are left out."""
        return filled(OPS[op], sizes or {}, self.dtype, self.source, **given)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, spread: float = 1.0) -> Tensor:
        """Standard normal numbers times `spread`."""
        out = torch.randn(shape, generator=self.source)
        return (out.mul_(spread) if spread != 1.0 else out).to(dtype or self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in 0..high-1."""
        return torch.randint(high, shape, generator=self.source)

    def order(self, n: int) -> Tensor:
        """0..n-1 in random order."""
        return torch.randperm(n, generator=self.source)

    def experts(self, count: int, rows: int, columns: int, format: str) -> Tensor | QuantizedWeight:
        """[count, rows, columns] of fan-in scaled numbers, plain or quantised.

        One expert is drawn; the others are it with its rows turned by multiples of 128 (whole
        blocks of every format): drawing and quantising billions of numbers would take minutes.
        """
        key = (count, rows, columns, format, self.dtype)
        if key not in _kept:
            while len(_kept) > 1:  # gate and up, and down
                _kept.pop(next(iter(_kept)))
            _kept[key] = self._experts(*key[:4])
        return _kept[key]

    def _experts(self, count: int, rows: int, columns: int, format: str) -> Any:
        one = self.normal(rows, columns, spread=columns**-0.5, dtype=torch.float32)
        turns = [128 * e % rows for e in range(count)]
        if format == PLAIN:
            return _turned(one.to(self.dtype), turns, 1)
        import transom

        q = transom.quantize(one, format, group=32 if format == "int4" else None)
        high = q.group[0] or rows
        values, scales = _turned(q.values, turns, 1), _turned(q.scales, turns, high)
        zeros = None if q.zeros is None else _turned(q.zeros, turns, high)
        return QuantizedWeight(format, values, scales, zeros, group=q.group)


def _turned(one: Tensor, turns: Sequence[int], rows: int) -> Tensor:
    """[len(turns), ...]: `one` rolled along its rows, of which one stands for `rows`."""
    out = torch.empty((len(turns), *one.shape), dtype=one.dtype)
    for to, turn in zip(out, turns, strict=True):
        at = turn // rows % max(1, one.shape[0])
        to[: one.shape[0] - at] = one[at:]
        to[one.shape[0] - at :] = one[:at]
    return out


BITS = {"int8": 8.1, "int4": 5.25, "fp8": 8.01, "mxfp4": 4.25}
"""Of an element with its share of scales, in the layouts that Draw.experts makes."""


def bytes_per_element(dtype: str, format: str) -> float:
    """Of a weight."""
    return dtypes.parse(dtype).itemsize if format == PLAIN else BITS[format] / 8


def fitting(count: int, least: int, bytes_of_one: float, memory: int) -> int:
    """How many of `count` fit `memory`: all, else a multiple of 8, but at least `least`."""
    fit = int(memory // max(1.0, bytes_of_one))
    return count if fit >= count else max(least, fit // 8 * 8)


def of_the_model(kept: int, whole: int, what: str) -> str:
    """'16 of 256 experts', or nothing if all are there."""
    return "" if kept == whole else f"{kept:,} of {whole:,} {what}"


def short(n: int) -> str:
    """65536 as '64k', 1048576 as '1M': lengths of sequences."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return f"{n:,}"


def token_rows(name: str, *axes: str) -> Any:
    """Inputs.few for operators whose tokens (dim 0 of the tensors `axes`) are independent."""

    def few(values: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        count = values[axes[0]].shape[0]
        chosen = torch.unique(torch.tensor([0, count // 2, count - 1]))
        fewer = {n: v[chosen] if n in axes and v is not None else v for n, v in values.items()}
        return fewer, lambda out: out[chosen]

    assert name in OPS, name
    return few


def cases(
    names: Sequence[str], models: Sequence[str], wanted: Wanted, backward: bool = False
) -> Iterator[Case]:
    """The cases of these operators and models, small ones before large ones of a kind."""
    from . import attention, engram, mhc, moe
    from .backward import of_backward

    seen: set[tuple[Any, ...]] = set()
    for model in (MODELS[m] for m in models):
        for family in (moe, attention, engram, mhc):
            for case in family.cases(model, wanted):
                made = [case, *(of_backward(case) if backward else ())]
                for each in made:
                    key = (each.op, each.model, each.label, each.dtype, each.format)
                    if (not names or each.op in names) and key not in seen:
                        seen.add(key)
                        yield each


def by_dtype(wanted: Wanted, formats: bool = False) -> Iterator[tuple[str, str]]:
    """(dtype, format) of activations and weights; without `formats` plain weights only."""
    for dtype in wanted.dtypes:
        for format in wanted.formats:
            if format == PLAIN or formats:
                yield dtype, format


__all__ = ["DRAWS", "MODELS", "PLAIN", "Case", "Draw", "Inputs", "Model", "Wanted", "cases"]
