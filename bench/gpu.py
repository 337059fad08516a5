"""All that a machine with a GPU must show, one step after the other: python -m transom.bench.gpu

The conformance kit at all levels, tests that need a device, compute-sanitizer over the kernels,
tiles by measurement, the benchmark, a whole model, and the table of the bars: under
bench/results/<device>. A step that fails does not keep the next from running; the status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transom import backends
from transom import device as _device

from .accelerator_bars import judged, read, table

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"
SANITIZER = "compute-sanitizer"
COMMAND = "import sys; from transom.cli import main; sys.exit(main())"
"""`transom`, of this environment whether or not its programs are on the path."""

UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""A sanitizer sees the end of a tensor only where torch does not pool memory."""


@dataclass(frozen=True)
class Step:
    """A command, and what it writes."""

    name: str
    command: tuple[str, ...]
    needs: str = ""
    """A program, or a file below the repository, without which it is left out."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set for it."""

    def told(self) -> str:
        """The command as a person types it."""
        text = " ".join(self.command)
        return text.replace(f"{sys.executable} -c {COMMAND}", "transom")


@dataclass(frozen=True)
class Done:
    """How a step ended."""

    name: str
    command: str
    result: str
    """passed, failed (status N), or left out: why."""
    seconds: float


def missing() -> str | None:
    """Why this machine cannot run it, or None."""
    if DEVICE not in (here := _device.available()):
        return f"gpu: torch sees no GPU here, only {', '.join(here)}; expected one of NVIDIA or AMD"
    reason = backends()["triton"]
    return None if reason is None else f"gpu: {reason}"


def steps(folder: Path) -> list[Step]:
    """In order: is it right, then how fast."""
    python, transom = sys.executable, (sys.executable, "-c", COMMAND)
    rows, tests = folder / "accelerator.jsonl", "tests/triton/test_device.py"
    kit = ("-m", "transom.conformance", "--transom-impl", "triton", "--transom-device", DEVICE)
    bench = (python, "-m", "transom.bench.accelerator", "--device", DEVICE, "--out", str(rows))
    return [
        Step(
            "conformance",
            (
                *transom,
                "verify",
                "--backend",
                "triton",
                "--device",
                DEVICE,
                "--html",
                str(folder / "conformance.html"),
                "--json",
                str(folder / "conformance.json"),
            ),
        ),
        Step("tests of devices", (python, "-m", "pytest", "-q", tests), tests),
        *(
            Step(
                f"compute-sanitizer {tool}",
                (
                    SANITIZER,
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "99",
                    "--target-processes",
                    "all",
                    python,
                    *kit,
                    "--transom-examples",
                    "1",
                    "-k",
                    "numbers or sizes",
                ),
                SANITIZER,
                UNPOOLED,
            )
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        Step("tiles", (*transom, "tune", "--tiles", "--device", DEVICE, "--dtype", "bf16")),
        Step(
            "benchmark",
            (
                *bench,
                "--model",
                "v4-flash",
                "--tokens",
                "1,8,16,64,4096",
                "--format",
                "plain,mxfp4",
            ),
        ),
        Step(
            "benchmark of lookups",
            (
                *bench,
                "--model",
                "v4.1-flash",
                "--tokens",
                "1,64,4096",
                "--format",
                "plain,fp8",
                "--ops",
                "hashed_embedding,hashed_embedding_out,hashed_embedding_pooled",
            ),
        ),
        Step(
            "whole model",
            (
                python,
                "-m",
                "transom.bench.accelerator_model",
                "--device",
                DEVICE,
                "--out",
                str(rows),
            ),
        ),
    ]


def run(
    step: Step,
    folder: Path,
    start: Callable[..., subprocess.CompletedProcess[bytes]] = subprocess.run,
) -> Done:
    """One step; what it prints goes into a file of its own."""
    command = step.told()
    if step.needs and shutil.which(step.needs) is None and not (ROOT / step.needs).exists():
        where = "; it comes with the CUDA toolkit" if step.needs == SANITIZER else ""
        return Done(step.name, command, f"left out: {step.needs} is not here{where}", 0.0)
    began = time.monotonic()
    with (folder / f"{slug(step.name)}.txt").open("wb") as out:
        status = start(
            step.command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            check=False,
            env={**os.environ, **step.environment},
        ).returncode
    result = "passed" if status == 0 else f"failed (status {status})"
    return Done(step.name, command, result, round(time.monotonic() - began, 1))


def slug(text: str) -> str:
    """A device's or a step's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every step, or those of --only; print the results and the bars."""
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--results", type=Path, default=ROOT / "bench/results")
    ask.add_argument("--only", default="", help="steps whose names begin so, by commas")
    given = ask.parse_args(arguments)
    if (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        return 2
    device = _device.describe(DEVICE)
    folder = given.results / slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = tuple(n.strip() for n in given.only.split(",") if n.strip()) or ("",)
    done = []
    for step in steps(folder):
        if step.name.startswith(wanted):
            print(f"{step.name}: {step.told()}", flush=True)
            done.append(run(step, folder))
            print(f"{step.name}: {done[-1].result}, {done[-1].seconds:,.0f} s", flush=True)
    rows = folder / "accelerator.jsonl"
    text = table(judged(read(rows) if rows.exists() else ()), device)
    (folder / "bars.md").write_text(text, encoding="utf-8")
    (folder / "steps.json").write_text(json.dumps([asdict(d) for d in done], indent=1) + "\n")
    print(f"\n{text}\nresults: {folder}")
    return 1 if any(d.result.startswith("failed") for d in done) else 0


if __name__ == "__main__":
    sys.exit(main())
