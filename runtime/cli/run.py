"""transom run: the main job's command, and its tables on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from .. import device as _device
from ..dtypes import SHORT
from ..explain import backends, ops
from ..plugins import load as load_implementations
from ..registry import OPS
from . import checkpoint, figures, machine, units
from .console import Refusal, check_writable, out, steps, table, write, write_json
from .job import Outcome, Settings, run_job
from .operators import Phase

EPILOG = """
Examples:

    transom run

    transom run --file README.md --html report.html

    transom run --model ./Qwen3-30B-A3B --dtype bf16 --prompt "Once upon"

    transom run --backend composite --json figures.json

The text is prefilled and continued greedily, first as Hugging Face runs the
model, then after transom.patch(model). Both give logits at every position of
the same text, and these are compared.

Status 0: the outputs agree. 1: they don't; in float32 that is a logit that
differs by more than 1e-4 of the logits' range, or another token; in bf16 and
f16, more difference at the median position than rounding explains. 2: bad
input.
"""


def run(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of a Hugging Face checkpoint of a causal language model with "
            "its tokenizer. Without it: a built-in DeepSeek-V4 of 47 million seeded random weights "
            "with a byte-level tokenizer.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="The text. Without it and --file: the operators' own documentation.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A UTF-8 file with the text.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate.")] = 32,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", help="A longer text is cut to this many tokens.")
    ] = 1024,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Force this backend for every operator (an error where it cannot run), "
            "or op=implementation,... for some. transom doctor lists backends.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="f32, bf16 or f16. Only f32 shows agreement to the last digits.")
    ] = "f32",
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, ... (default: the accelerator if there is one, else cpu)",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Threads that torch computes with. (default: torch's)",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the built-in model's weights.")] = 0,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Timed passes of each; medians are shown.")
    ] = 1,
    json_: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="PATH", help="Write every figure as JSON.", show_default=False
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
) -> int:
    """Runs a language model as Hugging Face does and through transom's operators: speed, memory,
    agreement."""
    kind = _dtype(dtype)
    for name, value in (
        ("--tokens", tokens),
        ("--prompt-tokens", prompt_tokens),
        ("--repeats", repeats),
        ("--threads", threads),
    ):
        if value is not None and value < 1:
            raise Refusal(f"{name} is {value}; expected 1 or more")
    where = _device_of(device)
    text, source = _text(prompt, file)
    use = _choice(backend, where.type)
    for path in (json_, html):
        if path is not None:
            check_writable(path)  # known before the work, not after it
    if threads is not None:
        torch.set_num_threads(threads)
    if model is not None:
        checkpoint.check(model)
    load = machine.load()  # before this process adds its own
    with steps() as progress:
        progress.start("loading the model")
        loaded = checkpoint.load(model, kind, where, seed)
        ids = loaded.encode(text)
        if not ids:
            raise Refusal("the prompt has no tokens; expected text")
        whole, ids = len(ids), ids[:prompt_tokens]
        if loaded.longest and len(ids) + tokens > loaded.longest:
            raise Refusal(
                f"prompt and new tokens are {len(ids)} + {tokens}; "
                f"{loaded.name} was made for {loaded.longest} positions"
            )
        outcome = run_job(loaded, ids, Settings(tokens, where, repeats, use), progress)
    settings = {
        "prompt": source,
        "prompt_tokens": len(ids),
        "prompt_tokens_before_cut": whole,
        "tokens": tokens,
        "dtype": dtype,
        "device": str(where),
        "backend": backend,
        "seed": seed if model is None else None,
        "repeats": repeats,
        "load": load,
    }
    found = figures.figures(loaded, outcome, settings)
    _print(out(), outcome, found)
    if json_ is not None:
        write_json(json_, found)
    if html is not None:
        from .report import render

        write(html, render(outcome, found))
    for what, path in (("figures", json_), ("report", html)):
        if path is not None:
            print(f"{what}: {path}")
    return 0 if outcome.agreement.agrees else 1


def _dtype(text: str) -> torch.dtype:
    if text not in ("f32", "bf16", "f16"):
        raise Refusal(f"--dtype is {text!r}; expected f32, bf16 or f16")
    return SHORT[text]


def _device_of(text: str | None) -> torch.device:
    here = _device.available()
    if text is None:
        return torch.device(here[-1])
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in here:
        raise Refusal(f"--device is {text!r}; available here: {', '.join(here)}")
    return device


def _text(prompt: str | None, file: Path | None) -> tuple[str, str]:
    """The text and where it is from."""
    if prompt is not None and file is not None:
        raise Refusal("--prompt and --file were both given; expected one of them")
    if file is not None:
        try:
            text, source = file.read_text(encoding="utf-8"), str(file)
        except UnicodeDecodeError:
            raise Refusal(f"{file} is not UTF-8; expected a text file") from None
        except OSError as error:
            raise Refusal(f"{file} cannot be read: {error.strerror}") from None
    elif prompt is not None:
        text, source = prompt, "--prompt"
    else:
        text, source = (
            "\n\n".join(op.__doc__ or "" for op in ops().values()),
            "the operators' documentation",
        )
    if not text.strip():
        raise Refusal(f"the text of {source} is empty; expected a prompt")
    return text, source


def _choice(text: str | None, device: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The arguments of transom.use() that --backend asks for."""
    if text is None:
        return (), {}
    for op in ops().values():
        load_implementations(op, device)
    if "=" in text:
        choice = dict(part.strip().partition("=")[::2] for part in text.split(","))
        for name, impl in choice.items():
            if name not in OPS:
                raise Refusal(f"--backend: {name!r} is not an operator; transom explain lists them")
            if impl not in OPS[name].impls:
                have = ", ".join(OPS[name].impls)
                raise Refusal(f"--backend: {name} has no implementation {impl!r}; it has {have}")
        return (), choice
    known = backends()
    if text not in known and not any(text in op.impls for op in OPS.values()):
        raise Refusal(f"--backend is {text!r}; expected one of {', '.join(known)}")
    if (reason := known.get(text)) is not None:
        raise Refusal(f"--backend {text} cannot be used here: {reason}")
    return (text,), {}


def _print(console: Console, outcome: Outcome, found: figures.Figures) -> None:
    console.print()
    for line in figures.headline(found):
        console.print(Text(line))
    console.print()
    _print_sides(console, outcome)
    if found["busy"]:
        console.print(Text(found["busy"], style="yellow"))
        console.print()
    console.print(Text(str(outcome.patch)))
    console.print()
    for phase in outcome.phases:
        _print_phase(console, phase)
    peaks = outcome.peaks
    console.print(
        Text(
            "share: of the recorded pass, in which every operator is waited for; attained: least "
            f"time by the measured peaks ({units.digits(peaks.gflops)} GFLOP/s in float32, "
            f"{units.digits(peaks.gbytes)} GB/s) over the time taken",
            style="dim",
        )
    )
    console.print()
    for line in outcome.slow_paths:
        console.print(Text(f"SlowPath: {line}", style="yellow"))
    agreed = outcome.agreement
    console.print(
        Text(
            f"largest logit difference {units.small(agreed.largest)} = {units.small(agreed.worst)} "
            f"of the range {units.digits(agreed.range)}, over {len(agreed.relative)} positions, "
            f"of which {units.percent(agreed.same_choice)} "
            "have the same first choice"
        )
    )
    good = agreed.agrees
    console.print(
        Text(
            ("outputs agree: " if good else "OUTPUTS DISAGREE: ") + agreed.verdict,
            style="bold green" if good else "bold red",
        )
    )


def _print_sides(console: Console, outcome: Outcome) -> None:
    a, b = outcome.original, outcome.patched
    rows = table("", f">{a.name}", f">{b.name}", f">{b.name} / {a.name}")

    def row(label: str, x: Any, y: Any, text: Callable[[Any], str]) -> None:
        rows.add_row(label, text(x), text(y), f"{y / x:.2f} x" if x and y else units.NONE)

    row("prefill, tokens/s", a.prefill_rate, b.prefill_rate, units.digits)
    row("decode, tokens/s", a.decode_rate, b.decode_rate, units.digits)
    row("peak memory above the model", a.peak_bytes, b.peak_bytes, units.memory)
    console.print(rows)
    console.print()


def _print_phase(console: Console, phase: Phase) -> None:
    calls = "1 call" if phase.steps == 1 else f"{phase.steps} calls"
    rows = table(
        "operator",
        "ran as",
        ">calls",
        ">ms",
        ">share",
        ">GFLOP/s",
        ">GB/s",
        ">attained",
        title=f"{phase.name}: {units.seconds(phase.seconds)} in {calls} of the model, recorded",
    )
    for r in phase.rows:
        rows.add_row(
            r.op,
            r.impl,
            f"{r.calls:,}",
            units.fixed(r.seconds * 1e3),
            units.percent(r.share),
            units.fixed(r.gflops) if r.flops else units.NONE,
            units.fixed(r.gbytes),
            units.percent(r.attained),
        )
    rest = phase.outside
    rows.add_row(
        Text("the rest of the model", style="dim"),
        "torch",
        "",
        units.fixed(rest * 1e3),
        units.percent(rest / phase.seconds if phase.seconds else 0.0),
        "",
        "",
        "",
    )
    console.print(rows)
    console.print()
