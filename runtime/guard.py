"""The self-check on a user's machine: TRANSOM_GUARD=N compares every Nth call with the composite.

A call that disagrees names itself in a warning, its implementation is quarantined on this machine
until `transom doctor --clear`, and the next implementation takes over, from this very call on: what
the caller gets is the composite's result. Off unless asked for, and then free: plans hold the
implementation itself.
"""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import config
from . import device as _device
from .op import Impl, Op
from .registry import forget_plans
from .tolerance import agree, as_tuple
from .weights import QuantizedWeight


class Quarantined(UserWarning):
    """A guarded call disagreed with the composite; its implementation is set aside."""


@dataclass(frozen=True)
class Entry:
    """An implementation that is set aside, where, and what it got wrong."""

    op: str
    impl: str
    version: str
    device: str
    """Name, architecture and toolchain of the device."""
    call: str
    problem: str


def every() -> int:
    """N of TRANSOM_GUARD: each implementation's every Nth call is compared; 0: none."""
    text = config.GUARD.get()
    if not text.isdigit():
        raise ValueError(f"{config.GUARD.name}: value is {text!r}; expected a whole number >= 0")
    return int(text)


def watched(op: Op[..., Any], impl: Impl) -> Impl:
    """The implementation with every Nth call compared; itself where there is nothing to compare."""
    number = every()
    if not number or impl.tier in ("composite", "reference"):
        return impl
    turns = itertools.count(1)

    @functools.wraps(impl.function)
    def function(*args: Any, **kwargs: Any) -> Any:
        if next(turns) % number:
            return impl.function(*args, **kwargs)
        return _compared(op, impl, op.bind(*args, **kwargs))

    return replace(impl, function=function)


def _compared(op: Op[..., Any], impl: Impl, values: tuple[Any, ...]) -> Any:
    """The result of the call, after the composite has made it too on a copy of its inputs."""
    tensors = op.tensors(values)
    device = next(iter(tensors.values())).device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return op.invoke(impl.function, *values)  # a comparison would wait for the device
    copies = tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in values)
    got = op.invoke(impl.function, *values)
    want = op.invoke(op.impls["composite"].function, *copies)
    made, right = as_tuple(got), as_tuple(want)
    if op.mutates:
        at = [op.position[name] for name in op.mutates]
        made, right = tuple(values[i] for i in at), tuple(copies[i] for i in at)
    arguments = op.arguments(values)
    dims = op.signature.bind(op.name, {n: t.shape for n, t in tensors.items()}, arguments)
    problem = agree(op, made, right, {**arguments, **dims})
    if problem is None:
        return got
    call = ", ".join(f"{n} {_text(t)}" for n, t in tensors.items())
    _set_aside(Entry(op.name, impl.name, impl.version, _where(device.type), call, problem))
    for into, value in zip(made, right, strict=True) if op.mutates else ():
        into.copy_(value)
    return want


def _set_aside(entry: Entry) -> None:
    held = [*entries(), entry]
    _known.clear()
    _known.extend(held)
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(e) for e in held], indent=1), encoding="utf-8")
        kept = "until `transom doctor --clear`"
    except OSError as error:
        kept = f"in this process ({path} cannot be written: {error.strerror})"
    forget_plans()
    warnings.warn(
        f"{entry.op}: {entry.impl} disagrees with the composite: {entry.problem}, for {entry.call};"
        f" set aside {kept}, the next implementation takes over",
        Quarantined,
        stacklevel=4,
    )


_known: list[Entry] = []
_read: list[Path] = []


def entries() -> list[Entry]:
    """What is set aside on this machine."""
    path = _path()
    if path not in _read:
        _read[:] = [path]
        try:
            _known[:] = [Entry(**e) for e in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            _known.clear()  # no file, or one of another version
    return list(_known)


def clear() -> int:
    """Set everything free again; how many there were."""
    count = len(entries())
    _path().unlink(missing_ok=True)
    _known.clear()
    forget_plans()
    return count


def reason(impl: Impl, device_type: str) -> str | None:
    """Why an implementation is set aside on this device, or None."""
    for e in entries():
        if (e.op, e.impl, e.version) == (impl.op, impl.name, impl.version):
            if e.device == _where(device_type):
                return f"quarantined: {e.problem}; transom doctor --clear sets it free"
    return None


def _where(device_type: str) -> str:
    """The device as an entry keeps it: another driver or toolchain deserves another chance."""
    parts = (_device.describe(device_type), _device.arch(device_type), torch.__version__)
    return ", ".join((*parts, str(torch.version.cuda or torch.version.hip or "")))


def _path() -> Path:
    return config.cache_folder() / "quarantine.json"


def _text(value: Any) -> str:
    if isinstance(value, QuantizedWeight):
        return f"{value.spec}{list(value.shape)}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
