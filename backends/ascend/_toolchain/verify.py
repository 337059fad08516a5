"""`transom verify --target ascend`: every Triton kernel through L1, L2 and L3."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import transom
from transom.backends.triton import _launch
from transom.backends.triton._choice import Tile, tiles
from transom.op import Impl, Op

from . import calls
from .chips import TARGETS, Plan, compile_for
from .environment import PINS, Environment
from .launch import Failed, execute, lower
from .source import NotPortable

NOTE = (
    "No binary ran on a device: kernels were lowered by the vendor's frontend, executed on this "
    "processor in that form, and planned by the vendor's open compiler; its closed last step, "
    "which makes the binary, was not part of it."
)
CORES = 3
"""Programs of a persistent kernel where it is executed, so that small tensors have several."""

WORKERS = 2


@dataclass(frozen=True)
class Ran:
    """L1 and L2 of one call of an operator."""

    op: str
    call: str
    chip: str
    launches: int
    stage: str = ""
    """Where it failed: 'frontend', 'to LLVM IR', 'execute' or 'result'; empty if it didn't."""
    why: str = ""


@dataclass(frozen=True)
class Fit:
    """L3 of one kernel, with one tile, on one chip."""

    op: str
    kernel: str
    entry: str
    tile: str
    call: str
    plan: Plan


@dataclass
class Outcome:
    """All findings, by level."""

    ran: list[Ran] = field(default_factory=list)
    fits: list[Fit] = field(default_factory=list)

    @property
    def failed(self) -> list[Ran | Fit]:
        return [*(r for r in self.ran if r.stage), *(f for f in self.fits if not f.plan.fits)]

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        ran, fits = [asdict(r) for r in self.ran], [asdict(f) for f in self.fits]
        return {"note": NOTE, "tools": list(PINS), "calls": ran, "kernels": fits}


def verify(
    environment: Environment, names: list[str] | None = None, *, examples: int = 0,
    targets: Iterable[str] = TARGETS, progress: Callable[[int, int], None] = lambda *_: None,
) -> Outcome:  # fmt: skip
    """L1 to L3 of the Triton kernels of these operators (None: all).

    examples    drawn calls of each operator, beyond the fixed ones
    progress    told (jobs done, jobs in all)
    """
    outcome, targets = Outcome(), tuple(targets)
    jobs: list[Callable[[], Iterable[Ran | Fit]]] = []
    for name, impl in calls.implementations(names).items():
        op = transom.ops()[name]
        jobs += [_ran_job(environment, op, impl, c, targets) for c in calls.small(op, examples)]
        jobs += [_fit_job(environment, op, impl, c, targets) for c in calls.large(op)]
    done, lock = 0, threading.Lock()

    def work(job: Callable[[], Iterable[Ran | Fit]]) -> list[Ran | Fit]:
        nonlocal done
        found = list(job())
        with lock:
            done += 1
            progress(done, len(jobs))
        return found

    with ThreadPoolExecutor(WORKERS) as pool:
        for found in pool.map(work, jobs):
            outcome.ran += [f for f in found if isinstance(f, Ran)]
            outcome.fits += [f for f in found if isinstance(f, Fit)]
    outcome.fits = _without_repeats(outcome.fits)
    return outcome


def run(
    environment: Environment, op: Op[..., Any], impl: Impl,
    values: tuple[Any, ...], chip: str,
) -> tuple[Any, list[_launch.Launch]]:  # fmt: skip
    """L1 and L2: an operator's host function, each of its launches lowered and executed over the
    tensors of the call; its results and its launches. Raises Failed."""
    launches: list[_launch.Launch] = []

    def do(launch: _launch.Launch) -> None:
        launches.append(launch)
        program = lower(environment, launch)
        execute(environment, launch, program, newer="950" in chip, seed=len(launches))

    with _launch.road(do, arch=chip.lower(), cores=CORES):
        out = op._invoke(impl.function, *values)
    return out, launches


def largest_tile(
    environment: Environment, op: Op[..., Any], impl: Impl, entry: str, chip: str,
    most: int = 256,
) -> Tile | None:  # fmt: skip
    """The largest tile of an entry that fits the chip in every call of models' sizes, from the
    listed one: halved until it fits, then doubled, size by size, while it does. None: nothing
    fits."""
    shown = [values for _, values in calls.large(op)]
    known: dict[tuple[tuple[str, int], ...], bool] = {}

    def fits(sizes: dict[str, int]) -> bool:
        key = tuple(sizes.items())
        if key not in known:
            known[key] = all(
                p.fits for p in _plans_with(environment, op, impl, entry, key, chip, shown)
            )
        return known[key]

    sizes = dict(tiles(entry, chip.lower())[0].sizes)
    while not fits(sizes):
        widest = max(sizes, key=lambda n: sizes[n])
        if sizes[widest] <= 16:
            return None
        sizes[widest] //= 2
    grown = True
    while grown:
        grown = False
        for name in sorted(sizes, key=lambda n: sizes[n]):
            more = {**sizes, name: sizes[name] * 2}
            if more[name] <= most and fits(more):
                sizes, grown = more, True
    return Tile(tuple(sizes.items()))


def _plans_with(
    environment: Environment, op: Op[..., Any], impl: Impl, entry: str,
    sizes: tuple[tuple[str, int], ...], chip: str, shown: list[tuple[Any, ...]],
) -> Iterator[Plan]:  # fmt: skip
    """The plans of the entry's launches, in calls of models' sizes, with these sizes."""
    seen = set()
    for values in shown:
        if calls.refused(op, impl, values, chip):
            continue
        launches = calls.recorded(
            op, impl, values, chip.lower(),
            lambda name, listed: Tile(sizes) if name == entry else listed[0],
        )  # fmt: skip
        for launch in launches:
            if launch.entry != entry or (key := _identity(launch)) in seen:
                continue
            seen.add(key)
            try:
                yield compile_for(environment, lower(environment, launch), chip)
            except (Failed, NotPortable) as error:
                yield Plan(chip, False, why=str(error))


def _ran_job(
    environment: Environment, op: Op[..., Any], impl: Impl, case: Any,
    targets: tuple[str, ...],
) -> Callable[[], Iterable[Ran]]:  # fmt: skip
    """The call with the tiles of each chip, where they differ from those of the chips before."""
    import importlib

    checks = importlib.import_module("transom.conformance.checks")
    tolerance = importlib.import_module("transom.conformance.tolerance")

    def job() -> Iterator[Ran]:
        seen: set[str] = set()
        for chip in targets:
            if calls.refused(op, impl, case.values, chip):
                continue
            given = checks.as_given(case)
            try:
                notes = calls.recorded(op, impl, case.values, chip.lower())
                key = json.dumps([_identity(n) for n in notes] + ["950" in chip])
                if key in seen:
                    continue
                seen.add(key)
                out, launches = run(environment, op, impl, case.values, chip)
            except (Failed, NotPortable) as error:
                stage = getattr(error, "stage", "source")
                yield Ran(op.name, repr(case), chip, 0, stage, str(error))
                continue
            except Exception as error:  # noqa: BLE001 - whatever host code raises is a finding
                text = " ".join(str(error).split())
                yield Ran(op.name, repr(case), chip, 0, "host", f"{type(error).__name__}: {text}")
                continue
            written = [
                v for p, v in zip(op.parameters, case.values, strict=True) if p.name in op.mutates
            ]
            got = tuple(written) if op.mutates else tolerance.as_tuple(out)
            why = case.intact() or checks.agrees(case, given, got)
            yield Ran(op.name, repr(case), chip, len(launches), "result" if why else "", why or "")

    return job


def _fit_job(
    environment: Environment, op: Op[..., Any], impl: Impl,
    shown: tuple[str, tuple[Any, ...]], targets: tuple[str, ...],
) -> Callable[[], Iterable[Fit]]:  # fmt: skip
    text, values = shown

    def job() -> Iterator[Fit]:
        for chip in targets:
            if calls.refused(op, impl, values, chip):
                continue
            try:
                launches = calls.recorded(op, impl, values, chip.lower())
            except Exception as error:  # noqa: BLE001 - whatever host code raises is a finding
                why = f"the host function raised {type(error).__name__}: {error}"
                yield Fit(op.name, "", "", "", text, Plan(chip, False, why=why))
                continue
            for launch in launches:
                try:
                    plan = compile_for(environment, lower(environment, launch), chip)
                except (Failed, NotPortable) as error:
                    plan = Plan(chip, False, why=str(error))
                tile = " ".join(f"{n}={size}" for n, size in launch.tile.sizes)
                yield Fit(op.name, launch.name, launch.entry, tile, text, plan)

    return job


def _identity(launch: _launch.Launch) -> str:
    """What the compiler sees of a launch."""
    return repr((launch.name, launch.signature(), launch.constexprs(), launch.divisible()))


def _without_repeats(fits: list[Fit]) -> list[Fit]:
    """One row for each kernel, tile and chip: the fullest, or one that doesn't fit."""
    kept: dict[tuple[str, str, str], Fit] = {}

    def fullness(fit: Fit) -> float:
        return fit.plan.fullest[1] if fit.plan.fits and fit.plan.fullest else 0.0

    for fit in fits:
        key = (fit.kernel or fit.op, fit.tile, fit.plan.target)
        other = kept.get(key)
        if other is None or (
            other.plan.fits and (not fit.plan.fits or fullness(fit) > fullness(other))
        ):
            kept[key] = fit
    return sorted(kept.values(), key=lambda f: (f.kernel or f.op, f.tile, f.plan.target))
