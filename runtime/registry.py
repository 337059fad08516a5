"""The registry: every declared operator by name.

Plans of calls are made from what is registered: whatever changes that calls forget_plans().
"""

from __future__ import annotations

from typing import Any

from .op import Op

OPS: dict[str, Op[..., Any]] = {}
"""Every declared operator by name."""

RENAMED = {
    "grouped_gemm_dx": "grouped_gemm_backward_x",
    "grouped_gemm_dw": "grouped_gemm_backward_weight",
    "hashed_embedding_row_gradient": "hashed_embedding_backward_rows",
    "moe_experts_weight_backward": "moe_experts_backward_experts",
}
"""Former names of operators, understood until version 0.2."""


def lookup(which: str | Op[..., Any]) -> Op[..., Any]:
    """The operator of a name ('grouped_gemm' or 'moe/grouped_gemm'); ValueError lists what there
    is."""
    if isinstance(which, Op):
        return which
    name = which.rpartition("/")[2]
    found = OPS.get(RENAMED.get(name, name))
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
