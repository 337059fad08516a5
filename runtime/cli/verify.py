"""transom verify: the conformance kit, run on a backend in a process of its own."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .. import device as _device
from ..plugins import backends, plugins
from ..registry import lookup
from . import machine
from .console import Refusal, check_writable, out, steps, table, write, write_json
from .units import digits

EPILOG = """
Examples:

    transom verify --quick

    transom verify --backend acme --device npu --report acme.html

    transom verify --backend native --ops grouped_gemm,route --examples 100

    transom verify --compile --target sm_90,gfx942 --ops moe_experts

    transom verify --target ascend --html ascend.html

Levels: 0 load, 1 requirements, 2 numbers, 3 manners, 4 torch, 5 speed. Exceptions
stand in a file, one reason a line: `operator implementation check: reason`.
"""
QUICK = (2, 4)
"""Level and drawn calls of --quick."""


def verify(
    backend: Annotated[
        str | None,
        typer.Option(help="Backend, plugin or implementation; all but the composites if left out."),
    ] = None,
    device: Annotated[str, typer.Option(help="Device type of the tensors.")] = "cpu",
    ops_: Annotated[
        str | None, typer.Option("--ops", help="Operators, separated by commas; all if left out.")
    ] = None,
    level: Annotated[int, typer.Option(min=0, max=5, help="The last level to ask.")] = 5,
    examples: Annotated[int, typer.Option(min=1, help="Drawn calls for each check.")] = 15,
    quick: Annotated[
        bool, typer.Option("--quick", help="Levels 0 to 2 with few calls: is this machine right?")
    ] = False,
    exceptions: Annotated[
        Path | None, typer.Option(help="File of failures that are known, one reason a line.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", "--html", help="Write the report as HTML; with --compile also FILE.md."
        ),
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write the findings as JSON.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="A process that is silent for so long is taken to hang.")
    ] = 300.0,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile every Triton kernel and tile ahead of time instead, without a device; "
            "--quick: the tiles that are taken, in bfloat16.",
        ),
    ] = False,
    target: Annotated[
        str,
        typer.Option(
            help="With --compile: all, or sm_90,gfx942 and others. ascend, by itself: the Triton "
            "kernels through Ascend's compilers, without a device."
        ),
    ] = "all",
    fit: Annotated[
        bool,
        typer.Option("--fit", help="With --target ascend: find and store the largest tiles first."),
    ] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="With --compile or --target: processes at a time.")
    ] = 1,
) -> int:
    """Asks implementations what the conformance kit asks, in a process of their own: a crash is a
    finding."""
    for path in (report, json_):
        if path is not None:
            check_writable(path)
    try:
        names = [lookup(n.strip()).name for n in ops_.split(",")] if ops_ else None
        if compile_:
            compiled = importlib.import_module("transom.conformance.compiled.command").compiled
            return compiled(target, names, not quick, jobs, seconds, report, json_)
        if target not in ("all", "ascend"):
            raise Refusal(f"target is {target!r}; expected ascend, or --compile with it")
        excused = _exceptions(exceptions)
    except ValueError as error:
        raise Refusal(str(error)) from None
    if importlib.util.find_spec("hypothesis") is None:
        raise Refusal("hypothesis is not installed; pip install 'transom[conformance]'")
    kit = importlib.import_module("transom.conformance.verify")
    if target == "ascend":
        ascend = importlib.import_module("transom.conformance.ascend.command")
        return ascend.verify(
            names,
            examples=examples,
            quick=quick,
            fit=fit,
            jobs=jobs,
            report=report,
            json_=json_,
            about=_about(None, device),
        )
    if quick:
        level, examples = QUICK
    with steps() as progress:
        progress.start(f"{backend or 'every backend'} on {device}", 100)
        outcome = kit.verify(
            backend,
            device,
            ops=names,
            level=level,
            examples=examples,
            exceptions=excused,
            seconds=seconds,
            progress=progress.reach,
        )
    # Asked here, and of names only: loading a plugin is the other process's risk.
    known = {"composite", "reference", *backends(), *plugins()}
    if backend is not None and backend not in known and not any(f.op for f in outcome.findings):
        have = ", ".join(sorted(known))
        raise Refusal(f"backend is {backend!r}; expected an implementation's name or one of {have}")
    about = _about(backend, device)
    if report is not None:
        text = importlib.import_module("transom.conformance.report").render(outcome, about)
        write(report, text)
    if json_ is not None:
        write_json(json_, {**outcome.plain(), **about})
    _print(out(), outcome)
    if report is not None:
        out().print(Text(f"report: {report}", style="dim"))
    return 0 if outcome.passed else 1


def _exceptions(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return importlib.import_module("transom.conformance.exceptions").Exceptions.read(path)
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}; give another path") from None


def _about(backend: str | None, device: str) -> dict[str, Any]:
    """What the report says of the machine and of what was verified on it."""
    found = {**machine.versions(), "commit": machine.commit()}
    rows = [(name, value or "not installed") for name, value in found.items() if value]
    if backend in plugins():
        rows.append((f"plugin {backend}", plugins()[backend].distribution))
    rows += [(d, _device.describe(d)) for d in _device.available()]
    if (peaks := _device.known_peaks(device)) is not None:
        how = "measured" if _device.stated_peaks(device) is None else "as the vendor states"
        figures = f"{digits(peaks.gflops)} GFLOP/s in float32, {digits(peaks.gbytes)} GB/s"
        rows.append((f"peaks of {device}", f"{figures}, {how}"))
    date = datetime.datetime.now().astimezone().date().isoformat()
    return {"transom": found["transom"], "date": date, "rows": rows}


def _print(console: Console, outcome: Any) -> None:
    marks = importlib.import_module("transom.conformance.report").MARKS
    levels = importlib.import_module("transom.conformance.levels").LEVELS
    shown = table("operator", "implementation", *levels[1 : outcome.level + 1])
    by: dict[tuple[str, str], dict[int, list[str]]] = {}
    for f in outcome.findings:
        if f.level:
            by.setdefault((f.op, f.impl), {}).setdefault(f.level, []).append(f.status)
    for (op, impl), found in sorted(by.items()):
        cells = [_worst(found.get(n, []), marks) for n in range(1, outcome.level + 1)]
        shown.add_row(op, impl, *cells)
    console.print(shown)
    for f in outcome.failed:
        console.print()
        console.print(Text(f"{f.op or f.impl} {f.impl if f.op else ''} {f.check}: {f.text}"))
        if f.case:
            console.print(Text(f"  {f.case}", style="dim"))
            console.print(Text(f.reproduce, style="dim"))
    passed = sum(f.status == "pass" for f in outcome.findings)
    words = f"{passed} checks passed, {len(outcome.failed)} failed"
    if excused := sum(f.status == "expected" for f in outcome.findings):
        words += f", {excused} failed as the exceptions say"
    style = "green" if outcome.passed else "red"
    console.print()
    console.print(Text("passed" if outcome.passed else "failed", style=style), words, sep=": ")


def _worst(statuses: list[str], marks: dict[str, tuple[str, str]]) -> Text:
    """One sign for the checks of a level: the worst of them."""
    order = ("fail", "stale", "expected", "pass", "refused", "none")
    worst = next((s for s in order if s in statuses), None)
    colour = {"fail": "red", "stale": "red", "expected": "yellow", "pass": "green"}.get(
        worst or "", "dim"
    )
    return Text(marks[worst][0] if worst else "", style=colour)
