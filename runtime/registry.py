"""The registry: every declared operator by name, and who registers implementations now.

Plans of calls are made from what is registered: whatever changes that calls forget_plans().
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .op import Op

OPS: dict[str, Op[..., Any]] = {}
"""Every declared operator by name."""

_registrant: str | None = None


def lookup(which: str | Op[..., Any]) -> Op[..., Any]:
    """The operator of a name ('grouped_gemm' or 'moe/grouped_gemm'); ValueError lists what there
    is."""
    if isinstance(which, Op):
        return which
    found = OPS.get(which.rpartition("/")[2])
    if found is None:
        raise ValueError(f"{which}: is not an operator; expected one of {', '.join(sorted(OPS))}")
    return found


def add(op: Op[..., Any]) -> None:
    """Take a declaration in; ValueError if another one has its name."""
    if op.name in OPS:
        raise ValueError(
            f"{op.name}: declared in {OPS[op.name].module}; expected a name of its own"
        )
    OPS[op.name] = op


def forget_plans() -> None:
    """Drop every plan: implementations, plugins or measured choices have changed."""
    for op in OPS.values():
        op.engine.forget_plans()


@contextlib.contextmanager
def registering(plugin: str) -> Iterator[None]:
    """Within the block, what is registered belongs to this plugin."""
    global _registrant
    before, _registrant = _registrant, plugin
    try:
        yield
    finally:
        _registrant = before


def registrant() -> str | None:
    """The plugin whose register() is running."""
    return _registrant


def backend_of(module: str) -> str:
    """The backend that a module's implementations belong to: its folder in transom.backends, or its
    plugin."""
    parts = module.split(".")
    if parts[:2] == ["transom", "backends"] and len(parts) > 2:
        return parts[2]
    return _registrant or parts[0]
