"""Charts as inline SVG: bars, shares, a roofline, differences by position. Text and lines take the
page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .operators import Phase, Row

WIDTH = 960
REST = "#b4bac4"
"""Time outside the operators."""

PALETTE = (
    "#2f6fb7",
    "#e08214",
    "#3a9d5d",
    "#b5487c",
    "#7a5cc0",
    "#c9a227",
    "#2a9d9d",
    "#c0504d",
    "#6b8e23",
    "#8c6d5a",
)
"""Colours that stay apart for colour-blind readers in the order of use, on light and on dark
ground."""


def colours(phases: Sequence[Phase]) -> dict[str, str]:
    """A colour for each operator, by its total time, the same in every chart."""
    total: dict[str, float] = {}
    for phase in phases:
        for row in phase.rows:
            total[row.op] = total.get(row.op, 0.0) + row.seconds / max(phase.seconds, 1e-12)
    names = sorted(total, key=lambda name: -total[name])
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def pair(bars: Sequence[tuple[str, float | None, str, str]]) -> Markup:
    """Horizontal bars from zero: (label, value, its text, class), one below the other."""
    largest = max((v for _, v, _, _ in bars if v), default=0.0) or 1.0
    width, label, reach = 340, 112, 140
    parts = []
    for i, (name, value, text, kind) in enumerate(bars):
        y = 6 + 34 * i
        length = max(2.0, reach * (value or 0.0) / largest) if value is not None else 0.0
        parts.append(
            f'<text x="0" y="{y + 17}" class="label">{escape(name)}</text>'
            f'<rect x="{label}" y="{y}" width="{length:.1f}" height="24" rx="3" class="{kind}"/>'
            f'<text x="{label + length + 8:.1f}" y="{y + 17}" class="value">{escape(text)}</text>'
        )
    what = "; ".join(f"{name}: {text}" for name, _, text, _ in bars)
    return svg(width, 6 + 34 * len(bars), parts, what)


def shares(phase: Phase, colour: dict[str, str]) -> Markup:
    """One bar, the whole phase, cut into the operators' times and the rest."""
    total = phase.seconds or 1.0
    pieces = [(f"{r.op} ({r.impl})", r.seconds, colour[r.op], r.op) for r in phase.rows]
    pieces.append(("the rest of the model (torch)", phase.outside, REST, "rest"))
    x, parts = 0.0, []
    for name, spent, fill, short in pieces:
        width = WIDTH * spent / total
        share = f"{100 * spent / total:.1f} %"
        parts.append(
            f'<rect x="{x:.1f}" y="0" width="{max(0.0, width - 1):.1f}" height="36" fill="{fill}">'
            f"<title>{escape(name)}: {share}</title></rect>"
        )
        if width > 8 * len(short) + 12:
            kind = "onrest" if short == "rest" else "onbar"
            parts.append(written(x + 7, 23, kind, short))
        x += width
    return svg(
        WIDTH,
        36,
        parts,
        f"{phase.name}: " + ", ".join(f"{n} {100 * s / total:.0f} %" for n, s, _, _ in pieces),
    )


@dataclass(frozen=True)
class Frame:
    """The rectangle of a chart: powers of ten upwards; to the right powers of ten, or positions."""

    height: float
    ys: tuple[int, int]
    """Exponents at the lower and the upper edge."""
    xs: tuple[int, int] | None = None
    """Exponents at the left and the right edge; None: positions."""
    last: int = 1
    """The position at the right edge, from 0."""
    left: float = 70
    top: float = 16
    width: float = WIDTH - 90

    @property
    def right(self) -> float:
        """The right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.top + self.height

    def x(self, value: float) -> float:
        """Where a value (or a position) stands from left to right."""
        if self.xs is None:
            return self.left + self.width * value / self.last
        low, high = self.xs
        return self.left + self.width * (math.log10(value) - low) / (high - low)

    def y(self, value: float) -> float:
        """Where a value stands from top to bottom."""
        low, high = self.ys
        return self.top + self.height * (1 - (math.log10(value) - low) / (high - low))

    def at(self, x: float, y: float) -> str:
        """A point of a polyline."""
        return f"{self.x(x):.1f},{self.y(y):.1f}"

    def grid(self) -> list[str]:
        """A line and a number at each power of ten."""
        parts = []
        for e in range(self.ys[0], self.ys[1] + 1):
            y = self.y(10.0**e)
            parts.append(line("grid", self.left, y, self.right, y))
            parts.append(written(self.left - 8, y + 4, "tick", power(e), "end"))
        for e in range(self.xs[0], self.xs[1] + 1) if self.xs else ():
            x = self.x(10.0**e)
            parts.append(line("grid", x, self.top, x, self.bottom))
            parts.append(written(x, self.bottom + 18, "tick", power(e), "middle"))
        return parts


def roofline(
    phases: Sequence[Phase], gflops: float, gbytes: float, colour: dict[str, str]
) -> Markup:
    """Operators under the machine's ceilings: operations per byte against operations a second."""
    points = [
        (phase.name, r) for phase in phases for r in phase.rows if r.flops and r.bytes and r.seconds
    ]
    if not points:
        return Markup("")
    ridge = gflops / gbytes
    frame = Frame(
        380,
        decades([r.gflops for _, r in points] + [gflops]),
        decades([r.intensity for _, r in points] + [ridge]),
    )
    assert frame.xs is not None
    start = max(10.0 ** frame.xs[0], 10.0 ** frame.ys[0] / gbytes)
    end = 10.0 ** frame.xs[1]
    roof = " ".join(
        frame.at(x, y) for x, y in ((start, start * gbytes), (ridge, gflops), (end, gflops))
    )
    top = frame.y(gflops)
    arithmetic = f"arithmetic: {gflops:,.0f} GFLOP/s"
    middle = math.sqrt(start * ridge)
    angle = math.degrees(math.atan2(top - frame.y(start * gbytes), frame.x(ridge) - frame.x(start)))
    parts = [
        *frame.grid(),
        f'<polyline class="roof" points="{roof}"/>',
        written(frame.right - 6, top - 7, "note", arithmetic, "end"),
        turned(
            frame.x(middle),
            frame.y(middle * gbytes) - 8,
            angle,
            "note",
            f"memory: {gbytes:,.1f} GB/s",
        ),
    ]
    dots = [(frame.x(row.intensity), frame.y(row.gflops)) for _, row in points]
    taken = [(a - 7, b - 7, a + 7, b + 7) for a, b in dots]
    taken.append((frame.right - 150, top - 20, frame.right, top + 2))
    by_share = sorted(zip(points, dots, strict=True), key=lambda p: -p[0][1].share)
    for (name, row), dot in by_share:
        parts.append(_dot(name, row, dot, colour[row.op]))
        parts.append(_name(f"{row.op}, {name}", dot, taken, frame))
    middle_x, below = frame.left + frame.width / 2, frame.bottom + 40
    parts.append(written(middle_x, below, "axis", "operations per byte moved", "middle"))
    parts.append(turned(16, frame.top + frame.height / 2, -90, "axis", "GFLOP/s achieved"))
    what = "Roofline: each operator's rate under the machine's measured limits"
    return svg(WIDTH, frame.bottom + 48, parts, what)


def differences(relative: Sequence[float], prompt: int, limit: float, limit_name: str) -> Markup:
    """The largest logit difference at each position, of the range, on a logarithmic scale."""
    values = [v if math.isfinite(v) and v > 0 else 0.0 for v in relative]
    positive = [v for v in values if v > 0] or [limit / 1000]
    frame = Frame(220, decades([*positive, limit]), last=max(1, len(values) - 1))
    parts = frame.grid()
    if prompt <= frame.last:
        start = frame.x(prompt - 0.5)
        parts.append(
            f'<rect x="{start:.1f}" y="{frame.top}" width="{frame.right - start:.1f}" '
            f'height="{frame.height}" class="band"/>'
        )
    floor = 10.0 ** frame.ys[0]
    trace = " ".join(frame.at(i, max(v, floor)) for i, v in enumerate(values))
    y, below = frame.y(limit), frame.bottom
    caption = "position in the text; shaded: generated tokens"
    parts += [
        line("limit", frame.left, y, frame.right, y),
        written(frame.left + 8, y - 6, "note", limit_name),
        f'<polyline class="trace" points="{trace}"/>',
        written(frame.left, below + 18, "tick", "1"),
        written(frame.right, below + 18, "tick", f"{len(values):,}", "end"),
        written(frame.left + frame.width / 2, below + 30, "axis", caption, "middle"),
    ]
    what = "Largest logit difference by position, of the logits' range"
    return svg(WIDTH, below + 38, parts, what)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten that hold all values, with a little room."""
    low = math.floor(math.log10(min(values)) - 0.1)
    return low, max(low + 1, math.ceil(math.log10(max(values)) + 0.1))


def _dot(phase: str, row: Row, at: tuple[float, float], colour: str) -> str:
    """A dot for prefill, a ring for decode, with its figures as a tip."""
    ring = f'fill="none" stroke="{colour}" stroke-width="2.5"'
    look = f'fill="{colour}"' if phase == "prefill" else ring
    tip = (
        f"{row.op}, {phase} ({row.impl}): {row.gflops:,.2f} GFLOP/s, "
        f"{row.intensity:,.2f} per byte, {100 * row.attained:.1f} % attained"
    )
    return (
        f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5.5" {look}>'
        f"<title>{escape(tip)}</title></circle>"
    )


def _name(
    text: str, at: tuple[float, float], taken: list[tuple[float, float, float, float]], frame: Frame
) -> str:
    """A dot's name beside it, where no other dot or name stands; else nothing: the tip has it."""
    x, y = at
    length = 6.6 * len(text)
    above, below, before = -10, 18, -length
    for start, base in (
        (x + 10, y + 4),
        (x - 10 + before, y + 4),
        (x + before / 2, y - 12),
        (x + before / 2, y + 20),
        (x + 6, y + above),
        (x + 6, y + below),
        (x - 6 + before, y + above),
        (x - 6 + before, y + below),
    ):
        box = (start, base - 11, start + length, base + 3)
        free = all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in taken)
        if free and frame.left < box[0] and box[2] < frame.right:
            taken.append(box)
            return written(start, base, "point", text)
    return ""


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} class="{kind}"/>'


def written(x: float, y: float, kind: str, text: str | Markup, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} class="{kind}">{escape(text)}</text>'


def turned(x: float, y: float, angle: float, kind: str, text: str) -> str:
    place = f'transform="translate({x:.1f} {y:.1f}) rotate({angle:.1f})" text-anchor="middle"'
    return f'<text {place} class="{kind}">{escape(text)}</text>'


def power(exponent: int) -> str | Markup:
    plain = {0: "1", 1: "10", 2: "100", 3: "1,000", -1: "0.1", -2: "0.01"}.get(exponent)
    return plain or Markup(f'10<tspan dy="-5" class="power">{exponent}</tspan>')


def svg(width: float, height: float, parts: Sequence[str], what: str) -> Markup:
    frame = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(what)}"'
    return Markup(f"<svg {frame}>{''.join(parts)}</svg>")
