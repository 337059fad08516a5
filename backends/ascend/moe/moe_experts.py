"""moe_experts by the vendor's chain: init_routing, grouped products, swiglu, unpermute."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.moe.moe_experts import moe_experts
from transom.op import Weight
from transom.requires import absent, at_most, contiguous, dtype, one_of

from .._vendor import call, not_empty, offer, same_dtype
from ._products import GROUPS, INNER, grouped

SLOTS = 512
"""Experts of a token that npu_moe_token_unpermute adds up."""


# Between its operators the vendor rounds to the dtype of x; ours rounds once. So half precision
# is left to the Triton kernels.
@offer(
    moe_experts,
    dtype("x", torch.float32),
    dtype("gate_up", torch.float32),
    dtype("down", torch.float32),
    dtype("weights", torch.float32),
    same_dtype("x", "gate_up"),
    at_most("E", GROUPS),
    at_most("I", INNER // 2),
    at_most("D", INNER),
    at_most("K", SLOTS),
    not_empty("T", "K", "D", "I", "E"),
    contiguous("x", "gate_up", "down"),
    absent("gate_up_bias", "down_bias"),
    one_of("activation", "silu"),
    one_of("limit", None),
    one_of("interleaved", False),
    one_of("weight_position", "after"),
)
def forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Weight,
    down: Weight,
    *,
    activation: str = "silu",
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_position: str = "after",
    interleaved: bool = False,
    alpha: float = 1.702,
) -> Tensor:
    """Empty slots go to an expert behind the last one, whose rows no product reads and whose
    results are zero."""
    T, K = ids.shape
    E = gate_up.shape[0]
    empty = (ids < 0) | (ids >= E)
    rows, places, counts, _ = call(
        "npu_moe_init_routing_v2",
        x,
        torch.where(empty, E, ids).to(torch.int32),
        active_num=T * K,
        expert_num=E + 1,
        drop_pad_mode=0,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, E + 1],
        row_idx_type=0,
    )
    ends = counts[:E].cumsum(0)
    h = call("npu_swiglu", grouped(rows, gate_up.transpose(1, 2), ends), dim=-1)
    y = grouped(h, down.transpose(1, 2), ends)
    return call(
        "npu_moe_token_unpermute", y, places.to(torch.int32), probs=torch.where(empty, 0.0, weights)
    )
