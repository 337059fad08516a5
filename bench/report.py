"""The report of a run: one HTML file that needs nothing else, and the ratios in it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from transom.cli import units
from transom.cli.report import template

from . import charts
from .measure import Row, series
from .models import MODELS
from .records import Comparison
from .run import Found

AXES = {
    "tokens": "tokens of a call",
    "context": "tokens of context, decode of one query",
    "prefill": "tokens of the prompt",
    "experts": "experts",
}
"""What the cases of a sweep differ in."""


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case together."""
    out: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        key = (r.op, r.model, r.label, r.dtype, r.format, r.threads, r.level)
        out.setdefault(key, []).append(r)
    return list(out.values())


def ratios(rows: Sequence[Row]) -> dict[int, float]:
    """By id of a row: how many times as fast transom's choice is in the same case; its own not."""
    out = {}
    for group in groups(rows):
        chosen = next((r for r in group if r.chosen and r.seconds), None)
        if chosen is not None:
            for r in group:
                if r is not chosen and r.seconds:
                    out[id(r)] = r.median / chosen.median
    return out


def ratio_text(ratio: float | None) -> str:
    """'2.1 x as fast', or nothing."""
    return "" if ratio is None else f"{units.digits(ratio)} x as fast"


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for each operator: how near to the limits, and how it stands against the others."""
    out = []
    for op in dict.fromkeys(r.op for r in rows):
        own = [g for g in groups([r for r in rows if r.op == op])]
        best, composite, shares, implementations = [], [], [], []
        for group in own:
            chosen = next((r for r in group if r.chosen and r.seconds), None)
            if chosen is None:
                continue
            implementations.append(chosen.candidate)
            if chosen.attained:
                shares.append(chosen.attained[0])
            peers = [r for r in group if charts.peer_of(r) not in ("transom", "composite")]
            timed = [r for r in peers if r.seconds]
            if timed:
                fastest = min(timed, key=lambda r: r.median)
                best.append((fastest.median / chosen.median, fastest))
            plain = [r for r in group if r.candidate == "composite" and r.seconds and not r.chosen]
            composite += [r.median / chosen.median for r in plain]
        out.append(
            {
                "op": op,
                "cases": len(own),
                "by": ", ".join(sorted(set(implementations))),
                "attained": (statistics.median(shares), max(shares)) if shares else None,
                "best": _middle([x for x, _ in best]),
                "least": min(best, key=lambda b: b[0]) if best else None,
                "most": max(best, key=lambda b: b[0]) if best else None,
                "composite": _middle(composite),
            }
        )
    return out


def _middle(values: Sequence[float]) -> float | None:
    """The geometric mean: of ratios, 2 and 1/2 give 1."""
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values else None


def _bars(group: Sequence[Row], ratio: dict[int, float]) -> dict[str, Any]:
    """A case as bars: the longest is the fastest."""
    timed = [r for r in group if r.seconds]
    fastest = min((r.median for r in timed), default=1.0)
    first = group[0]
    bars = [
        {
            "row": r,
            "colour": charts.LINES.get(charts.peer_of(r), charts.LINES["composite"]),
            "length": 100 * fastest / r.median,
            "low": 100 * min(1.0, fastest / r.seconds[3]),
            "high": 100 * min(1.0, fastest / r.seconds[2]),
            "ratio": ratio_text(ratio.get(id(r))),
        }
        for r in sorted(timed, key=lambda r: r.median)
    ]
    return {
        "title": first.title,
        "threads": first.threads,
        "level": first.level,
        "scaled": first.scaled,
        "cold": first.cold,
        "bars": bars,
        "left_out": [r for r in group if r.left_out],
    }


def _sweeps(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """A chart for each operator, model and dtype that was measured at three points of an axis."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        if r.seconds and r.sweep is not None:
            rest = r.label.partition(", ")[0] if r.sweep[0] == "experts" else series(r.label)
            key = (r.op, r.model, r.dtype, r.format, r.threads, r.level, r.sweep[0], rest)
            found.setdefault(key, []).append(r)
    for (op, model, dtype, format, threads, level, axis, rest), some in found.items():
        if len({r.sweep for r in some}) < 3:
            continue
        lines: dict[str, list[Row]] = {}
        for r in some:
            lines.setdefault(r.candidate, []).append(r)
        kind = dtype if format == "plain" else f"{dtype}, {format} weights"
        title = ", ".join(filter(None, (MODELS[model].title, rest, kind)))
        yield {
            "op": op,
            "title": f"{title}, {threads} thread{'' if threads == 1 else 's'}, {level}",
            "axis": AXES[axis],
            "chart": charts.along(AXES[axis], lines, title),
            "names": [
                (n, charts.LINES.get(charts.peer_of(s[0]), charts.LINES["composite"]))
                for n, s in lines.items()
            ],
        }


def _threads(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How much faster transom's choice is with more threads, operator by operator."""
    counts = sorted({r.threads for r in rows})
    if len(counts) < 2:
        return []
    by_case: dict[tuple[Any, ...], dict[int, float]] = {}
    for r in rows:
        if r.chosen and r.seconds:
            key = (r.op, r.model, r.label, r.dtype, r.format, r.candidate, r.level)
            by_case.setdefault(key, {})[r.threads] = r.median
    out = []
    for op in dict.fromkeys(key[0] for key in by_case):
        gains = [t for key, t in by_case.items() if key[0] == op and len(t) == len(counts)]
        if gains:
            factors = {n: _middle([t[counts[0]] / t[n] for t in gains]) for n in counts[1:]}
            best = {n: max(t[counts[0]] / t[n] for t in gains) for n in counts[1:]}
            out.append({"op": op, "cases": len(gains), "factors": factors, "best": best})
    return [{"counts": counts, "rows": out}] if out else []


def ceilings_of(found: Found) -> dict[tuple[int, str], dict[str, Any]]:
    """The machine's ceilings by threads and instruction set: the last that were measured."""
    return {(line["threads"], line["level"]): line["ceilings"] for line in found.lines}


def render(found: Found, compared: Comparison | None = None, busy: str | None = None) -> str:
    """The page."""
    rows = found.rows
    ratio = ratios(rows)
    colour = charts.colours(rows)
    ceilings = ceilings_of(found)
    first = found.lines[0] if found.lines else {}
    rooflines = [
        (c, charts.roofline([r for r in rows if (r.threads, r.level) == at], c, colour))
        for at, c in ceilings.items()
    ]
    operators = [
        {
            "op": op,
            "colour": colour[op],
            "cases": [_bars(g, ratio) for g in groups([r for r in rows if r.op == op])],
        }
        for op in colour
    ]
    used = {charts.peer_of(r) for r in rows if r.seconds}
    return template("transom.bench", "report.html").render(
        first=first,
        rows=rows,
        found=found,
        compared=compared,
        busy=busy,
        colour=colour,
        ceilings=list(ceilings.values()),
        rooflines=rooflines,
        operators=operators,
        ratio=ratio,
        ratio_text=ratio_text,
        summary=summary(rows),
        sweeps=list(_sweeps(rows)),
        threads=_threads(rows),
        peers={n: c for n, c in charts.LINES.items() if n in used},
        models=[MODELS[m] for m in dict.fromkeys(r.model for r in rows) if m in MODELS],
        checked=sum(r.error is not None for r in rows),
        scaled=list(dict.fromkeys((r.title, r.scaled) for r in rows if r.scaled)),
        counts=[len(groups([r for r in rows if (r.threads, r.level) == at])) for at in ceilings],
    )
