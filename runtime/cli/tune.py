"""transom tune: time what can run, and remember the fastest for this machine."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from .. import config, dispatch, dtypes
from .. import device as _device
from ..explain import ops
from ..op import Op, lookup
from ..plugins import load
from ..tune import measure
from . import units
from .calls import DeclaredCall, declared_call, materialise
from .console import Refusal, out, steps, table

EPILOG = """
Examples:

    transom tune

    transom tune route grouped_gemm --dtype bf16

    transom tune --device cuda --memory 8192

Each candidate is checked against the composite before it is timed; medians
decide. Choices hold for calls of the same dtypes and dims, on this machine
and with this thread count. TRANSOM_TUNE=off ignores them.
"""


def tune(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...", help="Operators; all if none is named.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of every tensor that may have it: f32, bf16 or f16.")
    ] = "f32",
    device: Annotated[str, typer.Option(help="Device type to measure on.")] = "cpu",
    memory: Annotated[
        int, typer.Option(help="Leave out examples whose inputs take more MiB than this.")
    ] = 512,
    repeats: Annotated[int, typer.Option(help="Times that each candidate is timed.")] = 7,
) -> int:
    """Times every implementation that can run each operator's examples, and stores the fastest."""
    try:
        chosen = [lookup(n) for n in names] if names else list(ops().values())
        primary = dtypes.parse(dtype)
    except ValueError as error:
        raise Refusal(str(error)) from None
    if device not in _device.available():
        raise Refusal(f"device is {device!r}; available here: {', '.join(_device.available())}")
    if repeats < 1:
        raise Refusal(f"repeats is {repeats}; expected 1 or more")
    console = out()
    single, jobs, left = _plan(chosen, primary, device, memory * 2**20)
    rows = table("operator", "call", "fastest", "medians, fastest first")
    failed = 0
    with steps() as progress:
        for op, call, names_able in jobs:
            progress.start(f"{op.name}: {', '.join(names_able)}")
            text, ok = _measure(op, call, device, repeats)
            failed += not ok
            rows.add_row(op.name, Text(_dims(call)), *text)
            progress.advance()
    if jobs:
        console.print(rows)
        console.print()
        console.print(
            Text(f"stored in {config.cache_folder()} for {_device.describe(device)}", style="dim")
        )
    if single:
        which = ", ".join(single) if len(single) < 5 else f"{len(single)} operators"
        console.print(
            Text(f"only the composite can run on {device}: nothing to choose for {which}")
        )
    if left:
        console.print(Text(f"left out: {'; '.join(left)}", style="dim"))
    return 1 if failed else 0


def _plan(
    chosen: list[Op[..., Any]], dtype: torch.dtype, device: str, limit: int
) -> tuple[list[str], list[tuple[Op[..., Any], DeclaredCall, list[str]]], list[str]]:
    """Operators with one candidate, calls to time with their candidates, and what is left out with
    the reason."""
    single: list[str] = []
    jobs: list[tuple[Op[..., Any], DeclaredCall, list[str]]] = []
    left: list[str] = []
    for op in chosen:
        load(op, device)
        candidates = False
        for index, example in enumerate(op.examples):
            try:
                call = declared_call(op, {}, dtype, example=example)
                facts = call.facts(device, _device.arch(device))
            except (ValueError, TypeError, Refusal) as error:
                left.append(f"{op.name} example {index + 1} ({error})")
                continue
            able = [i.name for i in dispatch.able(op, facts)]
            if len(able) < 2:
                continue
            candidates = True
            if call.nbytes > limit:
                left.append(
                    f"{op.name} example {index + 1} "
                    f"({units.memory(call.nbytes)} of inputs; --memory)"
                )
                continue
            jobs.append((op, call, able))
        if not candidates:
            single.append(op.name)
    return single, jobs, left


def _dims(call: DeclaredCall) -> str:
    return ", ".join(f"{n}={v}" for n, v in call.assumed.items())


def _measure(
    op: Op[..., Any], call: DeclaredCall, device: str, repeats: int
) -> tuple[tuple[Text, Text], bool]:
    values = materialise(call, torch.device(device))
    try:
        with torch.no_grad():
            found = measure(op, values, repeats)
    except ValueError as error:
        return (Text("none", style="red"), Text(str(error), style="red")), False
    fastest = found.seconds[found.chosen]
    medians = ", ".join(
        f"{n} {units.seconds(s)} ({units.digits(s / fastest)} x)" for n, s in found.seconds.items()
    )
    return (Text(found.chosen, style="green"), Text(medians)), True
