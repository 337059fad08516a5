"""What the kernels must reach on an H200 (the project's bars), asked of an accelerator's records.

python -m transom.bench.accelerator_bars bench/results/nvidia_h200/accelerator.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

OURS = "triton"
"""The candidate that the bars are about; of a whole model it is `transom`."""


@dataclass(frozen=True)
class Bar:
    """A least figure, and where it is read."""

    text: str
    least: float
    wanted: Callable[[Row], bool]
    """The cases that it is asked of."""
    figure: str
    """A peer's name: how many times as fast as it; 'flops' or 'bytes': the share of the measured
    peak."""
    ours: str = OURS


@dataclass(frozen=True)
class Verdict:
    """A bar, and the worst case that was measured for it."""

    bar: Bar
    figure: float | None
    """None if nothing was measured."""
    case: str = ""
    missing: int = 0
    """Cases in which it, or its peer, was left out."""

    @property
    def text(self) -> str:
        """reached, not reached, or not measured."""
        if self.figure is None:
            return "not measured"
        if self.missing:
            return f"not measured in {self.missing} cases"
        return "reached" if self.figure >= self.bar.least else "not reached"


def _is(op: str, **fields: Any) -> Callable[[Row], bool]:
    def test(row: Row) -> bool:
        return row["op"] == op and all(row[name] == value for name, value in fields.items())

    return test


def _few(format: str) -> Callable[[Row], bool]:
    def test(row: Row) -> bool:
        here = row["op"] == "moe_experts" and row["dtype"] == "bf16" and row["format"] == format
        return here and row["dims"]["T"] <= 64

    return test


def _many(row: Row) -> bool:
    plain = _is("grouped_gemm", model="v4-flash", dtype="bf16", format="plain")
    return plain(row) and row["label"].startswith("T = 4,096")


def _prefill(row: Row) -> bool:
    return _is("sparse_attention", dtype="bf16")(row) and row["label"].startswith("prefill")


def _gather(row: Row) -> bool:
    here = _is("hashed_embedding_out", dtype="bf16", format="plain")(row)
    return here and row["dims"]["S"] >= 4096


BARS = (
    Bar("bf16 grouped GEMM, 4,096 tokens, x grouped_mm", 0.9, _many, "torch grouped_mm"),
    Bar("bf16 grouped GEMM, 4,096 tokens, share of the matmul peak", 0.6, _many, "flops"),
    Bar("experts, T <= 64, bf16, share of bandwidth", 0.8, _few("plain"), "bytes"),
    Bar("experts, T <= 64, mxfp4, share of bandwidth", 0.8, _few("mxfp4"), "bytes"),
    Bar("sparse attention, prefill, x flex_attention", 3.0, _prefill, "torch flex_attention"),
    Bar("sparse attention, prefill, share of the matmul peak", 0.45, _prefill, "flops"),
    Bar(
        "indexer with top-k, x matmul + topk",
        2.0,
        _is("lightning_indexer", dtype="bf16"),
        "torch matmul + topk",
    ),
    Bar("row gather from device memory, share of bandwidth", 0.8, _gather, "bytes"),
    Bar(
        "patched V4, x its eager self",
        5.0,
        _is("whole model", dtype="bf16"),
        "transformers eager",
        "transom",
    ),
)


def judged(rows: Iterable[Row]) -> list[Verdict]:
    """Every bar with its worst case; the last record of a candidate counts."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(str(row[n]) for n in ("op", "model", "label", "dtype", "format"))
        cases.setdefault(key, {})[row["candidate"]] = row
    return [_verdict(bar, list(cases.values())) for bar in BARS]


def _verdict(bar: Bar, cases: Sequence[Mapping[str, Row]]) -> Verdict:
    asked = [c for c in cases if bar.wanted(next(iter(c.values())))]
    worst: tuple[float, str] | None = None
    missing = 0
    for case in asked:
        figure = _figure(bar, case)
        if figure is None:
            missing += 1
            continue
        row = case[bar.ours]
        found = figure, f"{row['label']}{', ' + row['scaled'] if row.get('scaled') else ''}"
        worst = found if worst is None else min(worst, found)
    figure, label = worst or (None, "")
    return Verdict(bar, figure, label, missing)


def _figure(bar: Bar, case: Mapping[str, Row]) -> float | None:
    ours = case.get(bar.ours, {})
    if "seconds" not in ours:
        return None
    if bar.figure in ("flops", "bytes"):
        return float(ours[bar.figure] / ours["seconds"] / ours[f"peak_{bar.figure}"])
    peer = case.get(bar.figure, {})
    return float(peer["seconds"] / ours["seconds"]) if "seconds" in peer else None


def table(verdicts: Sequence[Verdict], device: str) -> str:
    """The bars as Markdown."""
    lines = [
        f"Bars (set for an H200) on {device}:",
        "",
        "| bar | least | worst measured | case | |",
        "|---|---|---|---|---|",
    ]
    for v in verdicts:
        figure = "" if v.figure is None else f"{v.figure:.2f}"
        lines.append(f"| {v.bar.text} | {v.bar.least:g} | {figure} | {v.case} | {v.text} |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a file's records."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    rows = read(Path(name))
    print(table(judged(rows), rows[-1]["device"] if rows else "no device"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
