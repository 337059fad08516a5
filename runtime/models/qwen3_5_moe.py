"""Qwen3.5-MoE of transformers through the operators: Gated DeltaNet and the router."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as hf

from . import delta_rule, dsa
from .patching import Family
from .untouched import instead_of


class Qwen3_5MoeGatedDeltaNet(hf.Qwen3_5MoeGatedDeltaNet):
    """Gated DeltaNet: `gated_delta_rule` with a decay for each head."""

    _transom_original = hf.Qwen3_5MoeGatedDeltaNet

    @instead_of(hf.Qwen3_5MoeGatedDeltaNet)
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the original."""
        if delta_rule.recording(self, cache_params):
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        x = delta_rule.masked(hidden_states, attention_mask)
        return delta_rule.gated_delta_net(self, x, cache_params)


class Qwen3_5MoeTopKRouter(hf.Qwen3_5MoeTopKRouter):
    """Routing by softmax scores: `route`."""

    _transom_original = hf.Qwen3_5MoeTopKRouter
    forward = instead_of(hf.Qwen3_5MoeTopKRouter)(dsa.route_softmax)


FAMILY = Family(
    replacements=(
        delta_rule.linear_attention(Qwen3_5MoeGatedDeltaNet),
        dsa.routing(Qwen3_5MoeTopKRouter),
    )
)
