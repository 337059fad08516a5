"""Choosing implementations by measurement, for the shapes of a model: `transom tune --model`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transom import dispatch
from transom import selection as selection_
from transom.errors import SlowPath
from transom.facts import Facts
from transom.measured import store
from transom.op import Op
from transom.registry import OPS

from .cases import Case, Draw, Wanted, cases, forget
from .ceilings import Ceilings
from .measure import Row, Settings, measure
from .run import Progress


@dataclass(frozen=True)
class Choice:
    """What was found for one case."""

    case: Case
    rows: tuple[Row, ...]
    """Fastest first; those with a wrong result last."""
    chosen: str | None
    """None: no implementation gave a right result."""


def choose(
    names: Sequence[str], model: str, wanted: Wanted, settings: Settings, progress: Progress
) -> Iterator[Choice]:
    """Time what can run the model's calls and store the fastest, where there is a choice.

    A model that is cut to fit the memory (fewer experts, fewer rows) is timed so, and the choice is
    stored for the model's own numbers: it does not hang on how many experts lie beside those that a
    call reads.
    """
    progress.start("measuring the machine's ceilings")
    ceilings = Ceilings(torch.get_num_threads(), wanted.memory)
    listed = list(cases(names, [model], wanted))
    progress.start(f"{len(listed)} calls of {model}", len(listed))
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPath)
            rates: dict[tuple[object, ...], float] = {}
            for case in listed:
                progress.start(f"{case.op}: {case.title}")
                op, inputs = OPS[case.op], case.make(Draw(case.dtype))
                values = [inputs.draws[0][p.name] for p in op.parameters]
                facts = dispatch.facts_of(op, values)
                if len(selection_.able(op, facts)) > 1:
                    rows = measure(case, lambda *_: [], ceilings, settings, rates, inputs=inputs)
                    rows.sort(key=lambda r: r.median if r.seconds else float("inf"))
                    chosen = rows[0].candidate if rows[0].seconds else None
                    if chosen is not None:
                        facts = dataclasses.replace(facts, dims={**facts.dims, **case.uncut})
                        for indices in (torch.int32, torch.int64):
                            store(op, _with(op, facts, indices), chosen)
                    yield Choice(case, tuple(rows), chosen)
                progress.advance()
    finally:
        forget()


def _with(op: Op[..., Any], facts: Facts, indices: torch.dtype) -> Facts:
    """The facts with all index tensors of this dtype: routers give one, checkpoints the other."""
    named = {n for n in facts.dtypes if {"i32", "i64"} <= set(op.rules.alternatives.get(n, ()))}
    kinds = {n: indices if n in named else kind for n, kind in facts.dtypes.items()}
    return dataclasses.replace(facts, dtypes=kinds)
