"""The HTML report of the main job: one file that needs nothing else."""

from __future__ import annotations

import importlib.resources
from typing import Any

from . import charts, figures, units
from .job import Outcome
from .operators import Phase

TEMPLATE = "report.html"


def template(package: str, name: str) -> Any:
    """A page of `package` with the filters and the style that all pages share."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def read(wanted: str) -> str:
        folder = importlib.resources.files(package if wanted == name else __package__)
        return folder.joinpath(wanted).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(read),
    )
    environment.filters.update(
        memory=units.memory,
        percent=units.percent,
        share=units.share,
        small=lambda value: units.small(value).replace("-", "\u2011"),  # no line break
        digits=units.digits,
        fixed=units.fixed,
        seconds=units.seconds,
        printable=_printable,
        id=id,
    )
    return environment.get_template(name)


def render(outcome: Outcome, found: figures.Figures) -> str:
    """The report as text: figures, charts, and what each of them means."""
    colour = charts.colours(outcome.phases)
    agreed, peaks = outcome.agreement, outcome.peaks
    return template(__package__, TEMPLATE).render(
        found=found,
        headline=figures.headline(found),
        outcome=outcome,
        agreed=agreed,
        cards=_cards(outcome),
        phases=[(p, charts.shares(p, colour)) for p in outcome.phases],
        colour=colour,
        rest=charts.REST,
        roofline=charts.roofline(outcome.phases, peaks.gflops, peaks.gbytes, colour),
        differences=charts.differences(
            agreed.relative,
            agreed.prompt,
            agreed.limit,
            f"limit {agreed.limit:.0e}"
            + ("" if agreed.rule == "exact" else ", for the median position"),
        ),
        groups=_groups(outcome),
        busiest=_busiest(outcome.phases),
    )


def _printable(text: str) -> str:
    """Control characters, which random weights like to produce, as a middle dot."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\u00b7" for c in text)


def _cards(outcome: Outcome) -> list[dict[str, Any]]:
    """Speed and memory of both ways of running, each with bars and one sentence."""
    a, b = outcome.original, outcome.patched

    def card(
        title: str, note: str, x: float | None, y: float | None, show: Any, better: str, worse: str
    ) -> dict[str, Any]:
        ratio = y / x if x and y else None
        if ratio is None:
            sentence = "not measured here"
        elif 0.98 < ratio < 1.02:
            sentence = "the same within 2 %"
        else:
            sentence = f"transom: {ratio:.2f} x, {better if ratio > 1 else worse}"
        bars = charts.pair([(a.name, x, show(x), "original"), (b.name, y, show(y), "patched")])
        return {"title": title, "note": note, "chart": bars, "sentence": sentence}

    made = [
        card(
            "Prefill",
            "prompt tokens a second; longer is better",
            a.prefill_rate,
            b.prefill_rate,
            units.digits,
            "faster",
            "slower",
        ),
        card(
            "Decode",
            "new tokens a second; longer is better",
            a.decode_rate,
            b.decode_rate,
            units.digits,
            "faster",
            "slower",
        ),
        card(
            "Peak memory",
            "above the loaded model; shorter is better",
            a.peak_bytes,
            b.peak_bytes,
            units.memory,
            "more",
            "less",
        ),
    ]
    return made


def _groups(outcome: Outcome) -> list[dict[str, Any]]:
    """What patch() did, the modules together that differ only in the numbers of their paths."""
    groups: dict[tuple[str, str, str, bool], list[str]] = {}
    for r in outcome.patch.records:
        pattern = ".".join("*" if part.isdigit() else part for part in r.path.split("."))
        groups.setdefault(
            (pattern, r.module, r.operators or r.reason or "", r.replaced), []
        ).append(r.path)
    return [
        {
            "path": pattern or "(the model itself)",
            "module": module,
            "text": text,
            "replaced": replaced,
            "count": len(paths),
        }
        for (pattern, module, text, replaced), paths in groups.items()
    ]


def _busiest(phases: tuple[Phase, ...]) -> list[str]:
    """A sentence for each phase on what takes most of it."""
    out = []
    for phase in phases:
        if phase.rows:
            top = phase.rows[0]
            inside = 100 * sum(r.share for r in phase.rows)
            out.append(
                f"In {phase.name}, {inside:.0f} % of the time is spent in transom's operators, "
                f"the most in {top.op} ({100 * top.share:.0f} %, at {100 * top.attained:.1f} % "
                "of what the machine could do)."
            )
    return out
