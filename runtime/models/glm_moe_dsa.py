"""GLM-DSA of transformers through the operators: layers may share a selection of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf

from . import dsa
from .padding import Slots
from .patching import Family
from .untouched import attends_instead_of, instead_of


class GlmMoeDsaAttention(hf.GlmMoeDsaAttention):
    """Latent attention over the tokens that its own or an earlier layer's indexer selects."""

    _transom_original = hf.GlmMoeDsaAttention

    @attends_instead_of(hf.GlmMoeDsaAttention)
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        prev_topk_indices: Tensor | None = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As the original."""
        call = dsa.Call(position_embeddings, slots, past_key_values)
        z, q = dsa.low_rank_query(self, hidden_states)
        pairs = hf.apply_rotary_pos_emb_interleave
        q, keys = dsa.rotated(self, q, *dsa.latents(self, hidden_states), pairs, call)
        if self.indexer is None:
            indices = dsa.given(self, prev_topk_indices)
        else:
            indices = dsa.select(self.indexer, hidden_states, z, pairs, call)
        o = dsa.attend(self, q, keys, indices)
        return self.o_proj(o.flatten(2)), None, indices


class GlmMoeDsaTopkRouter(hf.GlmMoeDsaTopkRouter):
    """Routing by groups: `route`."""

    _transom_original = hf.GlmMoeDsaTopkRouter
    forward = instead_of(hf.GlmMoeDsaTopkRouter)(dsa.route_groups)


FAMILY = Family(
    replacements=(
        dsa.attention(GlmMoeDsaAttention, hf.GlmMoeDsaIndexer),
        dsa.routing(GlmMoeDsaTopkRouter),
    ),
    base=hf.GlmMoeDsaModel,
    attention=hf.GlmMoeDsaAttention,
    mixes=False,
)
