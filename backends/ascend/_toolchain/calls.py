"""Which calls the kernels are shown with: small ones with numbers, and models' sizes without."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import transom
from transom.backends.triton import compile as triton
from transom.backends.triton._launch import Launch, record
from transom.op import Impl, Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def implementations(names: list[str] | None = None) -> Iterator[dict[str, Impl]]:
    """The Triton implementation of each operator that has one, registered within the block whether
    or not a device is here."""
    found, hidden = {}, {}
    for name in triton.offered():
        if names is None or name in names:
            op = transom.ops()[name]
            kept = op.impls.get("triton")
            if kept is not None and kept.unavailable:  # what stands there without a device
                hidden[name] = op.impls.pop("triton")
            triton.implementation(op)
            found[name] = op.impls["triton"] = op.impls.get("triton") or _KNOWN[name]
            _KNOWN[name] = found[name]
    try:
        yield found
    finally:
        for name, impl in hidden.items():
            transom.ops()[name].impls["triton"] = impl


_KNOWN: dict[str, Impl] = {}
"""A module registers once: what it registered, for the next block."""


def small(op: Op[..., Any], drawn: int = 0) -> Iterator[Any]:
    """Calls of the conformance kit: the small examples in three dtypes, sizes 0 and 1, and `drawn`
    more with other layouts, formats and numbers."""
    cases = importlib.import_module("transom.conformance.cases")
    few = [e for e in op.examples if cases._elements(op, e) <= cases.LARGEST] or op.examples[:1]
    made: dict[str, Any] = {}
    for example in few:
        for dtype in DTYPES:
            case = cases.build(op, dict(example), dtype)
            made.setdefault(repr(case), case)
    for case in cases.edges(op):
        made.setdefault(repr(case), case)
    for seed in range(1, drawn + 1):
        names = enumerate(op.signature.inputs)
        layouts = {n: cases.LAYOUTS[(seed + at) % len(cases.LAYOUTS)] for at, n in names}
        example, dtype = few[seed % len(few)], DTYPES[seed % 3]
        case = cases.build(op, dict(example), dtype, seed, layouts=layouts)
        made.setdefault(repr(case), case)
    yield from made.values()


def refused(op: Op[..., Any], impl: Impl, values: tuple[Any, ...], chip: str) -> bool:
    """True if the implementation's requirements, but for the device, exclude the call on a chip."""
    facts = replace(transom.dispatch.facts_of(op, values), device="npu", arch=chip.lower())
    return any(r(facts) is not None for r in impl.requires if r.kind != "device")


def recorded(op: Op[..., Any], impl: Impl, values: tuple[Any, ...], chip: str) -> list[Launch]:
    """What host code launches for these arguments on a chip."""
    with record(chip.lower()) as launches:
        op._invoke(impl.function, *values)
    return launches
