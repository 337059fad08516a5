"""Dispatch: the facts of a call, the plan that they lead to, and how calls enter.

A plan is made once for all calls with the same facts. With transom._C calls look theirs up there
(csrc/python/call.cpp); what it does not read, and everything without it, comes here.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import config, guard, host_memory, record, selection
from . import device as _device
from .abi import extension
from .abi.plugin import CFunction
from .errors import NotSupported, SlowPath
from .facts import Facts
from .interrupts import uninterrupted
from .op import Op, kind_of
from .plugins import serves
from .ranges import bounds
from .record import Plan
from .selection import Explanation
from .shapes import size_fault
from .weights import QuantizedWeight, check_parts
from .weights.layout import described, parts

_ADDRESSED = ("cpu", "cuda", "xpu")
"""Devices of which is known that a tensor with memory has an address; a kernel needs one anyway."""

PLANS = 1024
"""Plans kept per operator; past it all are dropped (a decode loop makes one a step, so they must
not pile up)."""

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types of ordinary tensors: a subclass may change what an operation means."""
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_profiling = torch._C._autograd._profiler_enabled

_warned: set[tuple[str, tuple[str, ...]]] = set()


class Caller:
    """How calls of an operator enter without transom._C; there, with the same methods, a Caller of
    csrc/python/call.cpp does it."""

    def __init__(self, op: Op[..., Any], otherwise: Callable[..., Any]) -> None:
        self._op, self._otherwise = op, otherwise
        self._plans: dict[Any, Plan] = {}

    def enter(self, *values: Any) -> Any:
        """An eager call: past torch's dispatcher to its plan where nothing in torch wants to see
        it."""
        return self.run(values, False) if _ordinary(self._op, values) else self._otherwise(*values)

    def run(self, values: tuple[Any, ...], gradient: bool) -> Any:
        """A call that torch's dispatcher has let through."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        key = (*_key(self._op, values), gradient, deterministic, selection.choice())
        try:
            plan = self._plans.get(key)
        except TypeError:  # an argument that cannot be hashed is one of a wrong type: say which
            self._op.check_types(values)
            raise
        if plan is None or _capturing(plan.facts.device):
            plan = make_plan(self._op, values, gradient)
            if not plan.facts.capturing:
                if len(self._plans) >= PLANS:
                    self._plans.clear()
                self._plans[key] = plan
        if plan.impl.tier != "composite" or plan.facts.device in _ADDRESSED:
            check_memory(self._op, values)
        if plan.check is not None:
            plan.check(*values)
        return record.run(plan, values)

    def plans(self) -> list[Plan]:
        """The plans that are kept."""
        return list(self._plans.values())

    def forget(self) -> None:
        """Drop them."""
        self._plans.clear()


def caller(op: Op[..., Any], otherwise: Callable[..., Any]) -> Any:
    """How calls of an operator enter; `otherwise` takes those that torch must see."""
    plain = Caller(op, otherwise)

    def plan_of(values: tuple[Any, ...], gradient: bool) -> tuple[Any, bool]:
        plan = make_plan(op, values, gradient)
        made = extension.module().Plan(plan)
        if plan.check is not None:
            known = {**plan.facts.arguments, **plan.facts.dims}
            made.set_check(bounds(op, known) if plan.facts.device == "cpu" else [], plan.check)
        made.set_run(plan.run)
        return made, not plan.facts.capturing

    return extension.caller(op, PLANS, plan_of, otherwise, plain.run) or plain


def _ordinary(op: Op[..., Any], values: tuple[Any, ...]) -> bool:
    """True if a call may skip the dispatcher: nothing to differentiate, ordinary tensors, no mode
    in force."""
    if _dispatch_modes() or _function_modes() or _functorch_level() is not None or _profiling():
        return False
    grad, found = torch.is_grad_enabled(), None
    for p, value in zip(op.parameters, values, strict=True):
        if p.role == "value" or (value is None and p.type == "Tensor?"):
            continue
        if p.role == "weight" and type(value) is QuantizedWeight:
            value = value.values
        if type(value) not in _PLAIN or value.is_meta or (grad and value.requires_grad):
            return False
        if value._is_zerotensor():  # which the dispatcher writes out
            return False
        found = value if found is None else found
    return not (
        found is None
        or torch.is_autocast_enabled(found.device.type)
        or torch._C._get_tracing_state()
    )


def check_memory(op: Op[..., Any], values: Sequence[Any]) -> None:
    """Raise ValueError for a tensor with elements and no memory: its storage was resized to 0, or
    it is one of torch's zero tensors. (Where a call enters both are left to the torch operator,
    which writes the zeros out.)"""
    for p, value in zip(op.parameters, values, strict=True):
        stored = parts(value)[:3] if type(value) is QuantizedWeight else (value,)
        for tensor in stored:
            if isinstance(tensor, Tensor) and not tensor.data_ptr() and tensor.numel():
                raise ValueError(
                    f"{op.name}: {p.name} has {tensor.numel()} elements and no memory; "
                    "expected a storage that holds them"
                )


def _key(op: Op[..., Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """What a plan depends on, beside modes."""
    key: list[Any] = []
    first = next((v for v in values if isinstance(v, Tensor)), None)
    for p, value in zip(op.parameters, values, strict=True):
        if isinstance(value, Tensor):
            key.append((value.shape, value.stride(), value.dtype, value.device))
        elif isinstance(value, QuantizedWeight):
            key.append(value.key)
        elif p.type.startswith("int[]") and value is not None:
            key.append(tuple(value))
        else:
            key.append((type(value), value))
    if first is not None:
        key += [host_memory.pinned(values[op.position[n]], first) for n in op.host]
    return tuple(key)


def _capturing(device: str) -> bool:
    return device == "cuda" and torch.cuda.is_current_stream_capturing()


# Plans -------------------------------------------------------------------------------------------


def make_plan(op: Op[..., Any], values: tuple[Any, ...], gradient: bool = False) -> Plan:
    """The plan of a call; raises where the call is wrong or nothing can run."""
    facts = facts_of(op, values, gradient)
    explanation = selection.select(op, facts)
    if explanation.chosen is None:
        raise NotSupported(_refusal(op, explanation))
    impl = op.impls[explanation.chosen]
    if impl.tier == "composite":
        _report_slow_path(op, facts, explanation)
    elif config.GUARD.get() != "0":
        impl = guard.watched(op, impl)
    run: Callable[..., Any]
    if (empty := _without_elements(op, facts, values)) is not None:
        run = empty
    elif isinstance(impl.function, CFunction):
        extension.set_mode("workspace", config.workspace_bytes())
        run = impl.function.prepared(gradient)
    else:
        run = functools.partial(op.invoke, impl.function)
        if op.mutates:
            run = functools.partial(uninterrupted, run)
    return Plan(op, impl, facts, value_check(op, facts), run)


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
    op.check_types(values)
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
        _capturing(device.type),
        {name: described(tensor) for name, tensor in tensors.items()},
        {n: tensors[n].is_pinned() for n in op.host if tensors[n].device != device},
    )


def _layout(tensor: Any) -> str:
    if tensor.is_contiguous():
        return "contiguous"
    return "rows" if tensor.stride(-1) == 1 else "strided"


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
        warnings.warn(f"{op.name}: runs as composite; {text}", SlowPath, stacklevel=_caller_level())


def _caller_level() -> int:
    """How many frames up the first one outside transom stands."""
    level, frame, inner = 1, sys._getframe(1), ("transom", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in inner:
        frame, level = frame.f_back, level + 1
    return level


def value_check(op: Op[..., Any], facts: Facts) -> Callable[..., None] | None:
    """The rule on the values of tensors, as a function of all declared arguments, where it is to be
    asked."""
    rule = op.rule_on_values
    if rule is None or not (facts.device == "cpu" or config.debug()):
        return None
    known = [facts.dims.get(n) for n in rule.asks]
    asked = [(at, op.position[n]) for at, n in enumerate(rule.asks) if n in op.position]
    far = facts.device != "cpu"

    def check(*values: Any) -> None:
        given = known.copy()
        for at, i in asked:
            value = values[i]
            given[at] = value.cpu() if far and isinstance(value, Tensor) else value
        if text := rule.function(*given):
            raise ValueError(f"{op.name}: {text}")

    return check
