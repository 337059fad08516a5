"""Qwen3-Next of transformers through the operators: Gated DeltaNet and the router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next as hf

from . import delta_rule, dsa
from .patching import Family
from .untouched import instead_of


class Qwen3NextGatedDeltaNet(hf.Qwen3NextGatedDeltaNet):
    """Gated DeltaNet: `gated_delta_rule` with a decay for each head."""

    _transom_original = hf.Qwen3NextGatedDeltaNet

    @instead_of(hf.Qwen3NextGatedDeltaNet)
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
        parts = self.fix_query_key_value_ordering(self.in_proj_qkvz(x), self.in_proj_ba(x))
        q, k, v, z, b, a = parts
        qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
        return delta_rule.of_projections(self, qkv, z, b, a, cache_params)


class Qwen3NextTopKRouter(hf.Qwen3NextTopKRouter):
    """Routing by softmax scores: `route`."""

    _transom_original = hf.Qwen3NextTopKRouter
    forward = instead_of(hf.Qwen3NextTopKRouter)(dsa.route_softmax)


FAMILY = Family(
    replacements=(
        delta_rule.linear_attention(Qwen3NextGatedDeltaNet),
        dsa.routing(Qwen3NextTopKRouter),
    )
)
