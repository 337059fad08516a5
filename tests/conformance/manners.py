"""What an implementation does besides computing: memory around its outputs, threads, streams."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import transom
from transom.op import Op
from transom.tolerance import as_tuple, compare

from . import around, checks
from .agree import same_bits
from .cases import Case

CALLS = 300
"""Calls over which memory must not grow."""
GROWTH = 4 << 20
"""Bytes that a process may grow over them: allocators round up, and Python keeps free lists."""


def _call(op: Op[..., Any], case: Case) -> tuple[torch.Tensor, ...]:
    names = (p.name for p in op.parameters)
    return as_tuple(op.call(**dict(zip(names, case.values, strict=True))))


def guards(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """Memory before and behind every output and the workspace is as it was."""
    if op.mutates:
        return f"{checks.NOTHING}it writes an argument, whose guards are checked"
    return around.outputs(op, impl, case)


def threads(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """Four threads at once get the results of one."""
    if op.mutates:
        return f"{checks.NOTHING}the operator writes an argument"
    with transom.use(**{op.name: impl}):
        want = _call(op, case)
        with ThreadPoolExecutor(4) as pool:
            found = [f.result() for f in [pool.submit(_call, op, case) for _ in range(16)]]
    exact = op.impls[impl].deterministic
    for some in found:
        for name, a, b in zip(op.signature.outputs, want, some, strict=True):
            alike = same_bits(a, b) if exact else compare(name, b, a, exact=False) is None
            if not alike:
                return f"{name} differs when several threads call at once"
    return None


def streams(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """On two streams, each awaited by an event of its own, the results are those of one."""
    device = next(iter(op.tensors(case.values).values())).device
    module = getattr(torch, device.type, None)
    if module is None or not hasattr(module, "Stream") or device.type == "cpu":
        return f"{checks.NOTHING}the device has no streams"
    if op.mutates:
        return f"{checks.NOTHING}the operator writes an argument"
    with transom.use(**{op.name: impl}):
        want = [t.cpu() for t in _call(op, case)]
        module.synchronize()
        made = [module.Stream() for _ in range(2)]
        found = []
        for _ in range(3):
            for stream in made:
                with module.stream(stream):
                    out = _call(op, case)
                    event = module.Event()
                    event.record(stream)
                found.append((stream, event, out))
        for stream, event, out in found:
            event.synchronize()
            with module.stream(stream):
                for name, a, b in zip(op.signature.outputs, want, out, strict=True):
                    if not same_bits(a, b.cpu()):
                        return f"{name} on a stream of its own differs, or came after its event"
    return None


def memory(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """Many calls leave neither the device nor the process larger."""
    if op.mutates:
        return f"{checks.NOTHING}the operator writes an argument"
    device = next(iter(op.tensors(case.values).values())).device
    module = getattr(torch, device.type, None)
    allocated = getattr(module, "memory_allocated", None)
    with transom.use(**{op.name: impl}):
        for _ in range(CALLS // 4):
            _call(op, case)
        gc.collect()
        before = _resident(), allocated() if allocated else 0
        for _ in range(CALLS):
            _call(op, case)
        gc.collect()
        after = _resident(), allocated() if allocated else 0
    if after[1] > before[1]:
        return f"{after[1] - before[1]} bytes of the device stay allocated after {CALLS} calls"
    if after[0] - before[0] > GROWTH:
        return f"the process grows by {after[0] - before[0]} bytes over {CALLS} calls"
    return None


def _resident() -> int:
    """Bytes of the process in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
