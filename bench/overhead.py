"""What a call costs beside its work: the direct path, the torch operator, C plugins, import time.

    python bench/overhead.py [--json] [--gate]

Each figure is the median over rounds of the difference between a call of an operator and a call of
its implementation with the same arguments, in microseconds, and as a ratio to `torch.add` of two
small tensors in the same round (so that figures of different machines can be compared).

A plugin in C (csrc/toy_plugin, compiled here) is called by each road with one row of three tensors,
which leaves it next to nothing to compute. What a road costs above the C function alone (called
through cffi with all its structs made) includes making the output, of which torch.empty_like's own
time is shown. --gate exits 1 when a direct call costs more than LIMIT_ADDS times torch.add above
its implementation, or a road more than ROADS_US.
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
from transom.abi.frame import Frame, addressed
from transom.abi.road import why_cffi
from transom.abi.table import interface
from transom.device import describe

ROOT = Path(__file__).resolve().parents[1]
LIMIT_ADDS = 9.0
ROADS_US = {"cffi": 3.0, "transom._C": 1.0}
ROUNDS, CALLS = 15, 300


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
            transom.mhc_post, (normal(1, 8), normal(1, 4, 8), normal(1, 4), normal(1, 4, 4)), {},
        ),
        "grouped_gemm, 3 tensors and a check of values": (
            transom.grouped_gemm, (normal(4, 8), normal(3, 8, 8), offsets), {},
        ),
        "route, a front": (transom.route, (normal(1, 8), 2), dict(score="softmax")),
    }  # fmt: skip


def measure() -> dict[str, Any]:
    """All figures, candidates interleaved."""
    a, b = torch.ones(4), torch.ones(4)
    rows: dict[str, dict[str, list[float]]] = {}
    # One implementation for both sides: the composite, which everything has.
    with torch.no_grad(), transom.use("composite"):
        for name, (op, args, kwargs) in cases().items():
            values = op._declared(*args, **kwargs)
            function = op.impls["composite"].function
            flat = op._flatten(*values)
            candidates: dict[str, Callable[[], Any]] = {
                "add": lambda: torch.add(a, b),
                "implementation": partial(op._invoke, function, *values),
                "direct": partial(op, *args, **kwargs),
                "torch operator": partial(op.torch_op, *flat),
            }
            rows[name] = {c: [] for c in candidates}
            for work in candidates.values():
                seconds(work, 20)
            for _ in range(ROUNDS):
                for c, work in candidates.items():
                    rows[name][c].append(seconds(work) * 1e6)
    out: dict[str, Any] = {
        "machine": describe("cpu"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "calls": {},
    }
    for name, times in rows.items():
        add = statistics.median(times["add"])
        above = {
            c: statistics.median(
                x - y for x, y in zip(times[c], times["implementation"], strict=True)
            )
            for c in ("direct", "torch operator")
        }
        out["calls"][name] = {
            "torch_add_us": round(add, 2),
            "implementation_us": round(statistics.median(times["implementation"]), 2),
            **{f"{c} above implementation, us": round(v, 2) for c, v in above.items()},
            **{
                f"{c} above implementation, torch.add = 1": round(v / add, 2)
                for c, v in above.items()
            },
        }
    out["plugin"] = plugin()
    out["import"] = import_time()
    return out


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
    frame = Frame(transom.grouped_gemm, parts, [*addressed(y)], "cpu", 0, False)
    frame.call.workspace = interface().cast("void *", workspace.data_ptr())
    frame.call.workspace_bytes = workspace.nbytes
    run, call, status = function.entry.pointer.run, frame.call, frame.status
    through = {"cffi": function.through_cffi(args)}
    if why_cffi() is None:
        through["transom._C"] = function.through_extension()
    candidates: dict[str, Callable[[], Any]] = {
        "C function": lambda: run(call, status),
        "torch.empty_like": lambda: torch.empty_like(y),
        **{road: lambda f=f: f(*args) for road, f in through.items()},
        "operator": lambda: transom.grouped_gemm(*args),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.no_grad(), transom.use(grouped_gemm="toy"):
        for work in candidates.values():
            seconds(work, 20)
        for _ in range(2 * ROUNDS):
            for name, work in candidates.items():
                times[name].append(seconds(work) * 1e6)
    alone = times["C function"]
    return {
        "C function_us": round(statistics.median(alone), 2),
        **{
            f"{name} above C function, us": round(
                statistics.median(x - y for x, y in zip(taken, alone, strict=True)), 2
            )
            for name, taken in times.items()
            if taken is not alone
        },
        "operator's road": "cffi" if why_cffi() else "transom._C",
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--gate", action="store_true", help=f"exit 1 above {LIMIT_ADDS} x add")
    options = parser.parse_args()
    found = measure()
    if options.json:
        print(json.dumps(found))
    else:
        for name, row in found["calls"].items():
            print(name)
            for key, value in row.items():
                print(f"  {value:9.2f}  {key}")
        print("a plugin in C")
        for key, value in found["plugin"].items():
            print(f"  {value:>9}  {key}")
        print(
            f"import transom: {found['import']['transom_ms']} ms "
            f"after torch's {found['import']['torch_ms']} ms"
        )
    ratio = "direct above implementation, torch.add = 1"
    slow = [n for n, r in found["calls"].items() if r[ratio] > LIMIT_ADDS]
    roads = [
        road for road, limit in ROADS_US.items()
        if found["plugin"].get(f"{road} above C function, us", 0.0) > limit
    ]  # fmt: skip
    if options.gate and (slow or roads):
        limits = ", ".join(f"{road} {ROADS_US[road]} us" for road in roads)
        most = f"{', '.join(slow)} above {LIMIT_ADDS} x torch.add" * bool(slow)
        text = most, limits and f"above {limits}"
        print(f"overhead: {'; '.join(filter(None, text))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
