"""Qwen3.5 of transformers through the operators: Gated DeltaNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as hf

from . import delta_rule
from .patching import Family
from .untouched import instead_of


class Qwen3_5GatedDeltaNet(hf.Qwen3_5GatedDeltaNet):
    """Gated DeltaNet: `gated_delta_rule` with a decay for each head."""

    _transom_original = hf.Qwen3_5GatedDeltaNet

    @instead_of(hf.Qwen3_5GatedDeltaNet)
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


FAMILY = Family(replacements=(delta_rule.linear_attention(Qwen3_5GatedDeltaNet),))
