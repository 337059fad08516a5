"""Declaring an operator: @op makes an Op of a function, and gives it the engine that runs it.

    @op("x[*B, D], weight[D] -> y[*B, D]", dtypes="x: float; weight: x; y: x", examples=[...])
    def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor: ...

The decorated function is the composite: the operator's meaning in torch, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from . import dispatch, selection, torch_op
from .op import Op
from .record import Plan
from .registry import add

P = ParamSpec("P")
R = TypeVar("R")


def op(
    shapes: str,
    *,
    dtypes: str,
    flops: str = "0",
    bytes: str | None = None,
    accumulate: str = "1",
    autocast: str = "",
    batch: str | None = None,
    mutates: str = "",
    host: str = "",
    varying: str = "B T S M",
    examples: list[dict[str, Any]],
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an operator; the decorated function is its composite.

    shapes      `x[*B, D], bias?[E] -> y[*B, D]`: see shapes.py
    dtypes      `x: float; weight: x | f32 | quant; y: x`: see dtypes.py
    flops       operations of one call, an expression over dims and arguments; bytes likewise
                (default: all, once)
    accumulate  terms of the longest sum: drives the tolerance of tests
    autocast    `low: x weight; f32: logits`: what autocast casts; nothing by default
    batch       the leading dim over which calls are independent: torch.vmap folds into it
    mutates     names of arguments that are written; such an operator returns nothing
    host        names of arguments that may lie in host memory, for implementations that read there
    varying     dims that change from call to call: measured choices round them to powers of two
    examples    dims and arguments for tests (the first, small) and benchmarks (model shapes)
    """
    options = dict(
        flops=flops,
        bytes=bytes,
        accumulate=accumulate,
        autocast=autocast,
        batch=batch,
        mutates=mutates,
        host=host,
        varying=varying,
        examples=examples,
    )

    def declare(function: Callable[P, R]) -> Op[P, R]:
        made = Op(function, shapes, dtypes, options)
        add(made)
        made.engine = _Engine(made)
        return made

    return declare


class _Engine:
    """What runs an operator's calls (op.Engine)."""

    def __init__(self, op: Op[..., Any]) -> None:
        self._op = op
        self._caller: Any = None
        self.enter: Callable[..., Any] = self._enter
        self.torch_op = torch_op.define(op)

    def _begin(self) -> Any:
        """Its Caller, made at the first call: `import transom` does not load transom._C."""
        if self._caller is None:
            self._caller = dispatch.caller(self._op, self._through_torch)
            self.enter = self._caller.enter
        return self._caller

    def _enter(self, *values: Any) -> Any:
        return self._begin().enter(*values)

    def _through_torch(self, *values: Any) -> Any:
        """A call that torch must see: it asks for a gradient, a mode or a transform is in force."""
        op = self._op
        op.check_types(values)
        if torch_op.transformed(op):
            return torch_op.apply_transformed(op, op.flatten(*values))
        return self.torch_op(*op.flatten(*values))

    def run(self, values: tuple[Any, ...], gradient: bool) -> Any:
        return self._begin().run(values, gradient)

    def arguments(self, *args: Any, **kwargs: Any) -> tuple[Op[..., Any], tuple[Any, ...]]:
        op = self._op
        if op.public is None:
            return op, op.bind(*args, **kwargs)
        with torch.no_grad(), torch_op.Asking() as mode:
            op(*args, **kwargs)
        if mode.asked is None:
            raise AssertionError(f"{op.name}: its public function did not call the operator")
        return mode.asked

    def explain(self, *args: Any, **kwargs: Any) -> selection.Explanation:
        op, values = self.arguments(*args, **kwargs)
        return selection.select(op, dispatch.facts_of(op, values))

    def plans(self) -> list[Plan]:
        """The plans that are kept."""
        return list(self._begin().plans())

    def forget_plans(self) -> None:
        self._caller, self.enter = None, self._enter
