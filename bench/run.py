"""A whole run: all cases for each number of threads, with the ceilings and peers that there are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from transom.errors import SlowPath

from . import peers, records, whole
from .cases import Case, Wanted, cases, forget
from .ceilings import Ceilings
from .measure import Row, Settings, measure

BUFFER = 1 << 30
"""Bytes that the reading probe may take."""

DEFAULT_MODELS = ("v4-flash", "qwen3-30b", "engram-27b", "minimax-m3")
"""Without --model: an operator with the shapes of the first of these that has it, experts with
those of the first two."""


class Progress(Protocol):
    """Where a run tells how far it is."""

    def start(self, title: str, total: int = 1) -> None:
        """A stage begins."""

    def advance(self) -> None:
        """A step of it is done."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    operators: tuple[str, ...]
    models: tuple[str, ...]
    """Empty: DEFAULT_MODELS."""
    wanted: Wanted
    threads: tuple[int, ...]
    against: tuple[str, ...]
    settings: Settings
    backward: bool = False
    whole: bool = False

    def cases(self) -> list[Case]:
        """The cases, in the order of their measurement."""
        if self.models:
            return list(cases(self.operators, self.models, self.wanted, self.backward))
        out: list[Case] = []
        taken: dict[str, list[str]] = {}
        for case in cases(self.operators, DEFAULT_MODELS, self.wanted, self.backward):
            have = taken.setdefault(case.op, [])
            if case.model not in have and len(have) < (2 if case.op == "moe_experts" else 1):
                have.append(case.model)
            if case.model in have:
                out.append(case)
        return out


@dataclass
class Found:
    """What a run found."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    """As records.py keeps them."""
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that were not there, with the reason."""
    problems: list[str] = field(default_factory=list)
    """Implementations of transom that gave a wrong result: the run has failed."""

    @property
    def rows(self) -> list[Row]:
        """The lines as rows."""
        return [records.row_of(line) for line in self.lines]


def run(
    plan: Plan,
    commit: str | None,
    progress: Progress,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Found:
    """Measure everything that is planned.

    keep    is given the lines of each case as soon as they are there: a run may take an hour.
    """
    found = Found()

    def add(rows: Sequence[Row]) -> None:
        lines = [records.line(about, row) for row in rows]
        found.problems.extend(_problems(rows))
        found.lines.extend(lines)
        if keep is not None:
            keep(lines)

    composite = "composite" in plan.against
    loaded, found.absent = peers.load([name for name in plan.against if name != "composite"])
    versions = peers.versions(loaded)
    others = peers.candidates(loaded)
    before = torch.get_num_threads()
    listed = plan.cases()
    try:
        for threads in plan.threads:
            torch.set_num_threads(threads)
            progress.start(f"measuring the machine's ceilings with {_threads(threads)}")
            ceilings = Ceilings(threads, min(BUFFER, plan.wanted.memory))
            about = records.about(ceilings.found(), versions, commit)
            rates: dict[tuple[Any, ...], float] = {}
            progress.start(f"{_threads(threads)}: {len(listed)} cases", len(listed))
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore", SlowPath)
                for case in listed:
                    progress.start(f"{case.op}: {case.title}")
                    rows = measure(case, others, ceilings, plan.settings, rates, composite)
                    add(rows)
                    progress.advance()
                if plan.whole:
                    forget()
                    try:
                        rows = whole.measure(plan.wanted, ceilings, plan.settings, progress)
                    except ImportError as error:
                        found.absent[whole.NAME] = f"{error}; install transom[transformers]"
                        continue
                    add(rows)
    finally:
        torch.set_num_threads(before)
        forget()
    return found


def _problems(rows: Sequence[Row]) -> list[str]:
    """Wrong results of transom's own: a fast wrong kernel is no kernel."""
    return [
        f"{row.op}, {row.title}: {row.candidate} {row.left_out}"
        for row in rows
        if row.peer == "transom" and row.left_out.startswith("differs")
    ]


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


__all__ = ["DEFAULT_MODELS", "Found", "Plan", "Progress", "run"]
