"""Calls of the vendor's operators, and the requirements that their implementations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from transom.facts import Facts
from transom.op import Op
from transom.requires import Requirement, condition, device

from . import DEVICES

F = TypeVar("F", bound=Callable[..., Any])


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """torch.ops.npu.<name>, which torch_npu defines when it is imported."""
    return getattr(torch.ops.npu, name)(*args, **kwargs)


def offer(op: Op[..., Any], *requires: Requirement) -> Callable[[F], F]:
    """Register a function as the vendor's implementation of `op`.

    Not deterministic: the vendor states neither an order of sums nor which of equal scores it takes
    first.
    """

    def register(function: F) -> F:
        function.__name__ = "ascend"
        op.impl(requires=(device(*DEVICES), *requires), tier="tuned", deterministic=False)(function)
        return function

    return register


def same_dtype(first: str, second: str) -> Requirement:
    """Two tensors (where both are given) hold one dtype."""

    def test(f: Facts) -> str | None:
        a, b = f.dtypes.get(first), f.dtypes.get(second)
        if None in (a, b) or a == b:
            return None
        return f"{second} is {_name(b)}; supported: the dtype of {first}, {_name(a)}"

    return condition(f"{second} as {first}", (f"dtype:{first}", f"dtype:{second}"), test)


def not_empty(*dims: str) -> Requirement:
    """None of these dims is 0: the vendor refuses empty tensors."""

    def test(f: Facts) -> str | None:
        none = [d for d in dims if f.dims.get(d) == 0]
        return f"{', '.join(none)} = 0; supported: tensors that aren't empty" if none else None

    return condition(f"{', '.join(dims)} > 0", dims, test)


def _name(kind: Any) -> str:
    return str(kind).removeprefix("torch.")
