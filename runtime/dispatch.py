"""Selection: facts of a call, the implementation that runs it, the plan cache, use() and record().

Order: asked for > measured > tier (tuned > portable > composite; the reference only on request).
Nothing falls back in silence: a forced choice that cannot run raises, a drop to the composite warns
with its reasons, and nothing is moved between devices.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import config, guard
from . import device as _device
from .abi import ranges
from .abi.frame import described
from .dtypes import Kind
from .errors import NotSupported, SlowPath
from .interrupts import uninterrupted
from .plugins import backends, load, loading, serves
from .shapes import size_fault
from .tune import lookup as measured_choice
from .weights import QuantizedWeight, check_parts
from .weights.layout import parts

if TYPE_CHECKING:
    from .op import Impl, Op

TIERS = ("reference", "composite", "portable", "tuned")
"""Worst to best: NumPy, only on request; the meaning in torch; a real kernel; a kernel made for the
device."""

_ADDRESSED = ("cpu", "cuda", "xpu")
"""Devices of which is known that a tensor with memory has an address; a kernel needs one anyway."""

PLANS = 1024
"""Plans kept per operator; past it all are dropped (a decode loop makes one a step, so they must
not pile up)."""


@dataclass(frozen=True)
class Facts:
    """What selection may look at, and nothing else."""

    device: str
    arch: str
    dtypes: Mapping[str, Kind]
    """By tensor, for those given: its dtype, or the format of a QuantizedWeight."""
    dims: Mapping[str, Any]
    layouts: Mapping[str, str]
    """'contiguous', 'rows' (last dim of stride 1) or 'strided'."""
    arguments: Mapping[str, Any]
    gradient: bool = False
    deterministic: bool = False
    capturing: bool = False
    parts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, repr=False)
    """By tensor: shape, strides and dtype, of a QuantizedWeight those of its tensors and spec."""
    host: Mapping[str, bool] = field(default_factory=dict)
    """By argument that lies in host memory, of a call on a device: whether it is pinned."""


@dataclass(frozen=True)
class Plan:
    """What a call of certain facts runs."""

    impl: Impl
    facts: Facts
    check: Callable[..., None] | None
    run: Callable[..., Any]
    """Of the declared arguments in order, as check."""


@dataclass(frozen=True)
class Explanation:
    """The implementation of a call, why it was chosen, and every other one's reasons."""

    op: str
    chosen: str | None
    tier: str | None
    why: str
    rejected: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        head = f"{self.op}: {self.chosen or 'nothing can run'} ({self.why})"
        others = (f"  {name}: {'; '.join(why)}" for name, why in self.rejected.items())
        return "\n".join([head, *others])


@dataclass
class Call:
    """One recorded call."""

    op: str
    impl: str
    device: str
    facts: Facts = field(repr=False)
    seconds: float = 0.0
    """With record(timing=True): time inside the implementation, less that of operators which it
    called."""
    flops: float = 0.0
    bytes: float = 0.0


# Process-wide on purpose: autograd runs the backward of an accelerator in threads of its own.
_choice: tuple[tuple[str, str], ...] | None = None
_recorders: list[tuple[list[Call], bool]] = []
_lock = threading.RLock()
_nested = threading.local()
_warned: set[tuple[str, tuple[str, ...]]] = set()


def run(op: Op[..., Any], values: tuple[Any, ...], gradient: bool = False) -> Any:
    """Run a call of plain tensors by its plan; the kernel of the torch operator, and the direct
    path of eager inference where abi/direct.py does not run the plan itself."""
    key = (op._key(*values), _choice, gradient, torch.are_deterministic_algorithms_enabled())
    try:
        plan = op._plans.get(key)
    except TypeError:  # an argument that cannot be hashed is one of a wrong type: say which
        op._check_types(values)
        raise
    if plan is None or (plan.facts.device == "cuda" and torch.cuda.is_current_stream_capturing()):
        plan = make_plan(op, values, key, gradient)
    if plan.impl.tier != "composite" or plan.facts.device in _ADDRESSED:
        check_memory(op, values)
    if plan.check is not None:
        plan.check(*values)
    if _recorders:
        return _run_recorded(op, plan, values)
    return plan.run(*values)


def check_memory(op: Op[..., Any], values: Sequence[Any]) -> None:
    """Raise ValueError for a tensor with elements and no memory: its storage was resized to 0, or
    it is one of torch's zero tensors. (The direct path leaves both to the torch operator, which
    writes the zeros out.)"""
    for p, value in zip(op.parameters, values, strict=True):
        stored = parts(value)[:3] if type(value) is QuantizedWeight else (value,)
        for tensor in stored:
            if isinstance(tensor, Tensor) and not tensor.data_ptr() and tensor.numel():
                raise ValueError(
                    f"{op.name}: {p.name} has {tensor.numel()} elements and no memory; "
                    "expected a storage that holds them"
                )


def make_plan(op: Op[..., Any], values: tuple[Any, ...], key: Any, gradient: bool = False) -> Plan:
    """The plan of a call, kept under `key`; raises where the call is wrong or nothing can run."""
    facts = facts_of(op, values, gradient)
    explanation = select(op, facts)
    if explanation.chosen is None:
        raise NotSupported(_refusal(op, explanation))
    impl = op.impls[explanation.chosen]
    if impl.tier == "composite":
        _report_slow_path(op, facts, explanation)
    elif config.GUARD.get() != "0":
        impl = guard.watched(op, impl)
    prepare = getattr(impl.function, "prepared", None)  # of C: for calls of these facts only
    run: Callable[..., Any]
    if (empty := _without_elements(op, facts, values)) is not None:
        run = empty
    elif prepare:
        run = prepare(values, gradient)
    else:
        run = functools.partial(op._invoke, impl.function)
        if op.mutates:
            run = functools.partial(uninterrupted, run)
    plan = Plan(impl, facts, _value_check(op, facts), run)
    if not facts.capturing:
        if len(op._plans) >= PLANS:
            op._plans.clear()
        op._plans[key] = plan
    return plan


def _without_elements(
    op: Op[..., Any], facts: Facts, values: Sequence[Any]
) -> Callable[..., Any] | None:
    """What runs a call of which no output has an element: nothing is computed, however large its
    inputs say that they are. None for other calls."""
    if op.mutates:
        return None
    outputs = op.outputs({**facts.arguments, **facts.dims}, facts.dtypes)
    if any(0 not in shape for shape, _ in outputs):
        return None
    device = next(iter(op.tensors(values).values())).device

    def run(*_: Any) -> Any:
        made = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in outputs)
        return made if len(made) > 1 else made[0]

    return run


def facts_of(op: Op[..., Any], values: Sequence[Any], gradient: bool = False) -> Facts:
    """The facts of a call; checks its devices, shapes, dtypes and plain arguments, and that the
    parts of a quantised weight fit each other."""
    from .op import kind_of

    op._check_types(values)
    tensors, arguments = op.tensors(values), op.arguments(values)
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedWeight):
            check_parts(f"{op.name}: {name}'s", *parts(tensor))
        if (fault := size_fault(tensor.shape)) is not None:
            raise ValueError(f"{op.name}: {name} {fault}")
    kinds = {name: kind_of(tensor) for name, tensor in tensors.items()}
    bound = op.validate({name: tensor.shape for name, tensor in tensors.items()}, kinds, arguments)
    device = op.check_devices({name: tensor.device for name, tensor in tensors.items()})
    return Facts(
        device.type,
        _device.arch(device.type, device.index or 0),
        kinds,
        bound,
        {name: _layout(tensor) for name, tensor in tensors.items()},
        arguments,
        gradient,
        torch.are_deterministic_algorithms_enabled(),
        device.type == "cuda" and torch.cuda.is_current_stream_capturing(),
        {name: described(tensor) for name, tensor in tensors.items()},
        {n: tensors[n].is_pinned() for n in op.host if tensors[n].device != device},
    )


def _layout(tensor: Any) -> str:
    if tensor.is_contiguous():
        return "contiguous"
    return "rows" if tensor.stride(-1) == 1 else "strided"


def able(op: Op[..., Any], facts: Facts) -> list[Impl]:
    """Every implementation that can run these facts, the reference apart."""
    load(op, facts.device)
    return [i for i in op.impls.values() if i.tier != "reference" and not i.reasons(facts)]


def select(op: Op[..., Any], facts: Facts) -> Explanation:
    """The choice for these facts: asked for, else measured, else the best tier that can run."""
    load(op, facts.device)
    ours = backends()
    asked = _asked_for(op)
    order = sorted(
        op.impls.values(), key=lambda i: (-TIERS.index(i.tier), i.backend in ours, i.name)
    )
    if asked:
        wanted = [i for i in order if asked in (i.name, i.backend)]
        if not wanted:
            have = ", ".join(sorted(i.name for i in order))
            reasons = {asked: (f"not registered; {have}",)}
            return Explanation(op.name, None, None, f"{asked!r} was asked for", reasons)
        rejected: dict[str, tuple[str, ...]] = {}
        for impl in wanted:
            if not (why := impl.reasons(facts)):
                return Explanation(op.name, impl.name, impl.tier, "asked for", rejected)
            rejected[impl.name] = tuple(why)
        return Explanation(op.name, None, None, f"{asked!r} was asked for", rejected)
    rejected, can = {}, []
    for impl in order:
        if impl.tier == "reference":
            rejected[impl.name] = ("runs only when asked for by name",)
        elif why := impl.reasons(facts):
            rejected[impl.name] = tuple(why)
        else:
            can.append(impl)
    measured = measured_choice(op, facts)
    for impl in can:
        if impl.name == measured:
            return Explanation(op.name, impl.name, impl.tier, "measured fastest", rejected)
    if can:
        return Explanation(op.name, can[0].name, can[0].tier, f"tier {can[0].tier}", rejected)
    return Explanation(op.name, None, None, "no implementation fits", rejected)


def _asked_for(op: Op[..., Any]) -> str | None:
    everywhere = None
    for name, impl in _choice if _choice is not None else _parse_use(config.USE.get()):
        if name == op.name:
            return impl
        if name == "*":
            everywhere = impl
    return everywhere


def _parse_use(text: str) -> tuple[tuple[str, str], ...]:
    out = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, impl = part.partition("=")
        out.append((name.strip(), impl.strip()) if equals else ("*", name.strip()))
    return tuple(out)


def _refusal(op: Op[..., Any], e: Explanation) -> str:
    reasons = " | ".join(f"{name}: {'; '.join(why)}" for name, why in e.rejected.items())
    return f"{op.name}: {e.why} and cannot run; {reasons}"


def _report_slow_path(op: Op[..., Any], facts: Facts, e: Explanation) -> None:
    if e.why == "asked for" or (mode := config.fallback()) == "quiet":
        return
    missed = {
        name: why
        for name, why in e.rejected.items()
        if op.impls[name].tier in ("portable", "tuned") and serves(op.impls[name], facts)
    }
    if not missed:
        return
    text = " | ".join(f"{name}: {'; '.join(why)}" for name, why in missed.items())
    if mode == "error":
        raise NotSupported(
            f"{op.name}: only the composite can run ({config.FALLBACK.name}=error); {text}"
        )
    mark = (op.name, tuple(text.split(" | ")))
    if mark not in _warned:
        _warned.add(mark)
        warnings.warn(f"{op.name}: runs as composite; {text}", SlowPath, stacklevel=_caller())


def _caller() -> int:
    """How many frames up the first one outside transom stands."""
    level, frame, inner = 1, sys._getframe(1), ("transom", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in inner:
        frame, level = frame.f_back, level + 1
    return level


def _value_check(op: Op[..., Any], facts: Facts) -> Callable[..., None] | None:
    rule = op._check_values
    if rule is None or not (facts.device == "cpu" or config.debug()):
        return None
    known = [facts.dims.get(n) for n in op._check_values_asks]
    asked = [(at, op._rank[n]) for at, n in enumerate(op._check_values_asks) if n in op._rank]
    far = facts.device != "cpu"

    def check(*values: Any) -> None:
        given = known.copy()
        for at, i in asked:
            value = values[i]
            given[at] = value.cpu() if far and isinstance(value, torch.Tensor) else value
        if text := rule(*given):
            raise ValueError(f"{op.name}: {text}")

    return check if far else ranges.ahead_of(check, op, {**facts.arguments, **facts.dims})


def forget_plans() -> None:
    """Drop every plan: implementations, plugins or measured choices have changed."""
    from .op import OPS

    for op in OPS.values():
        op._plans.clear()


def backend_of(module: str) -> str:
    """The backend that a module's implementations belong to: its folder in transom.backends, or its
    plugin."""
    parts = module.split(".")
    if parts[:2] == ["transom", "backends"] and len(parts) > 2:
        return parts[2]
    return loading() or parts[0]


# use() and record() ----------------------------------------------------------------------------


@contextlib.contextmanager
def use(backend: str | None = None, /, **choice: str) -> Iterator[None]:
    """Within the block, run these implementations: `use("native")` for all, `use(route="triton")`
    for one.

    A choice that cannot run a call raises NotSupported; there is no fallback from it. Holds for the
    whole process while the block lasts, since autograd runs backward passes in threads of its own.
    """
    from .op import lookup

    global _choice
    entries = tuple((lookup(name).name, impl) for name, impl in choice.items())
    with _lock:
        before = _choice
        inherited = before if before is not None else _parse_use(config.USE.get())
        # asked for by name comes before asked for everywhere, and the inner block before the outer
        _choice = entries + ((("*", backend),) if backend else ()) + (() if backend else inherited)
    try:
        yield
    finally:
        with _lock:
            _choice = before


@contextlib.contextmanager
def record(*, timing: bool = False) -> Iterator[list[Call]]:
    """A list of what runs within the block, in order: .op, .impl, .device (and with timing:
    .seconds, .flops, .bytes).

    Timing waits for the device before and after each call. Holds for the whole process.
    """
    calls: list[Call] = []
    entry = (calls, timing)
    with _lock:
        _recorders.append(entry)
    try:
        yield calls
    finally:
        with _lock:
            _recorders[:] = [r for r in _recorders if r is not entry]


def _run_recorded(op: Op[..., Any], plan: Plan, values: tuple[Any, ...]) -> Any:
    call = Call(op.name, plan.impl.name, plan.facts.device, plan.facts)
    timed = any(timing for _, timing in _recorders)
    for calls, _ in list(_recorders):
        calls.append(call)
    if not timed:
        return plan.run(*values)
    cost = op.cost(values)
    call.flops, call.bytes = cost.flops, cost.bytes
    device = next(iter(op.tensors(values).values())).device
    outer, _nested.seconds = getattr(_nested, "seconds", 0.0), 0.0
    _device.synchronize(device)
    start = time.perf_counter()
    try:
        return plan.run(*values)
    finally:
        _device.synchronize(device)
        elapsed = time.perf_counter() - start
        call.seconds = elapsed - _nested.seconds
        _nested.seconds = outer + elapsed
