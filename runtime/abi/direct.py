"""The direct path: an eager call of ordinary tensors, past torch's dispatcher to its plan.

transom._C reads the facts and looks up the plan (csrc/direct.cpp); without it, and for calls that
it does not read, Python does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .. import dispatch
from ..torch_op import functorch_level
from . import road
from .frame import TAGS

if TYPE_CHECKING:
    from ..op import Op

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


def entrance(op: Op[..., Any]) -> Callable[..., Any]:
    """A function of all declared arguments in order: the result of the call, or NotImplemented
    where it must go through the torch operator. Not for calls that are being compiled."""
    extension = road.extension()
    if extension is None:
        return partial(_run, op)
    kinds = {"tensor": extension.TENSOR, "weight": extension.WEIGHT}
    parameters = [
        (kinds.get(p.role) or TAGS[p.type.removesuffix("?")], p.type.endswith("?"))
        for p in op.parameters
    ]
    made: Callable[..., Any] = extension.direct(
        parameters,
        op._plans,
        vars(dispatch),
        dispatch._recorders,
        partial(dispatch.make_plan, op),
        partial(_run, op),
    )
    return made


def _run(op: Op[..., Any], *values: Any) -> Any:
    return dispatch.run(op, values) if ordinary(op, values) else NotImplemented


def ordinary(op: Op[..., Any], values: tuple[Any, ...]) -> bool:
    """True if a call may skip the dispatcher: nothing to differentiate, ordinary tensors, no mode
    in force."""
    if not op._plain(*values):
        return False
    if _dispatch_modes() or _function_modes() or functorch_level() is not None:
        return False
    if torch.is_grad_enabled() and any(getattr(v, "requires_grad", False) is True for v in values):
        return False
    if any(isinstance(v, torch.Tensor) and v._is_zerotensor() for v in values):
        return False
    first = values[0]
    return not (
        first.is_meta
        or torch.is_autocast_enabled(first.device.type)
        or torch._C._get_tracing_state()
    )
