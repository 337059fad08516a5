"""Tables that stay in host memory while a device reads them: the one exception to the rule that a
call's tensors share a device.

A declaration names the arguments that may lie there (`host="table"`); an implementation says which
of them it reads in place. Nothing is copied or moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .facts import Facts


def pinned(argument: Any, first: torch.Tensor) -> bool:
    """True if `argument` lies in pinned host memory and `first`, of the same call, on a device."""
    return bool(argument.device.type == "cpu" != first.device.type and argument.is_pinned())


def reasons(facts: Facts, reads: Sequence[str]) -> list[str]:
    """Why an implementation that reads these arguments in place cannot run the call; empty where
    everything is on the device."""
    return [text for name in facts.host if (text := _reason(name, facts, name in reads))]


def _reason(name: str, facts: Facts, reads: bool) -> str | None:
    if not reads:
        return (
            f"{name} is in host memory; supported: tensors of one device; move it there with"
            f" {name}.to({facts.device!r})"
        )
    if not facts.host[name]:
        return (
            f"{name} is in pageable host memory; supported: device memory and pinned host memory;"
            f" call {name}.pin_memory()"
        )
    if facts.layouts.get(name) != "contiguous":
        return f"{name} is not contiguous; supported in host memory: contiguous tensors"
    if facts.gradient:
        return f"a gradient is asked for; supported with {name} in host memory: inference"
    return None
