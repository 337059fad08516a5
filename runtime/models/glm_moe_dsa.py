"""GLM-DSA of transformers through the operators: V3.2's attention, selections shared by layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf

from . import dsa
from .patching import Family, Replacement
from .slots import SLOTS, covered


class GlmMoeDsaAttention(hf.GlmMoeDsaAttention):
    """Latent attention over the tokens that its own or an earlier layer's indexer selects."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        prev_topk_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As the original, with indices that end in -1; without `Slots` it is the original."""
        slots = kwargs.pop(SLOTS, None)
        if not covered(slots, "GlmMoeDsaAttention"):
            return super().forward(
                hidden_states,
                position_embeddings,
                attention_mask,
                past_key_values,
                position_ids,
                prev_topk_indices,
                **kwargs,
            )
        if self.indexer is None and prev_topk_indices is None:
            raise ValueError(
                "GlmMoeDsaAttention: a layer without indexer got no indices; "
                "expected those of an earlier layer"
            )
        output, indices = dsa.attend(
            self,
            hidden_states,
            position_embeddings,
            slots,
            past_key_values,
            prev_topk_indices if self.indexer is None else None,
            hf.apply_rotary_pos_emb_interleave,
            hf.apply_rotary_pos_emb_interleave,
        )
        return output, None, indices


class GlmMoeDsaTopkRouter(hf.GlmMoeDsaTopkRouter):
    """Grouped sigmoid routing: `route`."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the original: logits, weights, ids."""
        return dsa.route_groups(self, hidden_states)


FAMILY = Family(
    replacements=(
        Replacement(
            hf.GlmMoeDsaAttention,
            GlmMoeDsaAttention,
            dsa.operators,
            lambda module: dsa.refuse(module, hf.GlmMoeDsaIndexer),
        ),
        Replacement(
            hf.GlmMoeDsaTopkRouter, GlmMoeDsaTopkRouter, lambda module: "route", lambda module: None
        ),
    ),
    base=hf.GlmMoeDsaModel,
    attention=hf.GlmMoeDsaAttention,
    mixes=False,
)
