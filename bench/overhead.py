"""What a call costs beside its work: the direct path, the torch operator, C plugins, import time.

    python bench/overhead.py [--json] [--gate]

A call of an operator is timed with an implementation that does nothing, so that nothing is left but
what the call costs: through the direct path, and as a torch operator. A plugin in C
(csrc/toy_plugin, compiled here) is called by each road with one row of three tensors, which leaves
it next to nothing to compute; what a road costs above the C function alone (called through cffi
with all its structs made) includes making the output, of which torch.empty_like's own time is
shown.

Each figure is the median over rounds, in microseconds and as a ratio to `torch.add` of two small
tensors in the same round. --gate exits 1 where such a ratio is above its limit (LIMITS): a machine
that is slow, or shared, is slow at both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import transom
from transom.abi.extension import why_cffi
from transom.abi.frame import Frame
from transom.abi.library import interface
from transom.device import describe
from transom.op import Impl, Op
from transom.weights.layout import addressed

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"direct": 3.0, "direct, in Python": 20.0, "transom._C": 1.5}
"""The most that a call of an operator (with the extension and without), and one of a C function
through the extension, may cost: torch.add = 1. Twice what was measured, about."""
ROUNDS, CALLS = 15, 300
ROAD = "operator's road"
UNIT = "torch.add = 1"


def seconds(work: Callable[[], Any], calls: int = CALLS) -> float:
    """Seconds of one call, over `calls` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def cases() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Small calls of operators with few and with many arguments."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    offsets = torch.tensor([1, 2, 4])
    return {
        "sinkhorn, 1 tensor": (transom.sinkhorn, (normal(1, 4, 4),), dict(iterations=1, eps=1e-6)),
        "mhc_post, 4 tensors": (
            transom.mhc_post,
            (normal(1, 8), normal(1, 4, 8), normal(1, 4), normal(1, 4, 4)),
            {},
        ),
        "grouped_gemm, 3 tensors and a check of values": (
            transom.grouped_gemm,
            (normal(4, 8), normal(3, 8, 8), offsets),
            {},
        ),
        "route, a front": (transom.route, (normal(1, 8), 2), dict(score="softmax")),
    }


def times(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of a call of each in every round, interleaved; `add` is what they are compared
    with."""
    a, b = torch.ones(4), torch.ones(4)
    candidates = {"add": lambda: torch.add(a, b), **candidates}
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for work in candidates.values():
        seconds(work, 20)
    for _ in range(rounds):
        for name, work in candidates.items():
            found[name].append(seconds(work) * 1e6)
    return found


def cost(taken: list[float], add: list[float]) -> dict[str, float]:
    """The figures of one candidate."""
    ratios = [x / y for x, y in zip(taken, add, strict=True)]
    return {"us": round(statistics.median(taken), 2), UNIT: round(statistics.median(ratios), 2)}


def measure() -> dict[str, Any]:
    """All figures."""
    out: dict[str, Any] = {
        "machine": describe("cpu"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        ROAD: "cffi" if why_cffi() else "transom._C",
        "calls": {},
    }
    for name, (op, args, kwargs) in cases().items():
        _, values = op.engine.arguments(*args, **kwargs)
        with torch.no_grad(), transom.use(**{op.name: idle(op, values)}):
            found = times(
                {
                    "direct": partial(op, *args, **kwargs),
                    "torch operator": partial(op.torch_op, *op.flatten(*values)),
                },
                ROUNDS,
            )
        add = found.pop("add")
        out["torch_add_us"] = round(statistics.median(add), 2)
        out["calls"][name] = {way: cost(taken, add) for way, taken in found.items()}
    out["plugin"] = plugin()
    out["import"] = import_time()
    return out


def idle(op: Op[..., Any], values: tuple[Any, ...]) -> str:
    """The name of an implementation that has its answer to a call of these arguments ready."""
    answer = op.invoke(op.impls["composite"].function, *values)
    op.add(Impl(op.name, "idle", "bench", lambda *args, **kwargs: answer))
    return "idle"


def plugin() -> dict[str, Any]:
    """A call of a plugin in C by each road, above its C function alone."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libtoy.so"
        options = ("-std=c11", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc/include'}")
        source = ROOT / "csrc/toy_plugin/toy.c"
        try:
            subprocess.run(["cc", *options, source, "-o", library], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return {"not measured": str(error)}
        transom.CPlugin(library)
    args = torch.ones(1, 4), torch.ones(1, 4, 4), torch.tensor([1])
    function = transom.grouped_gemm.impls["toy"].function
    y, workspace = torch.empty(1, 4), torch.empty(4)
    parts = [addressed(tensor) for tensor in args]
    frame = Frame(transom.grouped_gemm, parts, [*addressed(y)], ("cpu", 0), False)
    frame.reach()
    frame.call.workspace = interface().cast("void *", workspace.data_ptr())
    frame.call.workspace_bytes = workspace.nbytes
    run, call, status = function.entry.pointer.run, frame.call, frame.status
    through = {"cffi": lambda *args: function.through_cffi(args)}
    if why_cffi() is None:
        through["transom._C"] = function.prepared()
    candidates: dict[str, Callable[[], Any]] = {
        "C function": lambda: run(call, status),
        "torch.empty_like": lambda: torch.empty_like(y),
        **{road: lambda f=f: f(*args) for road, f in through.items()},
        "operator": lambda: transom.grouped_gemm(*args),
    }
    with torch.no_grad(), transom.use(grouped_gemm="toy"):
        taken = times(candidates, 2 * ROUNDS)
    add, alone = taken.pop("add"), taken.pop("C function")
    above = {
        name: [x - y for x, y in zip(each, alone, strict=True)]
        for name, each in taken.items()
        if name != "torch.empty_like"
    }
    return {
        "C function": cost(alone, add),
        "torch.empty_like": cost(taken["torch.empty_like"], add),
        "above C function": {name: cost(each, add) for name, each in above.items()},
    }


def import_time() -> dict[str, float]:
    """Milliseconds that `import transom` adds to `import torch`: medians of fresh processes."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter();"
        "import transom; c = time.perf_counter(); print(b - a, c - b)"
    )
    runs = [
        [
            float(v)
            for v in subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.split()
        ]
        for _ in range(7)
    ]
    torch_s, ours = (statistics.median(r[i] for r in runs) for i in (0, 1))
    return {
        "torch_ms": round(torch_s * 1e3, 1),
        "transom_ms": round(ours * 1e3, 1),
        "ratio": round(ours / torch_s, 3),
    }


def beyond(found: dict[str, Any]) -> list[str]:
    """What is above its limit."""
    direct = "direct, in Python" if found[ROAD] == "cffi" else "direct"
    figures = [(f"a call of {n}", direct, row["direct"]) for n, row in found["calls"].items()]
    roads = found["plugin"].get("above C function", {})
    figures += [(f"a call through {n}", n, row) for n, row in roads.items() if n in LIMITS]
    return [
        f"{what} costs {row[UNIT]:.2f} x torch.add; at most {LIMITS[kind]}"
        for what, kind, row in figures
        if row[UNIT] > LIMITS[kind]
    ]


def lines(found: dict[str, Any]) -> list[str]:
    """The figures to be read."""

    def line(what: str, row: dict[str, float]) -> str:
        return f"  {row['us']:8.2f} us {row[UNIT]:7.2f} x torch.add  {what}"

    out = [f"torch.add: {found['torch_add_us']} us"]
    for name, row in found["calls"].items():
        out += [name, *(line(way, figures) for way, figures in row.items())]
    toy = found["plugin"]
    if "not measured" in toy:
        out.append(f"a plugin in C: {toy['not measured']}")
    else:
        out.append(f"a plugin in C; its operator goes through {found[ROAD]}")
        out += [line(name, toy[name]) for name in ("C function", "torch.empty_like")]
        above = toy["above C function"]
        out += [line(f"{name} above C function", row) for name, row in above.items()]
    ours, torchs = found["import"]["transom_ms"], found["import"]["torch_ms"]
    return [*out, f"import transom: {ours} ms after torch's {torchs} ms"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gate", action="store_true", help="exit 1 above a limit")
    options = parser.parse_args()
    found = measure()
    print(json.dumps(found) if options.json else "\n".join(lines(found)))
    if options.gate and (slow := beyond(found)):
        print(f"overhead: {'; '.join(slow)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
