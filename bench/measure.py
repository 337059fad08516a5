"""Measuring one case: check every candidate, then time them in turn with the machine's ceilings.

Candidates and probes take turns, starting with another one each round, and every share of a
ceiling is formed within a round: a machine that others share slows down both alike. A short call is
repeated within a round until a sample takes SAMPLE seconds, with other inputs each time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import transom
from transom import dispatch, dtypes, selection
from transom.cli.memory import PeakMemory
from transom.op import Op, as_numpy
from transom.plugins import load
from transom.registry import OPS
from transom.tolerance import agree, as_tuple, distance, shared

from .cases import PLAIN, Case, Draw, Inputs
from .ceilings import Ceilings

SAMPLE = 3e-3
MOST_CALLS = 200
LEAST_ROUNDS = 3
LONG = 20.0
"""Seconds: a call that is expected to take longer is left out."""
TELLING = 0.05
"""Seconds: a shorter call does not tell how long a larger one will take."""
REFERENCE_BYTES = 4e8
"""Of a call's tensors in float64 that the NumPy reference is given; else the composite judges."""

ROUNDINGS = 12
"""Of intermediate results: what a peer may do, to the dtype of the activations, or with quantised
weights to 8 bits (integer dot products round the activations). Ours keep float32 between."""

Function = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Candidate:
    """One way of computing a case."""

    name: str
    peer: str
    """'transom', or the other library."""
    prepare: Callable[[Mapping[str, Any]], Function]
    """From the arguments of a call to what is timed: packing of weights is done before."""
    note: str = ""
    bytes: float = 0.0
    """Memory that it takes beside the inputs, if that is much."""


@dataclass
class Row:
    """What was found for one candidate of one case."""

    op: str
    model: str
    label: str
    title: str
    dims: dict[str, Any]
    dtype: str
    format: str
    candidate: str
    peer: str
    note: str
    threads: int
    level: str
    scaled: str
    cold: str
    sweep: tuple[str, float] | None
    flops: float
    bytes: float
    bound: str = ""
    """What the attainable time is set by: 'arithmetic', 'memory' or 'random rows'."""
    chosen: bool = False
    """True: this is what a call of transom takes by itself."""
    error: float | None = None
    """Largest difference from the reference, of its largest value."""
    left_out: str = ""
    """Why it was not timed."""
    extra_bytes: int | None = None
    """The most memory that a call held beside its inputs and outputs."""
    calls: int = 0
    """Timed, in all rounds together."""
    seconds: list[float] = field(default_factory=list)
    """Of one call, by round: [median, lowest, lower quartile, upper quartile, highest]."""
    attained: list[float] = field(default_factory=list)
    """The attainable time over the time taken, likewise."""
    of_fma: float | None = None
    of_read: float | None = None
    of_rows: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same measurement as another one."""
        return (
            self.op,
            self.model,
            self.label,
            self.dtype,
            self.format,
            self.candidate,
            self.peer,
            self.threads,
            self.level,
        )

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return self.seconds[0]

    @property
    def gflops(self) -> float:
        """10^9 useful operations a second."""
        return self.flops / self.median / 1e9

    @property
    def gbytes(self) -> float:
        """10^9 bytes a second, of those that must move."""
        return self.bytes / self.median / 1e9

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 25
    seconds: float = 1.0
    """For each candidate of a case."""
    memory: float = 4e9
    """Bytes that a candidate may take beside the inputs."""
    clock: Callable[[], float] = time.perf_counter


def ours(case: Case, values: Mapping[str, Any]) -> tuple[list[Candidate], str | None]:
    """transom's implementations that can run the case, whatever there is; and the one chosen."""
    op = OPS[case.op]
    load(op, "cpu")
    facts = dispatch.facts_of(op, [values[p.name] for p in op.parameters])
    able = [i.name for i in selection.able(op, facts)]

    def prepare(name: str) -> Callable[[Mapping[str, Any]], Function]:
        def call(values: Mapping[str, Any]) -> Any:
            out = op.call(**values)
            return values["out"] if op.mutates else out

        def ready(values: Mapping[str, Any]) -> Function:
            function = _under(op.name, name, call)
            if _packs(op, name):  # weights that come again unchanged
                function(values)
                function(values)
            return function

        return ready

    found = [Candidate(name, "transom", prepare(name), _note(op, name)) for name in able]
    return found, selection.select(op, facts).chosen


def _note(op: Any, name: str) -> str:
    """Whether the implementation keeps packed weights, as some peers do."""
    if not _packs(op, name) or (budget := op.impls[name].function.packed.budget) is None:
        return ""
    return f"up to {budget.limit / 2**20:g} MiB of weights packed"


def _packs(op: Any, name: str) -> bool:
    packed = getattr(op.impls[name].function, "packed", None)
    return packed is not None and any(p.role == "weight" for p in op.parameters)


class _under:
    """A function that runs within transom.use(op=name); the timer begins after it is entered."""

    def __init__(self, op: str, name: str, call: Function) -> None:
        self.choice, self.call = {op: name}, call

    def __call__(self, values: Mapping[str, Any]) -> Any:
        with transom.use(**self.choice):
            return self.call(values)


def measure(
    case: Case,
    others: Callable[[Case, Mapping[str, Any]], Sequence[Candidate]],
    ceilings: Ceilings,
    settings: Settings,
    rates: dict[tuple[Any, ...], float] | None = None,
    composite: bool = True,
    inputs: Inputs | None = None,
) -> list[Row]:
    """The rows of a case: transom's implementations, then the `others` that apply.

    composite  False: it is left out where there is anything else of transom.
    inputs     of the case, if they have been made.
    rates      seconds by unit of work of candidates in earlier cases of this kind: one that would
               take longer than LONG is left out.
    """
    if inputs is None:
        with torch.inference_mode(False):  # where weights have no version, none is packed
            inputs = case.make(Draw(case.dtype))
    found, chosen = ours(case, inputs.draws[0])
    if not composite:
        found = [c for c in found if c.name != "composite"] or found
    found = [*found, *others(case, inputs.draws[0])]
    rows = {c.name: _row(case, inputs, c, ceilings, chosen) for c in found}
    rates = {} if rates is None else rates
    kind = (case.op, case.model, case.dtype, case.format, series(case.label))
    work = max(inputs.flops, inputs.bytes)
    judge = _Judge(case, inputs)
    ready: dict[str, Function] = {}
    first: dict[str, float] = {}
    for c in found:
        row = rows[c.name]
        known = rates.get((kind, c.peer, c.name))
        if known is not None and known * work > LONG:
            row.left_out = f"about {known * work:.0f} s a call, by its rate at a smaller size"
        elif c.bytes > settings.memory:
            row.left_out = f"needs about {c.bytes / 1e9:.0f} GB beside the inputs"
        else:
            try:
                call = c.prepare(inputs.draws[0])
                start = settings.clock()
                out = call(inputs.draws[0])
                first[c.name] = settings.clock() - start
                if first[c.name] < LONG:  # the first call may compile, or warm something up
                    with PeakMemory(torch.device("cpu"), collect=False) as memory:
                        start = settings.clock()
                        out = call(inputs.draws[0])
                        first[c.name] = settings.clock() - start
                    row.extra_bytes = _beside(memory.bytes, out)
                row.error, row.left_out = judge(out, c.peer)
            except Exception as error:  # a peer's own failure is a finding, not an end of the run
                if c.peer == "transom":
                    raise
                row.left_out = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if not row.left_out:
                ready[c.name] = call
                if first[c.name] > TELLING:
                    rates[kind, c.peer, c.name] = first[c.name] / max(work, 1.0)
    if ready:
        _time(case, inputs, ready, first, rows, ceilings, settings)
    return list(rows.values())


def series(label: str) -> str:
    """Which of an operator's cases differ in their size alone: 'CSA' of 'decode at 64k, CSA'."""
    rest = label.partition(", ")[2]
    return "" if " x " in rest or rest.endswith(" experts") else rest


def _beside(peak: int | None, out: Any) -> int | None:
    """Of the growth of memory in a call what its results do not account for."""
    return None if peak is None else max(0, peak - sum(t.nbytes for t in as_tuple(out)))


def _row(case: Case, inputs: Inputs, c: Candidate, ceilings: Ceilings, chosen: str | None) -> Row:
    return Row(
        case.op,
        case.model,
        case.label,
        case.title,
        dict(case.dims),
        case.dtype,
        case.format,
        c.name,
        c.peer,
        c.note,
        ceilings.threads,
        ceilings.level,
        case.scaled,
        inputs.cold,
        case.sweep,
        inputs.flops,
        inputs.bytes,
        chosen=c.peer == "transom" and c.name == chosen,
    )


# Checking ------------------------------------------------------------------------------------


def agrees(
    case: Case, got: Any, want: Any, dims: Mapping[str, Any], peer: str, exact: bool = False
) -> str | None:
    """None if a candidate's result agrees with one that is right, else what doesn't. A peer may
    give less than the operator does, and in other dtypes."""
    made, right = as_tuple(got), as_tuple(want)
    if not all(isinstance(t, torch.Tensor) for t in made):
        return f"it returns {type(got).__name__}"
    model: dict[str, Any] = {}
    if peer != "transom":
        rounded_to = dtypes.parse(case.dtype) if case.format == PLAIN else torch.bfloat16
        model = {"roundings": ROUNDINGS, "rounded_to": rounded_to}
        if not exact:
            made = tuple(g.to(w.dtype) for g, w in zip(made, right, strict=False))
    return agree(OPS[case.op], made, right, dims, exact=exact, **model)


def dims_of(op: Op[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes and plain arguments of a call."""
    facts = dispatch.facts_of(op, [values[p.name] for p in op.parameters])
    return {**facts.arguments, **facts.dims}


class _Judge:
    """Compares a candidate's result with the reference's, and as a whole with the first one's."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case = case
        self.anchor: tuple[tuple[Any, ...], str] | None = None
        op, values = OPS[case.op], inputs.draws[0]
        self.whole = dims_of(op, values)
        self.pick: Callable[[Any], Any] = lambda out: out
        if inputs.few is not None:
            values, self.pick = inputs.few(values)
        self.part = dims_of(op, values)
        ordered = [values[p.name] for p in op.parameters]
        elements = sum(
            t.numel() if isinstance(t, torch.Tensor) else int(np.prod(t.shape))
            for t in op.tensors(ordered).values()
        )
        # where there are few tokens the limit is theirs: _few_tokens has seen to the size
        small = inputs.few is not None or 8 * elements < REFERENCE_BYTES
        reference = op.reference_of if small else None
        self.exact = reference is not None
        if reference is not None:
            with np.errstate(all="ignore"):
                truth = as_tuple(reference(*(as_numpy(v) for v in ordered)))
            self.truth = tuple(torch.as_tensor(np.asarray(t)) for t in truth)
        else:
            with transom.use(**{op.name: "composite"}):
                out = op.call(**values)
            self.truth = as_tuple(values["out"].clone() if op.mutates else out)

    def __call__(self, out: Any, peer: str) -> tuple[float | None, str]:
        """The error, and why it cannot be timed, or nothing."""
        whole = as_tuple(out)
        got = [self.pick(g) for g in whole]
        for g, w in zip(got, self.truth, strict=False):
            if g.shape != w.shape:
                return None, f"shape {list(g.shape)}; expected {list(w.shape)}"
        worst = max((_error(g, w) for g, w in zip(got, self.truth, strict=False)), default=0.0)
        problem = agrees(self.case, tuple(got), self.truth, self.part, peer, self.exact)
        if problem:
            return worst, f"differs from the reference: {problem}"
        if self.anchor is None:
            self.anchor = tuple(g.clone() for g in whole), peer
            return worst, ""
        first, other = self.anchor
        loosest = other if peer == "transom" else peer
        problem = agrees(self.case, whole, first, self.whole, loosest)
        return worst, f"differs from the first candidate: {problem}" if problem else ""


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, of the largest value; of indices the share that differs."""
    return distance(got, want) if got.dtype.is_floating_point else 1 - shared(got, want)


# Timing --------------------------------------------------------------------------------------


def _time(
    case: Case,
    inputs: Inputs,
    ready: Mapping[str, Function],
    first: Mapping[str, float],
    rows: Mapping[str, Row],
    ceilings: Ceilings,
    settings: Settings,
) -> None:
    clock = settings.clock
    taken: dict[str, list[float]] = {name: [] for name in ready}
    bests: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in ready}
    draws = _in_turn(inputs)
    began, names = clock(), list(ready)
    for round_ in range(settings.rounds):
        if round_ >= LEAST_ROUNDS and clock() - began > settings.seconds * len(names):
            break
        at = _attainable(case, inputs, ceilings)
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            slow = first[name] > 3 * settings.seconds
            enough = 1 if first[name] > LONG / 4 else 2
            if slow and len(taken[name]) >= enough:
                continue  # a few figures of seconds say enough
            calls = int(min(MOST_CALLS, max(1.0, SAMPLE / max(first[name], 1e-7))))
            chosen = [next(draws) for _ in range(calls)]
            spent = _sample(ready[name], chosen, clock)
            taken[name].append(spent)
            bests[name].append(at)
            rows[name].calls += calls
    for name in names:
        row, times = rows[name], taken[name]
        row.seconds = spread(times)
        shares = [[t / spent for t in at] for at, spent in zip(bests[name], times, strict=True)]
        row.attained = spread([max(s) for s in shares])
        fma, dot, read, gather = (statistics.median(s[i] for s in shares) for i in range(4))
        row.of_fma, row.of_read = fma or None, read
        row.of_rows = gather or None
        largest = max(fma, dot, read, gather)
        row.bound = (
            "random rows" if largest == gather else "memory" if largest == read else "arithmetic"
        )


def _attainable(
    case: Case, inputs: Inputs, ceilings: Ceilings
) -> tuple[float, float, float, float]:
    """Seconds that the work needs at this round's rates: of multiply-adds, of integer dot products
    (where the format allows them, which are then the arithmetic's ceiling), of reading in order,
    and of reading rows at random."""
    fma, read = ceilings.fma(), ceilings.read()
    dot = ceilings.dot() if case.integer else None
    moved = inputs.bytes - (inputs.table_bytes if inputs.table is not None else 0.0)
    gather = 0.0
    if inputs.table is not None:
        sample = ceilings.rows(inputs.table)
        # the probe writes the rows too; what is written wider than it was read comes on top
        gather = inputs.table_bytes / sample.rate
        moved = max(0.0, moved - inputs.table_bytes)
    by_fma = inputs.flops / fma.rate
    if dot is not None and dot.rate > fma.rate:
        return 0.0, inputs.flops / dot.rate, moved / read.rate, gather
    if gather:
        return 0.0, 0.0, 0.0, gather + moved / read.rate
    return by_fma, 0.0, moved / read.rate, 0.0


def _in_turn(inputs: Inputs) -> Iterator[Mapping[str, Any]]:
    while True:
        yield from inputs.draws


def _sample(
    call: Function, draws: Sequence[Mapping[str, Any]], clock: Callable[[], float]
) -> float:
    """Seconds of one call, over these in a row."""
    if isinstance(call, _under):
        with transom.use(**call.choice):
            return _sample(call.call, draws, clock)
    start = clock()
    for values in draws:
        call(values)
    return max((clock() - start) / len(draws), 1e-9)


def spread(values: Sequence[float]) -> list[float]:
    """[median, lowest, lower quartile, upper quartile, highest]."""
    ordered = sorted(values)
    low, high = (np.quantile(ordered, q) for q in (0.25, 0.75))
    return [statistics.median(ordered), ordered[0], float(low), float(high), ordered[-1]]
