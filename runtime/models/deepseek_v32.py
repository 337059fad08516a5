"""DeepSeek-V3.2 of transformers through the operators: its indexer rotates halves, not pairs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from . import dsa
from .padding import Slots
from .patching import Family
from .untouched import attends_instead_of, instead_of


class DeepseekV32Attention(hf.DeepseekV32Attention):
    """Latent attention over the tokens that the indexer selects, and only those."""

    _transom_original = hf.DeepseekV32Attention

    @attends_instead_of(hf.DeepseekV32Attention)
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original."""
        call = dsa.Call(position_embeddings, slots, past_key_values)
        z, q = dsa.low_rank_query(self, hidden_states)
        pairs, halves = hf.apply_rotary_pos_emb_interleave, hf.apply_rotary_pos_emb
        q, keys = dsa.rotated(self, q, *dsa.latents(self, hidden_states), pairs, call)
        indices = dsa.select(self.indexer, hidden_states, z, halves, call)
        o = dsa.attend(self, q, keys, indices)
        return self.o_proj(o.flatten(2)), None


class DeepseekV32TopkRouter(hf.DeepseekV32TopkRouter):
    """Routing by groups: `route`."""

    _transom_original = hf.DeepseekV32TopkRouter
    forward = instead_of(hf.DeepseekV32TopkRouter)(dsa.route_groups)


FAMILY = Family(
    replacements=(
        dsa.attention(DeepseekV32Attention, hf.DeepseekV32Indexer),
        dsa.routing(DeepseekV32TopkRouter),
    ),
    base=hf.DeepseekV32Model,
    attention=hf.DeepseekV32Attention,
    mixes=True,
)
