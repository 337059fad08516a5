"""transom tune: time what can run, and remember the fastest for this machine."""

from __future__ import annotations

import functools
import importlib
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from .. import config, dtypes, selection
from .. import device as _device
from ..conformance.calls import Call, describe, made
from ..explain import ops
from ..op import Op
from ..plugins import backends, load
from ..registry import lookup
from ..tune import measure
from . import units
from .console import Refusal, out, steps, table

EPILOG = """
Examples:

    transom tune

    transom tune route grouped_gemm --dtype bf16

    transom tune --device cuda --memory 8192

    transom tune --model v4-flash --dtype bf16 --tokens 1,64,1k

    transom tune moe_experts --model ./Qwen3-30B-A3B --format int4

    transom tune --tiles --device cuda --dtype bf16

Without --model the calls are the operators' examples; with it they have the
shapes of the model, and the choice is stored for these. Each candidate is
checked before it is timed; medians decide. Choices hold for calls of the same
dtypes and dims, on this machine and with this thread count. TRANSOM_TUNE=off
ignores them.
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
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR",
            help="Take the shapes of this model: a name that transom bench knows, or the folder of "
            "a checkpoint.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="N,...", help="With --model: tokens of a call.")
    ] = "1,8,64,512",
    context: Annotated[
        str, typer.Option(metavar="N,...", help="With --model: lengths for attention.")
    ] = "1k,16k,64k",
    format: Annotated[
        str, typer.Option(help="With --model: of weights, plain, int8, int4, fp8 or mxfp4.")
    ] = "plain",
    tiles: Annotated[
        bool, typer.Option("--tiles", help="Choose among the tiles of the Triton kernels instead.")
    ] = False,
) -> int:
    """Times every implementation that can run each operator's examples, or a model's calls, and
    stores the fastest."""
    try:
        chosen = [lookup(n) for n in names] if names else list(ops().values())
        primary = dtypes.parse(dtype)
    except ValueError as error:
        raise Refusal(str(error)) from None
    if device not in _device.available():
        raise Refusal(f"device is {device!r}; available here: {', '.join(_device.available())}")
    if repeats < 1:
        raise Refusal(f"repeats is {repeats}; expected 1 or more")
    if model is not None:
        if device != "cpu":
            raise Refusal(f"--model measures on the CPU; device is {device!r}")
        names_ = [op.name for op in chosen] if names else []
        return _model(model, names_, dtype, tokens, context, format, memory, repeats)
    if tiles:
        return _tiles(chosen, primary, device, memory * 2**20, repeats)
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


def _tiles(
    chosen: list[Op[..., Any]], dtype: torch.dtype, device: str, limit: int, repeats: int
) -> int:
    """The fastest tile of each kernel, over the examples of the operators that launch it."""
    if reason := backends()["triton"].unavailable:
        raise Refusal(reason)
    kit = importlib.import_module("transom.backends.triton._tune")
    rows = table("entry", "fastest", "medians, fastest first")
    for op in chosen:
        calls, values = [], ()
        for _, call, able in _plan([op], dtype, device, limit)[1]:
            if "triton" in able:
                values = made(call, torch.device(device))
                function = op.impls["triton"].function
                calls.append(functools.partial(op.invoke, function, *values))
        if not calls:
            continue
        like = next(iter(op.tensors(values).values()))
        with torch.no_grad():
            found = kit.measure(calls, like, repeats)
        kit.keep(found, like)
        for entry, tiles in found.items():
            medians = ", ".join(f"{tile}: {units.seconds(s)}" for tile, s in tiles.items())
            rows.add_row(entry, Text(str(next(iter(tiles))), style="green"), Text(medians))
    console = out()
    console.print(rows)
    console.print()
    text = f"stored in {config.cache_folder()} for {_device.describe(device)}"
    console.print(Text(text, style="dim"))
    return 0


def _model(
    text: str,
    names: list[str],
    dtype: str,
    tokens: str,
    context: str,
    format: str,
    memory: int,
    repeats: int,
) -> int:
    """The same for the calls of a model."""
    from ..bench.cases import Wanted
    from ..bench.measure import Settings
    from ..bench.selection import choose
    from .bench import FORMATS, each, length, model_name, one_of

    name = model_name("--model", text)
    short = one_of(("f32", "bf16", "f16"))("--dtype", dtype)
    wanted = Wanted(
        each("--tokens", tokens, length),
        each("--context", context, length),
        (short,),
        each("--format", format, one_of(FORMATS)),
        memory * 2**20,
    )
    rows = table("operator", "call", "fastest", "medians, fastest first")
    failed = count = 0
    with steps() as progress:
        for found in choose(names, name, wanted, Settings(repeats, 0.5), progress):
            count += 1
            failed += found.chosen is None or any("differs" in r.left_out for r in found.rows)
            best = found.rows[0].median if found.chosen else 1.0
            medians = ", ".join(
                f"{r.candidate} {units.seconds(r.median)} ({units.digits(r.median / best)} x)"
                if r.seconds
                else f"{r.candidate} left out: {r.left_out}"
                for r in found.rows
            )
            rows.add_row(
                found.case.op,
                Text(found.case.title + (f" ({found.case.scaled})" if found.case.scaled else "")),
                Text(found.chosen or "none", style="green" if found.chosen else "red"),
                Text(medians),
            )
    console = out()
    if count:
        console.print(rows)
        console.print()
        console.print(
            Text(f"stored in {config.cache_folder()} for {_device.describe('cpu')}", style="dim")
        )
    else:
        console.print(Text(f"nothing to choose for {name}: only the composite can run its calls"))
    return 1 if failed else 0


def _plan(
    chosen: list[Op[..., Any]], dtype: torch.dtype, device: str, limit: int
) -> tuple[list[str], list[tuple[Op[..., Any], Call, list[str]]], list[str]]:
    """Operators with one candidate, calls to time with their candidates, and what is left out with
    the reason."""
    single: list[str] = []
    jobs: list[tuple[Op[..., Any], Call, list[str]]] = []
    left: list[str] = []
    for op in chosen:
        load(op, device)
        candidates = False
        for index, example in enumerate(op.examples):
            try:
                call = describe(op, {}, dtype, example=example)
                facts = call.facts(device, _device.arch(device))
            except (ValueError, TypeError, Refusal) as error:
                left.append(f"{op.name} example {index + 1} ({error})")
                continue
            able = [i.name for i in selection.able(op, facts)]
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


def _dims(call: Call) -> str:
    return ", ".join(f"{n}={v}" for n, v in call.assumed.items())


def _measure(
    op: Op[..., Any], call: Call, device: str, repeats: int
) -> tuple[tuple[Text, Text], bool]:
    values = made(call, torch.device(device))
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
