"""The operators on an accelerator, against torch's own: python -m transom.bench.accelerator

    python -m transom.bench.accelerator --model v4-flash --tokens 1,64,4096 --format plain,mxfp4
    python -m transom.bench.accelerator --ops grouped_gemm --tokens 4096 --out results/h200.jsonl

The cases and torch's ways are those of `transom bench`; inputs are drawn on the host and moved. A
candidate's result is compared with the composite's before it is timed. Calls are timed one by one
with the device's events, after writing over its cache; draws are taken in turn. Ceilings are
measured first: the largest rate of square products in bfloat16 and of copying.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom import device as _device
from transom import dispatch, selection
from transom.errors import SlowPath
from transom.registry import OPS
from transom.weights import QuantizedWeight

from .cases import Case, Draw, Wanted, cases, forget
from .measure import agrees, dims_of
from .models import find
from .peers import torch_

CACHE = 1 << 28
"""Bytes written over before each call: more than any device's last-level cache."""

Call = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Peaks:
    """What this device reaches: operations a second of bfloat16 products, bytes a second copied."""

    flops: float
    bytes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line a candidate, and append JSON lines to --out."""
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--device", default="cuda")
    ask.add_argument("--model", default="v4-flash")
    ask.add_argument("--ops", default="", help="separated by commas; all if left out")
    ask.add_argument("--tokens", default="1,16,64,4096")
    ask.add_argument("--context", default="4096,65536")
    ask.add_argument("--dtype", default="bf16")
    ask.add_argument("--format", default="plain,mxfp4")
    ask.add_argument("--memory", type=float, default=32, help="GiB that a case's tensors may take")
    ask.add_argument("--repeats", type=int, default=30)
    ask.add_argument("--out", type=Path, help="append the results to this file, a line each")
    given = ask.parse_args(arguments)
    if given.device.partition(":")[0] not in (here := _device.available()):
        print(f"device is {given.device!r}; available here: {', '.join(here)}", file=sys.stderr)
        return 2
    device = torch.device(given.device)
    wanted = Wanted(
        _numbers(given.tokens),
        _numbers(given.context),
        tuple(given.dtype.split(",")),
        tuple(given.format.split(",")),
        int(given.memory * 2**30),
    )
    about: dict[str, Any] = {
        "device": _device.describe(device.type),
        "arch": _device.arch(device.type),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    peaks = measured_peaks(device)
    print(f"{about['device']}: {peaks.flops / 1e12:.0f} TFLOP/s, {peaks.bytes / 1e9:.0f} GB/s")
    names = [n for n in given.ops.split(",") if n]
    about |= {"peak_flops": peaks.flops, "peak_bytes": peaks.bytes}
    failed = 0
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPath)
            for case in cases(names, [find(given.model).name], wanted):
                for row in measure(case, device, peaks, given.repeats):
                    failed += row.get("failed", False)
                    _print(row)
                    append(given.out, {**about, **row})
    except DeviceFault as fault:
        print(fault, file=sys.stderr)
        failed += 1
    forget()
    return 1 if failed else 0


class DeviceFault(RuntimeError):
    """A kernel has left the device in a state in which nothing more can be measured."""


def append(path: Path | None, row: Mapping[str, Any]) -> None:
    """One more line of JSON, in a file that is made if need be."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def measure(
    case: Case, device: torch.device, peaks: Peaks, repeats: int
) -> Iterator[dict[str, Any]]:
    """A row for each candidate of a case: medians, and its share of what the peaks allow."""
    inputs = case.make(Draw(case.dtype))
    draws = [_moved(draw, device) for draw in inputs.draws]
    least = max(inputs.flops / peaks.flops, inputs.bytes / peaks.bytes)
    about = {
        "op": case.op,
        "model": case.model,
        "label": case.label,
        "dtype": case.dtype,
        "format": case.format,
        "dims": dict(case.dims),
        "scaled": case.scaled,
        "flops": inputs.flops,
        "bytes": inputs.bytes,
    }
    want: Any = None
    dims = dims_of(OPS[case.op], draws[0])
    for name, call in candidates(case, draws[0]):
        row = {**about, "candidate": name}
        try:
            got = call(draws[0])
            want = got if want is None else want
            peer = "transom" if name in OPS[case.op].impls else name
            if (problem := agrees(case, got, want, dims, peer)) is not None:
                yield {**row, "left_out": f"differs: {problem}", "failed": True}
                continue
            seconds = timed(call, draws, device, repeats)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            yield {**row, **left_out(name, error, case, device)}
            continue
        median = statistics.median(seconds)
        yield {**row, "seconds": median, "best": min(seconds), "attained": least / median}


def left_out(name: str, error: Exception, case: Case, device: torch.device) -> dict[str, Any]:
    """What a row says of a candidate that raised. An implementation of ours has failed, unless
    memory ran out; a peer may not take the case. DeviceFault if the device is of no more use."""
    text = " ".join(str(error).split())[:200]
    try:
        _device.synchronize(device)
    except RuntimeError as after:
        raise DeviceFault(
            f"{case.op}, {case.label}: the device failed under {name}: {text}; expected it to wait"
            f" for its work, got: {' '.join(str(after).split())[:120]}"
        ) from error
    ours = name in OPS[case.op].impls and not isinstance(error, torch.OutOfMemoryError)
    return {"left_out": text, "failed": ours}


def candidates(case: Case, values: Mapping[str, Any]) -> Iterator[tuple[str, Call]]:
    """The composite, which the others are compared with, every implementation that can run, and
    what torch has: its own, and flex_attention compiled."""
    op = OPS[case.op]
    order = [values[p.name] for p in op.parameters]
    facts = dispatch.facts_of(op, order)
    for impl in sorted(selection.able(op, facts), key=lambda i: i.tier != "composite"):

        def ours(v: Mapping[str, Any], function: Any = impl.function) -> Any:
            return op.invoke(function, *(v[p.name] for p in op.parameters))

        yield impl.name, ours
    device = next(iter(op.tensors(order).values())).device
    for candidate in torch_.candidates(case, values):
        with torch.device(device):
            prepared = candidate.prepare(values)

        def there(v: Mapping[str, Any], call: Call = prepared) -> Any:
            with torch.device(device):  # where the peers' own tensors are made
                return call(v)

        yield candidate.name, there
    if case.op == "sparse_attention":
        yield "torch flex_attention", flex_attention(values)
    if case.op == "lightning_indexer":
        yield "torch matmul + topk", matmul_topk


QUERIES = 1024
"""Of a product of all scores, so that what it needs stays below a few GiB."""


def matmul_topk(v: Mapping[str, Any]) -> Tensor:
    """Scores of many queries at a time by one matmul, and torch's topk of them."""
    q, k = v["q"][0], v["k"][0]
    out = []
    for first in range(0, q.shape[0], QUERIES):
        some = slice(first, first + QUERIES)
        scores = torch.matmul(q[some], k.T).relu_()
        weights = v["weights"][0, some].to(q.dtype)
        total = torch.bmm(weights[:, None], scores)[:, 0]
        seen = torch.arange(k.shape[0], device=q.device) < v["visible"][0, some, None]
        ids = total.masked_fill_(~seen, -torch.inf).topk(min(v["top_k"], k.shape[0]), -1).indices
        ids = ids.masked_fill(ids >= v["visible"][0, some, None], -1).to(torch.int32)
        out.append(torch.nn.functional.pad(ids, (0, v["top_k"] - ids.shape[1]), value=-1))
    return torch.cat(out)[None]


def flex_attention(values: Mapping[str, Any]) -> Call:
    """Compiled flex_attention with the same mask, its block mask made before; the sink left to a
    renormalisation by the log-sum-exp that it returns."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention)

    def call(v: Mapping[str, Any]) -> Tensor:
        q, kv = v["q"].transpose(1, 2), v["kv"]
        keys = kv if v["local_kv"] is None else torch.cat((kv, v["local_kv"]), 1)
        if id(v) not in masks:
            with torch.device(q.device):
                seen = torch_._mask(v)
            S, N = seen.shape
            masks[id(v)] = create_block_mask(
                lambda b, h, i, j: seen[i, j], None, None, S, N, device=str(q.device)
            )
        keys = keys[:, None]
        out, more = compiled(
            q,
            keys,
            keys[..., : v["v_dim"]],
            block_mask=masks[id(v)],
            scale=v["scale"],
            enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )
        if v["sink"] is not None:  # one more key without a value
            out = out * torch.sigmoid(more.lse - v["sink"][None, :, None])[..., None].to(out.dtype)
        return out.transpose(1, 2).contiguous()

    masks: dict[int, Any] = {}
    return call


def timed(
    call: Call, draws: Sequence[Mapping[str, Any]], device: torch.device, repeats: int
) -> list[float]:
    """Seconds of each call, one after the other, the cache written over in between."""
    for draw in draws[:3]:
        call(draw)
    over = torch.empty(CACHE // 4 if device.type != "cpu" else 1, device=device)
    out = []
    for i in range(repeats):
        over.zero_()
        out.append(_one(call, draws[i % len(draws)], device))
    return out


def _one(call: Call, draw: Mapping[str, Any], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        call(draw)
        return time.perf_counter() - began
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    start.record()
    call(draw)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measured_peaks(device: torch.device) -> Peaks:
    """By torch's own kernels: products of bfloat16, and copies of a buffer."""
    n, size = (8192, 1 << 30) if device.type != "cpu" else (256, 1 << 20)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    flops = 2 * n**3 / min(timed(lambda _: a @ b, [{}], device, 10))
    moved = 2 * size / min(timed(lambda _: to.copy_(source), [{}], device, 10))
    return Peaks(flops, moved)


def _moved(draw: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments on the device; what several draws share is moved once."""
    return {name: _to(value, device) for name, value in draw.items()}


_there: dict[int, tuple[Any, Any]] = {}


def _to(value: Any, device: torch.device) -> Any:
    if not isinstance(value, (Tensor, QuantizedWeight)):
        return value
    found = _there.get(id(value))
    if found is None or found[0] is not value:
        if len(_there) > 256:
            _there.clear()
        # A module moves in place: the draws keep theirs.
        found = value, (value.to(device) if isinstance(value, Tensor) else _copy(value, device))
        _there[id(value)] = found
    return found[1]


def _copy(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    zeros = None if weight.zeros is None else weight.zeros.to(device)
    parts = weight.values.to(device), weight.scales.to(device)
    return QuantizedWeight(weight.format, *parts, zeros, group=weight.group)


def _print(row: Mapping[str, Any]) -> None:
    head = f"{row['op']:24} {row['label']:32} {row['dtype']} {row['format']:6} "
    head += f"{row['candidate']:22}"
    if "left_out" in row:
        print(f"{head} left out: {row['left_out']}", flush=True)
        return
    us, of = row["seconds"] * 1e6, row["attained"]
    rates = f"{row['flops'] / row['seconds'] / 1e12:8.2f} TFLOP/s"
    print(
        f"{head} {us:12.1f} us {rates} {row['bytes'] / row['seconds'] / 1e9:8.1f} GB/s {of:6.1%}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
