"""Calls drawn from a declaration: dims, dtypes, layouts and values.

Hypothesis draws dims, dtypes, layouts and a seed, which shrink well; values come from a generator
with that seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transom
from transom import dispatch
from transom.dtypes import QUANTIZED, Kind
from transom.facts import Facts
from transom.op import Op, kind_of

from . import calls
from .agree import same_bits

SCALES = (1.0, 1.0, 2.0**-12, 2.0**6)
"""Of standard normal inputs: sums that underflow in half precision, softmax that saturates."""

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 33)
LAYOUTS = ("contiguous", "offset", "strided", "transposed")
GUARD = 64
"""Elements of guard on each side of every input."""

LARGEST = 1 << 16
"""Elements of the largest tensor of a drawn call."""


@dataclass(frozen=True)
class Case:
    """One call: its arguments in declared order, and the guarded buffers that they live in."""

    op: Op[..., Any]
    values: tuple[Any, ...]
    buffers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """(buffer, copy of it) of every tensor: both must be equal after the call."""
    dims: dict[str, Any]
    text: str
    draws: dict[str, Any]
    """What `build` was given, but for the operator: the call again, in another process."""

    def __repr__(self) -> str:
        return self.text

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.text)  # hypothesis shows the call, not the buffers

    def intact(self) -> str | None:
        """None if inputs and guards are as they were, else which is not (arguments that the
        operator writes excepted)."""
        names = [p.name for p in self.op.parameters if p.role != "value"]
        written = set(self.op.mutates)
        at = 0
        for name, value in zip((p.name for p in self.op.parameters), self.values, strict=True):
            if name not in names or not isinstance(value, torch.Tensor):
                continue
            buffer, before = self.buffers[at]
            at += 1
            if name in written:
                continue
            if not same_bits(buffer, before):
                return f"{name} or the memory around it was written"
        return None


@st.composite
def cases(
    draw: st.DrawFn,
    op: Op[..., Any],
    device: str = "cpu",
    floats: tuple[torch.dtype, ...] | None = None,
) -> Case:
    """A call of `op` that its declaration accepts."""
    floats = floats or (torch.float32, torch.bfloat16, torch.float16)
    primary = draw(st.sampled_from(floats), label="dtype")
    seed = draw(st.integers(0, 2**32 - 1), label="seed")
    small = small_examples(op)
    base = dict(draw(st.sampled_from(small), label="example"))
    symbols = [s for s in op.signature.symbols() if s in base]
    changes = {
        s: draw(st.sampled_from(SIZES), label=s)
        if not isinstance(base[s], tuple)
        else tuple(draw(st.lists(st.sampled_from((0, 1, 2, 3)), max_size=2), label=s))
        for s in symbols
        if draw(st.booleans(), label=f"change {s}")
    }
    absent = {
        s.name
        for s in op.signature.inputs.values()
        if s.optional and draw(st.booleans(), label=f"without {s.name}")
    }
    layouts = {
        n: draw(st.sampled_from(LAYOUTS), label=f"layout of {n}") for n in op.signature.inputs
    }
    # A gradient's inputs belong together; where its forward saturates, float32 has nothing left.
    scales = SCALES if "backward" not in op.name else SCALES[:1]
    scale = draw(st.sampled_from(scales), label="scale")
    # Changes that the declaration refuses are taken back one by one: a valid call comes out, and
    # shrinking still works.
    while True:
        try:
            dims = {**base, **changes}
            return build(op, dims, primary, seed, absent, layouts, device, scale)
        except (ValueError, TypeError):
            if changes:
                changes.pop(next(reversed(changes)))
            elif absent:
                absent = set()
            else:
                raise


def drawn(op: Op[..., Any], count: int, floats: tuple[torch.dtype, ...]) -> list[Case]:
    """`count` calls from the operator's declaration, the same ones each time."""
    found: list[Case] = []

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=count,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(op, floats=floats))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found[:count]


def edges(op: Op[..., Any], device: str = "cpu") -> Iterator[Case]:
    """The first example with each dim in turn 0 and 1, where the declaration accepts it."""
    base = op.examples[0]
    for symbol in op.signature.symbols():
        for size in (0, 1):
            if symbol in base:
                changed = (size,) if isinstance(base[symbol], tuple) else size
                try:
                    yield build(op, {**base, symbol: changed}, device=device)
                except (ValueError, TypeError):
                    continue


def build(
    op: Op[..., Any],
    dims: dict[str, Any],
    primary: torch.dtype = torch.float32,
    seed: int = 0,
    absent: set[str] | frozenset[str] = frozenset(),
    layouts: dict[str, str] | None = None,
    device: str = "cpu",
    scale: float = 1.0,
) -> Case:
    """The call that these draws give. Raises what the declaration raises if it refuses them."""
    rng = np.random.default_rng(seed)
    scope = calls.defaults(op, dims)
    special = dict(op.sampler(rng, dict(scope)) if op.sampler else {})
    scope.update({n: v for n, v in special.items() if n not in op.signature.inputs})
    layouts = layouts or {}
    buffers = []

    def make(name: str, shape: tuple[int, ...] | None, allowed: list[Kind]) -> Any:
        optional = op.signature.inputs[name].optional
        if (optional and name in absent) or (name in special and special[name] is None):
            return None
        array = special.get(name)
        if array is None:
            if shape is None:
                if optional:
                    return None
                raise ValueError(f"{op.name}: {name} has a dim without a size")
            array = rng.standard_normal(shape) * scale
        array = np.asarray(array)
        kind = _kind(op, array, allowed, primary, rng)
        if isinstance(kind, str):
            return transom.quantize(torch.from_numpy(array).float().to(device), kind)
        value = torch.from_numpy(np.ascontiguousarray(array)).to(kind)
        tensor, buffer = guarded(value, layouts.get(name, "contiguous"), device)
        buffers.append((buffer, buffer.clone()))
        return tensor

    values = calls.arguments(op, scope, primary, make)
    arguments = op.arguments(values)
    op.check_types(values)
    tensors = op.tensors(values)
    kinds = {name: kind_of(t) for name, t in tensors.items()}
    bound = op.validate({name: t.shape for name, t in tensors.items()}, kinds, arguments)
    check = dispatch.value_check(op, Facts("cpu", "", kinds, bound, {}, arguments))
    if check is not None:  # rules on values read them on the host
        check(*[v.cpu() if isinstance(v, torch.Tensor) else v for v in values])
    text = ", ".join(
        f"{n}={_describe(v)}" for n, v in zip((p.name for p in op.parameters), values, strict=True)
    )
    return Case(
        op,
        values,
        tuple(buffers),
        {**arguments, **bound},
        f"{op.name}({text}) seed={seed} scale={scale}",
        dict(
            dims=dims,
            primary=str(primary).removeprefix("torch."),
            seed=seed,
            absent=sorted(absent),
            layouts={n: kind for n, kind in layouts.items() if kind != "contiguous"},
            device=device,
            scale=scale,
        ),
    )


def rebuild(op: str, /, **draws: Any) -> Case:
    """The call of an operator's name and a case's draws: what a report says to paste."""
    primary = getattr(torch, draws.pop("primary"))
    return build(transom.ops()[op], primary=primary, **draws)


def small_examples(op: Op[..., Any]) -> list[dict[str, Any]]:
    """The operator's examples that are small enough for a reference; the first in any case."""
    return [e for e in op.examples if calls.elements(op, e) <= LARGEST] or op.examples[:1]


def _kind(
    op: Op[..., Any],
    array: np.ndarray,
    allowed: list[Kind],
    primary: torch.dtype,
    rng: np.random.Generator,
) -> Kind:
    """What a tensor of these numbers holds: mostly `primary` where the rules allow it, else any of
    what they do; of a weight also a quantised format."""
    plain = [k for k in allowed if not isinstance(k, str)]
    if array.dtype != np.float64:
        return plain[int(rng.integers(len(plain)))]
    quantised = [k for k in allowed if k in QUANTIZED]
    fits = array.ndim >= 2 and array.size and array.shape[-1] % 32 == 0
    if quantised and fits and rng.random() < 0.4:
        return str(rng.choice(quantised))
    kind = primary if primary in plain else plain[int(rng.integers(len(plain)))]
    if len(plain) > 1 and "float" not in op.dtypes_text and rng.random() < 0.5:
        kind = plain[int(rng.integers(len(plain)))]
    return kind


def guarded(value: torch.Tensor, layout: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`value` inside a larger buffer whose other elements are poison (NaN, or a number out of every
    range)."""
    shape, dim = list(value.shape), value.dim()
    steps = [1] * dim
    if layout == "strided" and dim:
        steps[-1] = 2
    order = list(range(dim))
    if layout == "transposed" and dim >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    sizes = [shape[i] * steps[i] for i in order]
    count = int(np.prod(sizes, dtype=np.int64)) if dim else 1
    lead = GUARD + (1 if layout == "offset" else 0)
    buffer = torch.empty(count + lead + GUARD, dtype=value.dtype, device=device)
    buffer.fill_(_poison(value.dtype))
    inner = buffer[lead : lead + count].view(sizes if dim else [])
    inner = inner.permute(*[order.index(i) for i in range(dim)]) if dim else inner
    view = inner[..., :: steps[-1]] if dim and steps[-1] > 1 else inner
    view.copy_(value)
    assert view.shape == value.shape
    return view, buffer


def _poison(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max - 7


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)}" + ("" if value.is_contiguous() else " strided")
    if isinstance(value, transom.QuantizedWeight):
        return f"{value.spec}{list(value.shape)}"
    return repr(value)
