"""A whole DeepSeek-V4 on an accelerator, patched and as transformers runs it:
python -m transom.bench.accelerator_model --out bench/results/gpu.jsonl"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from transom import device as _device
from transom import dtypes

from .accelerator import append
from .whole import NAME, STEPS, _pass, compared, last_logits

ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and append JSON lines to --out."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--device", default="cuda")
    ask.add_argument("--dtype", default="bf16")
    ask.add_argument("--prompt", type=int, default=2048)
    ask.add_argument("--out", type=Path)
    given = ask.parse_args(arguments)
    if given.device.partition(":")[0] not in (here := _device.available()):
        print(f"device is {given.device!r}; available here: {', '.join(here)}", file=sys.stderr)
        return 2
    device, failed = torch.device(given.device), 0
    about = {
        "device": _device.describe(device.type),
        "arch": _device.arch(device.type),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    with torch.inference_mode():
        for row in measure(device, given.dtype, given.prompt):
            failed += "left_out" in row
            rate = row.get("left_out") or f"{row['tokens'] / row['seconds']:,.0f} tokens/s"
            print(f"{NAME}: {row['label']}, {row['candidate']}: {rate}", flush=True)
            append(given.out, {**about, **row})
    return 1 if failed else 0


def measure(device: torch.device, dtype: str, prompt: int) -> Iterator[dict[str, Any]]:
    """Rows of prefill and of decode for both; their logits are compared first."""
    from transom.conformance.models.tiny import builtin_model
    from transom.models import patch, unpatch

    def clock() -> float:
        _device.synchronize(device)
        return time.perf_counter()

    tokens = torch.randint(256, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    models = {}
    for name in ("transformers eager", "transom"):
        models[name] = builtin_model(dtype=dtypes.parse(dtype))[0].to(device)
    patch(models["transom"])
    try:
        want, got = (last_logits(model, tokens) for model in models.values())
        found = compared(want, got, models["transom"])
        passes: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, model in models.items():
                passes[name].append(_pass(model, tokens, clock))
        for at, label in enumerate((f"prefill of {prompt:,}", f"decode at {prompt:,}")):
            for name, seconds in passes.items():
                row = dict(
                    op=NAME,
                    model="builtin-v4",
                    label=label,
                    dtype=dtype,
                    format="plain",
                    dims={"prompt": prompt, "steps": STEPS},
                    candidate=name,
                    tokens=1 if at else prompt,
                    error=found.judged,
                )
                if name == "transom" and not found.agrees:
                    yield {**row, "left_out": f"differs from transformers: {found.verdict}"}
                else:
                    yield {**row, "seconds": statistics.median(s[at] for s in seconds)}
    finally:
        unpatch(models["transom"])


if __name__ == "__main__":
    sys.exit(main())
