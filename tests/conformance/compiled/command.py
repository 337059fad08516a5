"""transom verify --compile: what operators launch, compiled ahead of time, without a device."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from transom.cli import machine, units
from transom.cli.console import Refusal, out, steps, table, write, write_json


def compiled(
    target: str,
    ops: list[str] | None,
    every: bool,
    jobs: int,
    seconds: float,
    report: Path | None,
    json_: Path | None,
) -> int:
    """Compile, print a line a kernel, and say what is wrong; 0 if nothing is."""
    if importlib.util.find_spec("triton") is None:
        raise Refusal("triton is not installed; pip install 'transom[triton]'")
    from . import compile as kit

    try:
        targets = kit.targets(target)
    except ValueError as error:
        raise Refusal(str(error)) from None
    offered = kit.offered()
    if ops is not None and (missing := [name for name in ops if name not in offered]):
        raise Refusal(f"{missing[0]} has no Triton kernel; expected some of {', '.join(offered)}")
    with steps() as progress:
        begun: set[str] = set()

        def reached(op: str, done: int, of: int) -> None:
            if op not in begun:
                begun.add(op)
                progress.start(f"{op}: kernels for {len(targets)} targets: {of}", of)
            progress.reach(done, of)

        outcome = kit.compile_all(
            targets, ops, every=every, jobs=jobs, seconds=seconds, progress=reached
        )
    rows = outcome.summary()
    about = {**machine.versions(), "commit": machine.commit()}
    if json_ is not None:
        write_json(json_, {**outcome.plain(), "summary": rows, **about})
    if report is not None:
        write(report, _page(outcome, rows, every, about, report.suffix == ".md"))
    console = out()
    console.print(_matrix(rows, targets))
    console.print(Text(LEGEND, style="dim"))
    _verdict(console, outcome)
    if report is not None:
        console.print(Text(f"report: {report}", style="dim"))
    return 0 if outcome.passed else 1


LEGEND = (
    "registers of a thread / bytes it spills / KiB of shared memory: the most that a call with the "
    "tile taken by default needs"
)


def _cell(row: dict[str, Any]) -> str:
    shared = f"{math.ceil(row['shared'] / 102.4) / 10:.1f}".removesuffix(".0")
    return f"{row['registers']} / {row['spills']} / {shared}"


def _cells(rows: list[dict[str, Any]], targets: tuple[str, ...]) -> dict[str, list[str]]:
    """For each kernel a cell for each target."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = _cell(row) + (f" ({row['faults']} faults)" if row["faults"] else "")
        found.setdefault(row["kernel"], {})[row["target"]] = cell
    return {kernel: [of.get(t, "") for t in targets] for kernel, of in sorted(found.items())}


def _matrix(rows: list[dict[str, Any]], targets: tuple[str, ...]) -> Table:
    shown = table("kernel", *(f">{target}" for target in targets))
    for kernel, cells in _cells(rows, targets).items():
        shown.add_row(kernel, *(Text(c, style="red" if "faults" in c else "") for c in cells))
    return shown


def _page(
    outcome: Any, rows: list[dict[str, Any]], every: bool, about: dict[str, Any], plain: bool
) -> str:
    """The report: Markdown with a row for each kernel, or HTML with every kernel compiled."""
    if plain:
        return _markdown(outcome, rows, every, about)
    page = Console(record=True, file=io.StringIO(), width=200, highlight=False)
    page.print(_matrix(rows, outcome.targets))
    page.print(Text(LEGEND))
    page.print(_each(outcome))
    _verdict(page, outcome)
    return page.export_html()


def _markdown(outcome: Any, rows: list[dict[str, Any]], every: bool, about: dict[str, Any]) -> str:
    quick = "" if every else " --quick"
    asked = f"transom verify --compile{quick} --target {','.join(outcome.targets)}"
    of = "every tile" if every else "the tiles taken by default, in bfloat16 and mxfp4"
    spilling = [k for k in outcome.kernels if k.spills and k.chosen]
    lines = [
        f"<!-- made by `{asked} --report FILE.md` -->",
        "",
        "# Triton kernels, compiled ahead of time",
        "",
        f"`{asked}`: {of}; {len(outcome.kernels)} compilations of {len(outcome.ops)} operators, "
        f"{len(outcome.failed)} with faults; triton {about['triton']}. Nothing ran on a device.",
        "",
        f"Each cell: {LEGEND}.",
        "",
        "| kernel | " + " | ".join(outcome.targets) + " |",
        "|---" * (len(outcome.targets) + 1) + "|",
    ]
    for kernel, cells in _cells(rows, outcome.targets).items():
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    if spilling:
        lines += ["", "Tiles taken by default that spill:", ""]
        lines += [
            f"- `{k.kernel}` on {k.target}, {k.tile}: {k.spills} bytes ({k.op}, {k.call})"
            for k in spilling
        ]
    return "\n".join(lines) + "\n"


def _each(outcome: Any) -> Table:
    shown = table(
        "operator",
        "kernel",
        "target",
        "call",
        "tile",
        ">registers",
        ">spills",
        ">shared",
        ">16-byte loads",
        "product",
        "",
    )
    for k in outcome.kernels:
        sign = Text("fault", style="red") if k.faults else Text("ok", style="green")
        shown.add_row(
            k.op,
            k.kernel,
            k.target,
            k.call,
            k.tile + ("" if k.chosen else " (not judged)"),
            str(k.registers),
            str(k.spills),
            units.memory(k.shared),
            str(k.wide),
            k.product,
            sign,
        )
    return shown


def _verdict(console: Console, outcome: Any) -> None:
    for k in outcome.failed:
        console.print()
        console.print(Text(f"{k.op} {k.kernel} {k.target} {k.tile}: {'; '.join(k.faults)}"))
        console.print(Text(f"  {k.call}", style="dim"))
    words = f"{len(outcome.kernels)} kernels compiled, {len(outcome.failed)} with faults"
    if before := sum(k.before for k in outcome.kernels):
        words += f"; {before} of them by an earlier run, from the same source"
    style = "green" if outcome.passed else "red"
    console.print()
    console.print(Text("passed" if outcome.passed else "failed", style=style), words, sep=": ")
    console.print(Text("compiled only: nothing ran on a device", style="dim"))
