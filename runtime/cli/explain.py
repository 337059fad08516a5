"""transom explain: which implementation a call would take, why, and what the call costs at
least."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from .. import device as _device
from .. import dtypes, selection
from ..conformance.calls import Call, Described
from ..explain import ops
from ..facts import Facts
from ..measured import lookup as measured_choice
from ..op import Op
from ..registry import lookup
from . import units
from .calls import asked, parse_pairs
from .console import Refusal, out, table, write_json

EPILOG = """
Examples:

    transom explain

    transom explain route --shapes T=4096,E=256,k=8 --set score=softmax

    transom explain grouped_gemm --shapes M=4096,K=2048 --set weight=int4

    transom explain sparse_attention --device cuda --arch sm_90 --dtype bf16

Nothing is computed and no tensor is allocated: dims may be as large as you
like.
"""


def explain(
    op: Annotated[
        str | None,
        typer.Argument(help="The operator; without one, all are listed.", show_default=False),
    ] = None,
    shapes: Annotated[
        str,
        typer.Option(
            metavar="M=4096,K=...",
            help="Sizes of dims; 2x8 for several leading dims. Dims left out come "
            "from the operator's first example.",
            show_default=False,
        ),
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="Of every tensor that may have it: f32, bf16, f16 or f64.")
    ] = "f32",
    device: Annotated[
        str | None,
        typer.Option(
            help="Device type the call would run on: cpu, cuda, ... (default: cpu)",
            show_default=False,
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="Architecture, to ask about another machine: sm_90, x86_64+avx2, ... "
            "(default: this machine's)",
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="An argument's value; or a tensor's dtype, the format of a "
            "quantised weight (int8, int4, fp8, mxfp4), or none to leave an optional tensor "
            "out. Repeatable.",
            show_default=False,
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Which implementation a call would take, why, why not the others, and its least cost."""
    console = out()
    if op is None:
        _list(console, json_)
        return 0
    try:
        found = lookup(op)
        primary = dtypes.parse(dtype)
        call = asked(
            found,
            parse_pairs(shapes, "--shapes"),
            primary,
            parse_pairs(",".join(set_ or []), "--set"),
        )
        where = device or "cpu"
        facts = call.facts(where, arch or _arch(where))
        explanation = selection.select(found, facts)
    except (ValueError, TypeError) as error:
        raise Refusal(str(error)) from None
    cost = found.cost(call.values)
    peaks = _device.known_peaks(where) if where in _device.available() else None
    # An implementation that could run, but is not the one chosen, has no reason of its own.
    others = {
        name: explanation.rejected.get(name)
        or (f"can run; {explanation.chosen} comes first ({explanation.why})",)
        for name in found.impls
        if name != explanation.chosen
    }
    others = {**dict(explanation.rejected), **others}
    if json_:
        write_json(None, _figures(call, facts, explanation, others, cost, peaks))
        return 0
    _print(console, call, facts, explanation, others)
    _print_cost(console, cost, peaks, where)
    return 0


def _list(console: Console, as_json: bool) -> None:
    listed = {name: (op, _summary(op)) for name, op in ops().items()}
    if as_json:
        write_json(
            None,
            {
                n: {"family": op.family, "shapes": op.shapes_text, "does": doc}
                for n, (op, doc) in listed.items()
            },
        )
        return
    rows = table("operator", "family", "what it computes")
    for name, (op, doc) in listed.items():
        rows.add_row(name, op.family, Text(doc))
    console.print(rows)
    console.print(
        "\ntransom explain NAME tells which implementation runs it here, and why", style="dim"
    )


def _summary(op: Op[..., Any]) -> str:
    """The first paragraph of its docstring."""
    return " ".join((op.__doc__ or "").strip().partition("\n\n")[0].split())


def _arch(where: str) -> str:
    if where in _device.available():
        return _device.arch(where)
    return "unknown"


def _print(
    console: Console,
    call: Call,
    facts: Facts,
    explanation: selection.Explanation,
    others: dict[str, tuple[str, ...]],
) -> None:
    op = call.op
    console.print(f"[bold]{op.name}[/bold]  [dim]{escape(op.shapes_text)}[/dim]")
    console.print(Text(_summary(op)))
    console.print()
    rows = table("argument", "value")
    for p, value in zip(op.parameters, call.values, strict=True):
        rows.add_row(p.name, Text("absent" if value is None and p.role != "value" else str(value)))
    console.print(rows)
    if call.assumed:
        taken = ", ".join(f"{n}={_size(v)}" for n, v in call.assumed.items())
        console.print(Text(f"from the operator's first example: {taken}", style="dim"))
    unknown = "" if facts.arch != "unknown" else "  (not on this machine: name it with --arch)"
    console.print(Text(f"device {facts.device}, architecture {facts.arch}{unknown}", style="dim"))
    console.print()
    if explanation.chosen:
        console.print(
            f"runs as [bold green]{explanation.chosen}[/bold green]: {escape(explanation.why)}"
        )
        if len(op.impls) > 2 and explanation.why != "asked for":
            measured = measured_choice(op, facts) is not None
            console.print(
                Text(
                    "measured on this machine"
                    if measured
                    else "not measured here: see transom tune",
                    style="dim",
                )
            )
    else:
        console.print(f"[bold red]nothing can run[/bold red]: {escape(explanation.why)}")
    for name, reasons in others.items():
        console.print(Text(f"  {name}: {'; '.join(reasons)}"))
    console.print()


def _print_cost(console: Console, cost: Any, peaks: _device.Peaks | None, where: str) -> None:
    intensity = cost.flops / cost.bytes if cost.bytes else 0.0
    console.print(
        f"least work: {units.operations(cost.flops)}, {units.memory(cost.bytes)} moved, "
        f"{units.digits(intensity)} flop per byte"
    )
    if peaks is None:
        console.print(
            Text(
                f"peaks of {where!r} are not measured here: transom doctor measures them",
                style="dim",
            )
        )
        return
    floor, bound = floor_seconds(cost.flops, cost.bytes, peaks)
    console.print(
        f"least time on this machine: {units.seconds(floor)}, bound by {bound} "
        f"({units.digits(peaks.gflops)} GFLOP/s in float32, "
        f"{units.digits(peaks.gbytes)} GB/s measured)"
    )


def floor_seconds(flops: float, bytes_: float, peaks: _device.Peaks) -> tuple[float, str]:
    """max(flops / peak flops, bytes / peak bandwidth) in seconds, and which of the two it is: the
    roofline."""
    compute, memory = flops / (peaks.gflops * 1e9), bytes_ / (peaks.gbytes * 1e9)
    return (compute, "arithmetic") if compute >= memory else (memory, "memory")


def _figures(
    call: Call,
    facts: Facts,
    explanation: selection.Explanation,
    others: dict[str, tuple[str, ...]],
    cost: Any,
    peaks: _device.Peaks | None,
) -> dict[str, Any]:
    arguments = {
        p.name: str(v) if isinstance(v, Described) else v
        for p, v in zip(call.op.parameters, call.values, strict=True)
    }
    return {
        "op": call.op.name,
        "arguments": arguments,
        "from_first_example": dict(call.assumed),
        "device": facts.device,
        "arch": facts.arch,
        "chosen": explanation.chosen,
        "tier": explanation.tier,
        "why": explanation.why,
        "others": {n: list(r) for n, r in others.items()},
        "flops": cost.flops,
        "bytes": cost.bytes,
        "least_seconds": floor_seconds(cost.flops, cost.bytes, peaks)[0] if peaks else None,
        "peaks": dataclasses.asdict(peaks) if peaks else None,
    }


def _size(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
