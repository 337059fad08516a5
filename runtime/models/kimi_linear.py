"""Kimi Linear of transformers through the operators: Kimi Delta Attention and the router."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as hf

from . import delta_rule, dsa
from .patching import Family
from .untouched import instead_of


class KimiLinearDeltaAttention(hf.KimiLinearDeltaAttention):
    """Kimi Delta Attention: `gated_delta_rule` with a decay for each channel."""

    _transom_original = hf.KimiLinearDeltaAttention

    @instead_of(hf.KimiLinearDeltaAttention)
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
        return delta_rule.kimi_delta_attention(self, x, cache_params)


class KimiLinearTopkRouter(hf.KimiLinearTopkRouter):
    """Routing by groups: `route`."""

    _transom_original = hf.KimiLinearTopkRouter
    forward = instead_of(hf.KimiLinearTopkRouter)(dsa.route_groups)


FAMILY = Family(
    replacements=(
        delta_rule.linear_attention(KimiLinearDeltaAttention),
        dsa.routing(KimiLinearTopkRouter),
    )
)
