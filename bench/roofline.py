"""Implementations against the machine's ceilings, all measured in the same rounds.

    python bench/roofline.py [OP ...] [--dtype f32,bf16] [--rounds 7] [--json]

Cases are the operators' examples, with the experts cut to what --memory holds. Before anything is
timed each implementation's result is compared with the composite's. The candidates and the two
ceilings (multiply-add: a float32 matrix product of torch; read: a sum over 512 MiB) take turns, and
each figure is the median over the rounds of a ratio within a round: a machine that others share
slows down both alike. `of attainable` is the roofline: the time that the work needs at the ceilings
(the longer of arithmetic and memory) over the time it took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import transom
from transom import device, dtypes
from transom.conformance.cases import build
from transom.op import Op

OPS = ("grouped_gemm", "moe_experts")
N = 1024
READ_BYTES = 512 << 20


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cut(op: Op, example: dict[str, Any], size: int, memory: float) -> dict[str, Any]:
    """The example with as many experts as `memory` bytes hold."""
    out = dict(example)
    while out["E"] > max(1, out.get("K", 1) if op.name == "moe_experts" else 1):
        shapes = [s.sizes(out) for s in op.signature.inputs.values() if not s.optional]
        if sum(torch.Size(s).numel() for s in shapes) * size <= memory:
            break
        out["E"] //= 2
    return out


def spread_evenly(op: Op, values: dict[str, Any], dims: dict[str, Any]) -> dict[str, Any]:
    """Every expert with nearly the same rows: a draw at random would decide the figures."""
    if op.name == "grouped_gemm":
        ends = torch.arange(1, dims["E"] + 1) * dims["M"] // dims["E"]
        return {**values, "offsets": ends}
    T, K, E = dims["T"], dims["K"], dims["E"]
    return {**values, "ids": (torch.arange(T * K) % E).view(T, K)}


def touched(op: Op, values: dict[str, Any]) -> float:
    """Bytes that the call must move: the weights of experts with rows, and everything else."""
    cost = op.cost([values[p.name] for p in op.parameters]).bytes
    if op.name == "grouped_gemm":
        ends = values["offsets"]
        used = int((torch.diff(ends, prepend=ends.new_zeros(1)) > 0).sum())
        weight = values["weight"].nbytes
        cost -= weight * (1 - used / values["weight"].shape[0])
    return cost


def measure(op: Op, dims: dict[str, Any], dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One row for each implementation that can run the case."""
    optional = {s.name for s in op.signature.inputs.values() if s.optional}
    case = build(op, dims, dtype, absent=optional)
    names = [p.name for p in op.parameters]
    values = spread_evenly(op, dict(zip(names, case.values, strict=True)), dims)
    # the kit stores tensors amid guards; a user's are contiguous
    for name, value in values.items():
        if isinstance(value, transom.QuantizedWeight):
            values[name] = value.dequantize(dtype)
        elif isinstance(value, torch.Tensor):
            values[name] = value.clone(memory_format=torch.contiguous_format)
    a, b, out = torch.randn(N, N), torch.randn(N, N), torch.empty(N, N)
    big = torch.ones(READ_BYTES // 4)
    chosen = op.explain(**values)
    able = [i for i in op.impls if i not in chosen.rejected]
    taken: dict[str, list[float]] = {i: [] for i in (*able, "fma", "read")}
    with transom.use(**{op.name: "composite"}):
        want = op(**values).double()
    for name in able:
        with transom.use(**{op.name: name}):
            error = (op(**values).double() - want).abs().max() / want.abs().max()
        assert error < 4 * dtypes.UNIT_ROUNDOFF[dtype] + 1e-5, f"{op.name} {name} is off by {error}"
    for _ in range(rounds):
        for name in able:
            with transom.use(**{op.name: name}):
                taken[name].append(seconds(lambda: op(**values)))
        taken["fma"].append(seconds(lambda: torch.mm(a, b, out=out)))
        taken["read"].append(seconds(big.sum))
    flops, moved = op.cost([values[n] for n in names]).flops, touched(op, values)
    rows = []
    for name in able:
        of_fma, of_read, of_both, of_composite = [], [], [], []
        for i in range(rounds):
            t = taken[name][i]
            arithmetic = flops * taken["fma"][i] / (2 * N**3)
            memory = moved * taken["read"][i] / big.nbytes
            of_fma.append(arithmetic / t)
            of_read.append(memory / t)
            of_both.append(max(arithmetic, memory) / t)
            of_composite.append(taken["composite"][i] / t)
        rows.append({
            "op": op.name, "impl": name, "dtype": dtypes.name(dtype), **dims,
            "milliseconds": statistics.median(taken[name]) * 1e3,
            "of_fma": statistics.median(of_fma), "of_read": statistics.median(of_read),
            "of_attainable": statistics.median(of_both),
            "spread": (min(of_both), max(of_both)), "of_composite": statistics.median(of_composite),
        })  # fmt: skip
    return rows


def main() -> int:
    """Print a table, or with --json a line a row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", default=[*OPS], metavar="OP")
    parser.add_argument("--dtype", default="f32,bf16", help="of activations and weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=float, default=1.0, help="GB for a case's tensors")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := [name for name in args.ops if name not in OPS]:
        parser.error(f"no cases for {', '.join(unknown)}; expected {', '.join(OPS)}")
    about = {"machine": device.describe("cpu"), "threads": torch.get_num_threads()}
    if not args.json:
        print(f"{about['machine']}, {about['threads']} threads, torch {torch.__version__}")
        print("of the same round's multiply-add, read, and roofline; times the composite\n")
    with torch.no_grad():
        for op in (transom.ops()[name] for name in args.ops):
            for example in op.examples:
                for dtype in map(dtypes.parse, args.dtype.split(",")):
                    # the kit draws cases in float64
                    dims = cut(op, example, 8, args.memory * 1e9)
                    for row in measure(op, dims, dtype, args.rounds):
                        report(row, about, example["E"], args.json)
    return 0


def report(row: dict[str, Any], about: dict[str, Any], experts: int, as_json: bool) -> None:
    """One row as text or JSON."""
    if as_json:
        print(json.dumps({**about, **row, "experts_of_the_model": experts}), flush=True)
        return
    shape = " ".join(f"{k}={row[k]}" for k in ("M", "T", "D", "I", "N", "K", "E") if k in row)
    low, high = row["spread"]
    print(
        f"{row['op']:13} {row['dtype']:9} {row['impl']:10} {row['milliseconds']:9.2f} ms"
        f"  fma {row['of_fma']:.2f}  read {row['of_read']:.2f}"
        f"  roofline {row['of_attainable']:.2f} ({low:.2f}-{high:.2f})"
        f"  composite x {row['of_composite']:.2f}   {shape} of {experts}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
