"""How operators' host functions are registered, and the requirements that all of them share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from transom.facts import Facts
from transom.op import Op
from transom.requires import Requirement, condition, device, dtype

from . import DEVICES, INTERPRETED
from ._ascend import REFUSED

F = TypeVar("F", bound=Callable[..., Any])

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def offer(op: Op[..., Any], *requires: Requirement, tier: str = "portable") -> Callable[[F], F]:
    """Register a function as this backend's implementation of `op`. What the declaration lets lie
    in pinned host memory is read there: Triton's launcher asks the driver for the address that the
    device has for a pointer, which pinned memory has one of.

    It is deterministic, and a CUDA graph may capture it: no kernel adds floats in an order that may
    change, and host code never waits for the device.
    """

    def register(function: F) -> F:
        function.__name__ = "triton"
        op.impl(
            requires=(device(*DEVICES), NEW_ENOUGH, *requires, *REFUSED.get(op.name, ())),
            tier=tier,
            deterministic=True,
            capturable=True,
            host=op.host,
        )(function)
        return function

    return register


def floats(*tensors: str) -> tuple[Requirement, ...]:
    """These tensors hold floats that are summed in float32."""
    return tuple(dtype(name, *usable()) for name in tensors)


@functools.cache
def usable() -> tuple[torch.dtype, ...]:
    """FLOATS; in an interpreter that gets bfloat16 wrong, the others."""
    if not INTERPRETED or _interpreter_knows_bfloat16():
        return FLOATS
    return tuple(d for d in FLOATS if d != torch.bfloat16)


def _old(f: Facts) -> str | None:
    old = f.device == "cuda" and f.arch.startswith("sm_") and int(f.arch[3:]) < 80
    return f"architecture is {f.arch!r}; supported: sm_80 and later" if old else None


NEW_ENOUGH = condition("architecture sm_80 and later, or AMD", ("arch",), _old)


def _interpreter_knows_bfloat16() -> bool:
    """True if it loads, adds, rounds and stores bfloat16 as torch does: versions until 2026 took
    its bits for numbers (triton-lang/triton 4972 and 10945)."""
    from ._language import bfloat16_probe
    from ._launch import launch

    x = torch.tensor([1.0, 1 + 2**-7, -2.5, 3e38, 257.0, 2**-130], dtype=torch.bfloat16)
    want = (x.float() * 1.0078125 + 0.00390625).to(torch.bfloat16)
    got = Tensor.new_empty(x, x.shape)
    launch(bfloat16_probe, (1,), x, got, x.numel(), B=8)
    return torch.equal(want, got)
