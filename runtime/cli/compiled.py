"""transom verify --compile: what operators launch, compiled ahead of time, without a device."""

from __future__ import annotations

import importlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from . import machine, units
from .console import Refusal, out, steps, table, write, write_json


def compiled(
    target: str, ops: list[str] | None, every: bool, jobs: int, seconds: float,
    report: Path | None, json_: Path | None,
) -> int:  # fmt: skip
    """Compile, print a line a kernel, and say what is wrong; 0 if nothing is."""
    if importlib.util.find_spec("triton") is None:
        raise Refusal("triton is not installed; pip install 'transom[triton]'")
    kit = importlib.import_module("transom.backends.triton.compile")
    try:
        targets = kit.targets(target)
    except ValueError as error:
        raise Refusal(str(error)) from None
    offered = kit.offered()
    if ops is not None and (missing := [name for name in ops if name not in offered]):
        raise Refusal(f"{missing[0]} has no Triton kernel; expected some of {', '.join(offered)}")
    with steps() as progress:
        progress.start(f"kernels for {', '.join(targets)}", 100)
        outcome = kit.compile_all(
            targets, ops, every=every, jobs=jobs, seconds=seconds, progress=progress.reach
        )
    if json_ is not None:
        write_json(json_, {**outcome.plain(), **machine.versions(), "commit": machine.commit()})
    if report is not None:
        page = Console(record=True, file=io.StringIO(), width=200, highlight=False)
        _print(page, outcome)
        write(report, page.export_html())
    _print(out(), outcome)
    if report is not None:
        out().print(Text(f"report: {report}", style="dim"))
    return 0 if outcome.passed else 1


def _print(console: Console, outcome: Any) -> None:
    shown = table(
        "operator", "kernel", "target", "call", "tile", ">registers", ">spills", ">shared",
        ">16-byte loads", "product", "",
    )  # fmt: skip
    for k in outcome.kernels:
        sign = Text("fault", style="red") if k.faults else Text("ok", style="green")
        shown.add_row(
            k.op, k.kernel, k.target, k.call, k.tile + ("" if k.chosen else " (not judged)"),
            str(k.registers), str(k.spills), units.memory(k.shared), str(k.wide), k.product, sign,
        )  # fmt: skip
    console.print(shown)
    for k in outcome.failed:
        console.print()
        console.print(Text(f"{k.op} {k.kernel} {k.target} {k.tile}: {'; '.join(k.faults)}"))
        console.print(Text(f"  {k.call}", style="dim"))
    words = f"{len(outcome.kernels)} kernels compiled, {len(outcome.failed)} with faults"
    style = "green" if outcome.passed else "red"
    console.print()
    console.print(Text("passed" if outcome.passed else "failed", style=style), words, sep=": ")
    console.print(Text("compiled only: nothing ran on a device", style="dim"))
