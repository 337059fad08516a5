"""transom verify --target ascend: the Triton kernels through Ascend's compilers, with no device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from transom.cli.console import Refusal, out, steps, table, write, write_json
from transom.cli.report import template


def verify(
    names: list[str] | None,
    *,
    examples: int,
    quick: bool,
    fit: bool,
    jobs: int,
    report: Path | None,
    json_: Path | None,
    about: dict[str, Any],
) -> int:
    """Lowers, executes and plans the kernels of these operators (None: all), and compares the
    vendor's schemas; fit: first looks for the largest tiles that fit, and stores them.

    Each call costs compiles, so a fifth of `examples` is drawn beyond the fixed calls."""
    if importlib.util.find_spec("triton") is None:
        raise Refusal("triton is not installed; the kernels are its; pip install transom[triton]")
    from . import contract, tiles
    from . import environment as environments
    from . import verify as work

    with steps() as progress:
        try:
            progress.start("the vendor's compilers, in an environment of their own")
            environment = environments.ready()
            if fit:
                progress.start("the largest tiles that fit")
                tiles.refit(environment, names, every=not quick, workers=jobs, tell=_tell)
            progress.start("kernels on Ascend", 100)
            outcome = work.verify(
                environment,
                names,
                examples=0 if quick else examples // 5,
                every=not quick,
                workers=jobs,
                progress=progress.reach,
            )
        except environments.Unavailable as error:
            raise Refusal(str(error)) from None
        progress.start("the vendor's schemas")
        try:
            outcome.contract = contract.changed(environment)
        except environments.Unavailable as error:  # what was found so far stands without them
            outcome.unasked = str(error)
    if report is not None:
        write(report, render(outcome, work.NOTE, about))
    if json_ is not None:
        write_json(json_, {**outcome.plain(), **about})
    show(out(), outcome, work.NOTE)
    if report is not None:
        out().print(Text(f"report: {report}", style="dim"))
    return 0 if outcome.passed else 1


def _tell(entry: str, chip: str, tile: Any) -> None:
    sizes = " ".join(f"{n}={size}" for n, size in tile.sizes) if tile else "no tile fits"
    out().print(f"{entry} on {chip}: {sizes}")


def show(console: Console, outcome: Any, note: str) -> None:
    """The findings as tables, and the verdict."""
    shown = table("operator", ">calls", ">wrong", ">refused", ">launches")
    for op in dict.fromkeys(r.op for r in outcome.ran):
        mine = [r for r in outcome.ran if r.op == op]
        wrong = sum(bool(r.stage) for r in mine)
        refused = sum(r.op == op and not r.planned for r in outcome.refused)
        counts = (len(mine), wrong or "", refused or "", sum(r.launches for r in mine))
        shown.add_row(op, *map(str, counts))
    console.print(shown)
    console.print()
    shown = table("kernel", "tile", "chip", "fits", ">UB", ">L1", ">L0C", "fullest")
    for f in outcome.fits:
        use = [f"{f.plan.use[m] / 1024:.0f} KiB" if m in f.plan.use else "" for m in _MEMORIES]
        shown.add_row(f.kernel, f.tile, f.plan.target, fits(f), *use, fullness(f.plan))
    console.print(shown)
    for r in (r for r in outcome.ran if r.stage):
        console.print(Text(f"\n{r.op} on {r.chip}, {r.stage}: {r.why}"))
        console.print(Text(f"  {r.call}", style="dim"))
    for f in (f for f in outcome.fits if not f.plan.fits):
        console.print(Text(f"\n{f.kernel} {f.tile} on {f.plan.target}: {f.plan.why}"))
        console.print(Text(f"  {f.op}: {f.call}", style="dim"))
    for sentence in (*outcome.contract, outcome.unasked):
        if sentence:
            console.print(Text(f"\n{sentence}"))
    for op, why in dict.fromkeys((r.op, r.why) for r in outcome.refused):
        console.print(Text(f"\n{op}, refused: {why}"))
    console.print()
    shown = table("level", ">passed", ">failed", ">refused")
    for level, counts in outcome.levels.items():
        shown.add_row(level, *map(str, counts))
    console.print(shown)
    console.print()
    console.print(Text(note, style="dim"))
    style = "green" if outcome.passed else "red"
    verdict = Text("passed" if outcome.passed else "failed", style=style)
    console.print(verdict, summary(outcome), sep=": ")


_MEMORIES = ("UB", "L1", "L0C")


def fits(finding: Any) -> str:
    """'yes'; 'no', or of a tile that is only listed beside the chosen one '(no)'."""
    return "yes" if finding.plan.fits else "no" if finding.chosen else "(no)"


def fullness(plan: Any) -> str:
    """`L0C 50%`: the memory that is used most; of an overflow how much it would need."""
    return f"{plan.fullest[0]} {plan.fullest[1]:.0%}" if plan.fullest else ""


def summary(outcome: Any) -> str:
    """What was asked, in a sentence."""
    ran, kernels = len(outcome.ran), len({f.kernel for f in outcome.fits})
    return (
        f"{ran} calls executed, {kernels} kernels planned for "
        f"{len({f.plan.target for f in outcome.fits})} chips in {outcome.seconds / 60:.0f} min, "
        f"{len(outcome.failed)} failed; "
    ) + (
        "the vendor's schemas were not compared"
        if outcome.unasked
        else f"{len(outcome.contract)} of the vendor's schemas have changed"
    )


def render(outcome: Any, note: str, about: dict[str, Any]) -> str:
    """The report as one HTML file that needs nothing else."""
    return template(__package__, "ascend.html").render(
        outcome=outcome,
        note=note,
        about=about,
        memories=_MEMORIES,
        fits=fits,
        fullness=fullness,
        summary=summary(outcome),
        ops=dict.fromkeys(r.op for r in outcome.ran),
    )
