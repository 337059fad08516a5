"""A.X-K2 of transformers through the operators: the query's projection has a gate too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.axk2 import modeling_axk2 as hf

from . import dsa
from .padding import Slots
from .patching import Family
from .untouched import attends_instead_of, instead_of


class AXK2Attention(hf.AXK2Attention):
    """Latent attention over the tokens that the indexer selects, gated."""

    _transom_original = hf.AXK2Attention

    @attends_instead_of(hf.AXK2Attention)
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
        compressed = self.q_a_proj(hidden_states)
        z = self.q_a_layernorm(compressed)
        both = self.q_gate_proj(torch.cat([z, compressed], dim=-1))
        both = dsa.heads(both, self.qk_head_dim + self.v_head_dim)
        q, gate = both.split([self.qk_head_dim, self.v_head_dim], dim=-1)
        pairs, halves = hf.apply_rotary_pos_emb_interleave, hf.apply_rotary_pos_emb
        q, keys = dsa.rotated(self, q, *dsa.latents(self, hidden_states), pairs, call)
        indices = dsa.select(self.indexer, hidden_states, z, halves, call)
        o = dsa.attend(self, q, keys, indices)
        o = (o * torch.sigmoid(gate.float())).to(o.dtype)
        return self.o_proj(o.flatten(2)), None


class AXK2TopkRouter(hf.AXK2TopkRouter):
    """Routing, by groups where the model has them: `route`."""

    _transom_original = hf.AXK2TopkRouter

    @instead_of(hf.AXK2TopkRouter)
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the original: logits, weights, ids; experts of groups that are not chosen count 0."""
        return dsa.route_groups(self, hidden_states)


FAMILY = Family(
    replacements=(dsa.attention(AXK2Attention, hf.AXK2Indexer), dsa.routing(AXK2TopkRouter)),
    base=hf.AXK2Model,
    attention=hf.AXK2Attention,
    mixes=True,
)
