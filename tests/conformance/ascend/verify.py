"""Every Triton kernel through L1, L2 and L3: what `transom verify --target ascend` asks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import transom
from transom.backends.triton import _launch
from transom.op import Impl, Op
from transom.tolerance import as_tuple

from .. import agree
from ..compiled import compile as triton
from . import calls, kept
from .chips import TARGETS, Plan, compile_for
from .environment import PINS, Environment
from .launch import Failed, Program, execute, lower
from .source import NotPortable

NOTE = (
    "No binary ran on a device: kernels were lowered by the vendor's frontend, executed on this "
    "processor in that form, and planned by the vendor's open compiler; its closed last step, "
    "which makes the binary, was not part of it."
)
CORES = 3
"""Programs of a persistent kernel where it is executed, so that small tensors have several."""


@dataclass(frozen=True)
class Ran:
    """L1 and L2 of one call of an operator, with the tiles of a chip."""

    op: str
    call: str
    chip: str
    launches: int
    stage: str = ""
    """Where it failed: 'frontend', 'to LLVM IR', 'execute', 'result', 'host' (our code raised);
    empty if it didn't."""
    why: str = ""


@dataclass(frozen=True)
class Refused:
    """A call that a requirement excludes on a chip, with its sentence: no kernel is lowered."""

    op: str
    call: str
    chip: str
    why: str
    planned: bool = False
    """True of a call in a model's size, whose kernels L3 would plan."""


@dataclass(frozen=True)
class Fit:
    """L1 and L3 of one kernel, with one tile, on one chip."""

    op: str
    kernel: str
    entry: str
    tile: str
    chosen: bool
    """True if the table's first tile (or none) was compiled: what a user gets."""
    call: str
    plan: Plan


@dataclass
class Outcome:
    """All findings."""

    ran: list[Ran] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)
    contract: list[str] = field(default_factory=list)
    """L4: where the vendor's schemas differ from those that the adapter is written for."""
    unasked: str = ""
    """Why the schemas could not be compared, or empty."""
    seconds: float = 0.0

    @property
    def levels(self) -> dict[str, tuple[int, int, int]]:
        """(passed, failed, refused) by level: of L1 and L2 calls, of L3 kernels with the tile that
        a user gets. A call that is not lowered counts as failed at L1, and at L2 not at all."""
        lowering = ("source", "frontend", "to LLVM IR")
        stages = [r.stage for r in self.ran]
        unlowered = sum(s in lowering for s in stages)
        right, chosen = stages.count(""), [f for f in self.fits if f.chosen]
        fitting = sum(f.plan.fits for f in chosen)
        large = sum(r.planned for r in self.refused)
        small = len(self.refused) - large
        return {
            "L1 lowered": (len(stages) - unlowered, unlowered, small),
            "L2 executed": (right, len(stages) - unlowered - right, small),
            "L3 planned": (fitting, len(chosen) - fitting, large),
        }

    @property
    def failed(self) -> list[Ran | Fit]:
        """Calls that failed, and kernels that don't fit with the tile that a user gets."""
        wrong = [f for f in self.fits if f.chosen and not f.plan.fits]
        return [*(r for r in self.ran if r.stage), *wrong]

    @property
    def passed(self) -> bool:
        """Something ran and something fits; nothing failed."""
        return bool(self.ran) and bool(self.fits) and not self.failed and not self.contract

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        said = {"note": NOTE, "tools": list(PINS), "passed": self.passed, "levels": self.levels}
        return {**said, **asdict(self)}


Finding = Ran | Refused | Fit


def verify(
    environment: Environment,
    names: list[str] | None = None,
    *,
    examples: int = 0,
    targets: Iterable[str] = TARGETS,
    every: bool = True,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Outcome:
    """L1 to L3 of the Triton kernels of these operators (None: all).

    examples    drawn calls of each operator, beyond the fixed ones
    every       L3 of all examples, dtypes, formats and tiles; else the largest in bfloat16
    progress    told (jobs done, jobs in all)
    """
    began, outcome, targets = time.monotonic(), Outcome(), tuple(targets)
    jobs: list[Callable[[], Iterable[Finding]]] = []
    with calls.implementations(names) as impls:
        for name, impl in impls.items():
            op = transom.ops()[name]
            for case in calls.small(op, examples):
                jobs.append(lambda o=op, i=impl, c=case: ran(environment, o, i, c, targets))
            for chip in targets:
                launches, left = kernels(op, impl, chip, every)
                outcome.refused += left
                for launch in launches:
                    jobs.append(lambda o=op, k=launch: [fit(environment, o, *k)])
        done, lock = 0, threading.Lock()

        def work(job: Callable[[], Iterable[Finding]]) -> list[Finding]:
            nonlocal done
            found = list(job())
            with lock:
                done += 1
                progress(done, len(jobs))
            return found

        with ThreadPoolExecutor(workers) as pool:
            for found in pool.map(work, jobs):
                outcome.ran += [f for f in found if isinstance(f, Ran)]
                outcome.refused += [f for f in found if isinstance(f, Refused)]
                outcome.fits += [f for f in found if isinstance(f, Fit)]
    outcome.fits = without_repeats(outcome.fits)
    outcome.seconds = time.monotonic() - began
    return outcome


def ran(
    environment: Environment, op: Op[..., Any], impl: Impl, case: Any, targets: tuple[str, ...]
) -> Iterator[Ran | Refused]:
    """L1 and L2: the call with the tiles of each chip, where these or the lowered programs differ
    from the chips' before."""
    seen: set[str] = set()
    for chip in targets:
        if (why := calls.refused(op, impl, case.values, chip)) is not None:
            yield Refused(op.name, repr(case), chip, why)
            continue
        given = agree.as_given(case)
        try:
            noted = calls.recorded(op, impl, case.values, chip)
            programs = [_lowered(environment, launch) for launch in noted]
            other = "950" in chip and any(len(p.executables) > 1 for p in programs)
            key = json.dumps([*map(triton.identity, noted), other])
            if key in seen:
                continue
            seen.add(key)
            if (known := kept.find(op, repr(case), key)) is not None:
                yield Ran(op.name, repr(case), chip, known)
                continue
            out, launches = run(environment, op, impl, case.values, chip)
        except (Failed, NotPortable) as error:
            yield Ran(op.name, repr(case), chip, 0, getattr(error, "stage", "source"), str(error))
            continue
        except Exception as error:  # noqa: BLE001 - whatever host code raises is a finding
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield Ran(op.name, repr(case), chip, 0, "host", text)
            continue
        named = zip((p.name for p in op.parameters), case.values, strict=True)
        written = tuple(v for n, v in named if n in op.mutates)
        why = case.intact() or agree.with_reference(case, given, written or as_tuple(out))
        if not why:
            kept.keep(op, repr(case), key, launches)
        yield Ran(op.name, repr(case), chip, launches, "result" if why else "", why or "")


def _lowered(environment: Environment, launch: _launch.Launch) -> Program:
    try:
        return lower(environment, launch)
    except Failed as error:
        raise Failed(error.stage, f"{launch.name} {error}") from None


def run(
    environment: Environment, op: Op[..., Any], impl: Impl, values: tuple[Any, ...], chip: str
) -> tuple[Any, int]:
    """An operator's host function, each of its launches lowered and executed over the tensors of
    the call; its results, and how many launches there were. Raises Failed."""
    count = 0

    def do(launch: _launch.Launch) -> None:
        nonlocal count
        count += 1
        program = _lowered(environment, launch)
        try:
            execute(environment, launch, program, newer="950" in chip, seed=count)
        except Failed as error:
            raise Failed(error.stage, f"{launch.name} {error}") from None

    with _launch.road(do, arch=chip.lower(), cores=CORES):
        out = op.invoke(impl.function, *values)
    return out, count


Kernel = tuple[str, Any, str, bool]
"""(chip, launch, call, True for the table's first tile)."""


def kernels(
    op: Op[..., Any], impl: Impl, chip: str, every: bool
) -> tuple[list[Kernel], list[Refused]]:
    """What the operator launches in models' sizes on a chip, each kernel that differs once, and the
    calls that a requirement excludes there."""
    left: list[Refused] = []

    def taken(call: str, values: tuple[Any, ...]) -> bool:
        why = calls.refused(op, impl, values, chip)
        if why is not None:
            left.append(Refused(op.name, call, chip, why, planned=True))
        return why is None

    launches = triton.launches(op, (chip.lower(),), every, taken)
    return [(chip, launch, call, chosen) for _, launch, call, chosen in launches], left


def fit(
    environment: Environment, op: Op[..., Any], chip: str, launch: Any, call: str, chosen: bool
) -> Fit:
    """L1 and L3 of one kernel."""
    sizes = " ".join(f"{name}={size}" for name, size in launch.tile.sizes)
    return Fit(
        op.name, launch.name, launch.entry, sizes, chosen, call, plan(environment, launch, chip)
    )


def plan(environment: Environment, launch: Any, chip: str) -> Plan:
    """The chip's memory plan of a launch."""
    try:
        return compile_for(environment, lower(environment, launch), chip)
    except (Failed, NotPortable) as error:
        return Plan(chip, False, why=str(error))


def without_repeats(fits: list[Fit]) -> list[Fit]:
    """One row for each kernel, tile and chip: the first that doesn't fit, else the fullest."""
    kept: dict[tuple[str, str, str], Fit] = {}

    def rank(fit: Fit) -> float:
        return 2.0 if not fit.plan.fits else fit.plan.fullest[1] if fit.plan.fullest else 0.0

    for fit in fits:
        key = (fit.kernel, fit.tile, fit.plan.target)
        if key not in kept or rank(fit) > rank(kept[key]):
            kept[key] = fit
    return sorted(kept.values(), key=lambda f: (f.kernel, not f.chosen, f.tile, f.plan.target))
