"""The report that a vendor publishes: one HTML file that needs nothing else."""

from __future__ import annotations

import importlib.resources
from itertools import groupby
from typing import Any

from .levels import CHECKS, LEVELS, Finding
from .verify import Outcome

MARKS = {
    "pass": ("\u2713", "passed"),
    "fail": ("\u2717", "failed"),
    "expected": ("\u25cb", "failed as the vendor's exceptions say"),
    "stale": ("!", "excused, though it does not fail"),
    "refused": ("\u2013", "the implementation takes no such call"),
    "none": ("\u00b7", "nothing to ask"),
}
"""By status: the sign in the table, and what it means."""


def render(outcome: Outcome, about: dict[str, Any]) -> str:
    """The report as text. `about`: versions, machine and date, as rows of its last table."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = importlib.resources.files(__package__).joinpath("report.html").read_text("utf-8")
    names = [c.name for c in CHECKS if c.level <= outcome.level]
    return environment.from_string(source).render(
        outcome=outcome,
        about=about,
        marks=MARKS,
        levels=[
            (n, LEVELS[n], [c.name for c in CHECKS if c.level == n and c.name in names])
            for n in range(1, outcome.level + 1)
        ],
        rows=rows(outcome.findings, names),
        loading=[f for f in outcome.findings if f.level == 0],
        failures=outcome.failed,
        excused=[f for f in outcome.findings if f.status == "expected"],
        speeds=[f for f in outcome.findings if f.check == "speed" and f.status == "pass"],
        counted=count(outcome.findings),
    )


def rows(findings: list[Finding], names: list[str]) -> list[tuple[str, str, list[Finding | None]]]:
    """(operator, implementation, its finding for each check), in the operators' order."""
    mine = sorted((f for f in findings if f.level > 0), key=lambda f: (f.op, f.impl))
    out = []
    for (op, impl), some in groupby(mine, key=lambda f: (f.op, f.impl)):
        by_check = {f.check: f for f in some}
        out.append((op, impl, [by_check.get(name) for name in names]))
    return out


def count(findings: list[Finding]) -> dict[str, int]:
    """How many findings have each status."""
    return {status: sum(f.status == status for f in findings) for status in MARKS}
