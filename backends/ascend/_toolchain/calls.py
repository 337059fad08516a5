"""Which calls the kernels are shown with: small ones with numbers, and models' sizes without."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import transom
from transom.backends.triton._launch import Launch
from transom.cli.calls import Declared, declared_call
from transom.cli.console import Refusal
from transom.op import Impl, Op
from transom.weights import QuantizedWeight, grid_size
from transom.weights.layout import DEFAULT_GROUP

DTYPES = (torch.bfloat16, torch.float32)
"""Of models' sizes: what they are trained in, and what takes most memory."""

FORMATS = ("int8", "int4", "fp8", "mxfp4")


def implementations(names: list[str] | None = None) -> dict[str, Impl]:
    """The Triton implementation of each operator that has one, on whatever machine."""
    found = {}
    for name, op in transom.ops().items():
        if names is not None and name not in names:
            continue
        module = f"transom.backends.triton.{op.path.replace('/', '.')}"
        try:
            if not op.path or importlib.util.find_spec(module) is None:
                continue
        except ModuleNotFoundError:  # no kernel of this family
            continue
        kept = op.impls.get("triton")
        if kept is not None and kept.unavailable:  # what stands there where no device is
            del op.impls["triton"]
        importlib.import_module(module)
        if (impl := op.impls.get("triton")) is not None:
            found[name] = impl
        if kept is not None and kept.unavailable:
            op.impls["triton"] = kept
    return found


def small(op: Op[..., Any], drawn: int = 0) -> Iterator[Any]:
    """Calls of the conformance kit: the first examples in three dtypes, sizes 0 and 1, and `drawn`
    more with other layouts, formats and numbers."""
    cases = importlib.import_module("transom.conformance.cases")
    few = [e for e in op.examples if cases._elements(op, e) <= cases.LARGEST] or op.examples[:1]
    made: dict[str, Any] = {}
    for example in few:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            case = cases.build(op, dict(example), dtype)
            made.setdefault(repr(case), case)
    for case in cases.edges(op):
        made.setdefault(repr(case), case)
    layouts = cases.LAYOUTS
    for seed in range(1, drawn + 1):
        names = list(op.signature.inputs)
        layout = {n: layouts[(seed + at) % len(layouts)] for at, n in enumerate(names)}
        dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
        case = cases.build(op, dict(few[seed % len(few)]), dtype, seed, layouts=layout)
        made.setdefault(repr(case), case)
    yield from made.values()


def large(op: Op[..., Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(its text, the arguments on the meta device) of models' sizes, in each dtype and format."""
    examples = op.examples[1:] or op.examples
    weights = [p.name for p in op.parameters if p.role == "weight"]
    for example in examples:
        sizes = ", ".join(f"{k}={v}" for k, v in example.items())
        for dtype in DTYPES:
            for form in (None, *(FORMATS if weights and dtype == DTYPES[0] else ())):
                settings = dict.fromkeys(weights, form) if form else {}
                try:
                    call = declared_call(op, {}, dtype, settings, example)
                    values = tuple(_meta(v) for v in call.values)
                except (Refusal, ValueError, TypeError, KeyError):
                    continue  # this operator has no such call
                name = str(dtype).removeprefix("torch.")
                yield f"{op.name}({sizes}) {name}{f', {form}' if form else ''}", values


def refused(op: Op[..., Any], impl: Impl, values: tuple[Any, ...], chip: str) -> bool:
    """True if the implementation's requirements, but for the device, exclude the call on a chip."""
    facts = replace(transom.dispatch.facts_of(op, values), device="npu", arch=chip.lower())
    return any(r(facts) is not None for r in impl.requires if r.kind != "device")


def recorded(
    op: Op[..., Any], impl: Impl, values: tuple[Any, ...], arch: str,
    choose: Callable[..., Any] | None = None,
) -> list[Launch]:  # fmt: skip
    """What host code launches for these arguments on a chip."""
    from transom.backends.triton import _launch

    more = {} if choose is None else {"choose": choose}
    with _launch.record(arch, **more) as launches:
        op._invoke(impl.function, *values)
    return launches


def _meta(value: Any) -> Any:
    if not isinstance(value, Declared):
        return value
    if not isinstance(value.dtype, str):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    *lead, n, k = value.shape
    rows, columns = DEFAULT_GROUP[value.dtype]
    packed = k // 2 if value.dtype in ("int4", "mxfp4") else k
    grid = (*lead, grid_size(n, rows), grid_size(k, columns))
    stored = torch.int8 if value.dtype == "int8" else torch.uint8
    scales = torch.uint8 if value.dtype == "mxfp4" else torch.float32

    def part(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    zeros = part(grid, torch.uint8) if value.dtype == "int4" else None
    return QuantizedWeight(value.dtype, part((*lead, n, packed), stored), part(grid, scales), zeros)
