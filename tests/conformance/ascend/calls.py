"""Which calls the kernels are shown with: small ones with numbers, and models' sizes without."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

import transom
from transom.backends import triton
from transom.backends.triton._launch import Launch, record
from transom.op import Impl, Op

from .. import cases
from ..compiled.compile import offered

SOME, MANY, WIDE = 5, 24, 128
"""Sizes of a shrunk example: of leading dims, of those that vary from call to call, of others."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextlib.contextmanager
def implementations(names: list[str] | None = None) -> Iterator[dict[str, Impl]]:
    """The Triton implementation of each operator that has one, registered within the block whether
    or not a device is here."""
    every, hidden = transom.ops(), {}
    for name in offered():
        kept = every[name].impls.get("triton")
        if kept is not None and kept.unavailable:  # what stands there without a device
            hidden[name] = every[name].impls.pop("triton")
        if name in _KNOWN:
            every[name].impls["triton"] = _KNOWN[name]
    for name in offered():
        importlib.import_module(f"{triton.__name__}.{every[name].path.replace('/', '.')}")
    found = {name: op.impls["triton"] for name, op in every.items() if "triton" in op.impls}
    _KNOWN.update(found)
    try:
        yield {name: impl for name, impl in found.items() if names is None or name in names}
    finally:
        for name, impl in hidden.items():
            every[name].impls["triton"] = impl


_KNOWN: dict[str, Impl] = {}
"""A module registers once: what it registered, for the next block."""


def small(op: Op[..., Any], drawn: int = 0) -> Iterator[Any]:
    """Calls of the conformance kit: the small examples in three dtypes, sizes 0 and 1, all
    examples shrunk, and `drawn` more with other layouts, formats and numbers."""
    few = cases.small_examples(op)
    made: dict[str, Any] = {}
    for example in few:
        for dtype in DTYPES:
            case = cases.build(op, dict(example), dtype)
            made.setdefault(repr(case), case)
    for case in cases.edges(op):
        made.setdefault(repr(case), case)
    for example in op.examples:
        case = _shrunk(op, example)
        if case is not None:
            made.setdefault(repr(case), case)
    for seed in range(1, drawn + 1):
        names = enumerate(op.signature.inputs)
        layouts = {n: cases.LAYOUTS[(seed + at) % len(cases.LAYOUTS)] for at, n in names}
        example, dtype = few[seed % len(few)], DTYPES[seed % 3]
        case = cases.build(op, dict(example), dtype, seed, layouts=layouts)
        made.setdefault(repr(case), case)
    yield from made.values()


def _shrunk(op: Op[..., Any], example: dict[str, Any]) -> Any:
    """The example with its sizes cut to some that can be executed, so that the kernels' ways for
    sizes which tiles divide are taken; None if the declaration refuses that."""
    sizes = {
        name: min(size, MANY if name in op.varying else WIDE)
        for name, size in example.items()
        if type(size) is int and name in op.signature.symbols()
    }
    lead = {name: (SOME,) for name, size in example.items() if isinstance(size, tuple) and size}
    try:
        return cases.build(op, {**example, **sizes, **lead}, torch.bfloat16, 1)
    except (ValueError, TypeError, KeyError):
        return None


def refused(op: Op[..., Any], impl: Impl, values: tuple[Any, ...], chip: str) -> str | None:
    """The sentence of the requirement, but for the device's, that excludes the call on a chip."""
    facts = replace(transom.dispatch.facts_of(op, values), device="npu", arch=chip.lower())
    return next((why for r in impl.requires if r.kind != "device" and (why := r(facts))), None)


def recorded(op: Op[..., Any], impl: Impl, values: tuple[Any, ...], chip: str) -> list[Launch]:
    """What host code launches for these arguments on a chip."""
    with record(chip.lower()) as launches:
        op.invoke(impl.function, *values)
    return launches
