"""What the Triton kernels do not take on Ascend: found by `transom verify --target ascend`.

A requirement here holds for device type npu alone; elsewhere the same kernels take the call.
"""

from __future__ import annotations

import torch

from transom.dispatch import Facts
from transom.requires import Requirement, condition, dtype, multiple_of

from . import DEVICES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def on_ascend(requirement: Requirement) -> Requirement:
    """The requirement, asked of calls on an Ascend device only."""

    def test(f: Facts) -> str | None:
        return requirement(f) if f.device in DEVICES else None

    reads = ("device", *requirement.reads)
    return condition(f"on Ascend: {requirement.text}", reads, test)


def _some(argument: str) -> Requirement:
    def test(f: Facts) -> str | None:
        none = f.arguments[argument] == 0
        return f"{argument} = 0; supported by Ascend's compiler: 1 or more" if none else None

    return condition(f"{argument} > 0", (argument,), test)


# Ascend's lowering of a masked load whose rows are gathered copies whole rows of the tile, the
# elements behind the mask too: from behind the tensor's end, if the tile's width doesn't divide it.
# Of every other element it copies one more than there are. 128 is the widest tile's step.
_GATHERED = (on_ascend(multiple_of("D", 128)), on_ascend(multiple_of("I", 128)))
_WHOLE_BYTES = dtype("gate_up", *FLOATS, "int8", "fp8")

REFUSED: dict[str, tuple[Requirement, ...]] = {
    # "strides must not be zero", of an output without elements
    "sparse_attention": (on_ascend(_some("v_dim")),),
    "sparse_attention_rows": (on_ascend(_some("v_dim")),),
    "moe_experts": (*_GATHERED, on_ascend(_WHOLE_BYTES)),
    "moe_experts_backward": (*_GATHERED, on_ascend(_WHOLE_BYTES)),
    "moe_experts_weight_backward": _GATHERED,
}
"""By operator."""
