"""route by npu_moe_gating_top_k."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.facts import Facts
from transom.kernels.moe.route import route
from transom.requires import absent, at_most, condition, dtype, one_of

from .._vendor import call, not_empty, offer

EXPERTS = 2048
"""Each group rounded up to 32 of them."""
KINDS = {"softmax": 0, "sigmoid": 1}
"""The vendor's norm_type of each score."""


def _groups(f: Facts) -> str | None:
    E, groups = f.dims["E"], f.arguments["groups"]
    if groups > 1 and E // groups <= 2:
        return f"groups have {E // groups} experts; supported: 3 or more"
    padded = -(-E // groups // 32) * 32 * groups
    if padded > EXPERTS:
        return f"groups padded to 32 have {padded} experts; supported: at most {EXPERTS}"
    return None


def _normalised(f: Facts) -> str | None:
    # the vendor divides sigmoid scores by their sum, always
    raw = f.arguments["score"] == "sigmoid" and not f.arguments["renormalize"]
    return "renormalize is False; supported with sigmoid: True" if raw else None


@offer(
    route,
    dtype("logits", torch.float32, torch.bfloat16, torch.float16),
    one_of("score", *KINDS),
    at_most("E", EXPERTS),
    not_empty("T"),
    absent("preset", "mask"),
    condition("groups of 3 experts or more", ("E", "groups"), _groups),
    condition("renormalised if sigmoid", ("score", "renormalize"), _normalised),
)
def forward(
    logits: Tensor,
    k: int,
    *,
    score: str,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    preset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In float32 throughout: the vendor returns weights in the dtype of the logits. What its
    operator does with keys that are infinite or NaN is nowhere stated, nor was it seen."""
    soft = score == "softmax"
    weights, ids, _ = call(
        "npu_moe_gating_top_k",
        logits.float(),
        k,
        bias=None if bias is None else bias.float(),
        k_group=top_groups,
        group_count=groups,
        group_select_mode=0 if bias is None else 1,
        renorm=0,
        norm_type=KINDS[score],
        routed_scaling_factor=1.0 if soft else scale,
        eps=1e-20,
    )
    if soft:  # of which the vendor leaves the sum to the caller
        total = weights.sum(-1, keepdim=True) + 1e-20 if renormalize else 1.0
        weights = weights / total * scale
    return ids.clamp(0, logits.shape[1] - 1), weights
