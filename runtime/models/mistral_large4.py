"""Mistral Large 4 of transformers through the operators: layers may share keys and a selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.mistral_large4 import modeling_mistral_large4 as hf

import transom

from . import dsa
from .padding import Slots
from .patching import Family
from .untouched import attends_instead_of, instead_of


class MistralLarge4TextAttention(hf.MistralLarge4TextAttention):
    """Latent attention over the tokens that its own or an earlier layer's indexer selects."""

    _transom_original = hf.MistralLarge4TextAttention

    @attends_instead_of(hf.MistralLarge4TextAttention)
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        shared_kv_states: Any,
        position_ids: Tensor,
        past_key_values: Any = None,
        prev_topk_indices: Tensor | None = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As the original."""
        call = dsa.Call(position_embeddings, slots, past_key_values)
        q = dsa.heads(self.q_proj(hidden_states), self.qk_head_dim)
        rotate = hf.apply_rotary_pos_emb_interleave if self.use_rope else dsa.unrotated
        kind = "rope" if self.use_rope else "nope"
        if self.is_kv_shared_layer:
            # Those of the last layer of its kind that stored any, as in the original.
            keys = shared_kv_states[kind]
            q_pass, q_turned = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
            q_turned, _ = rotate(q_turned, None, *position_embeddings, unsqueeze_dim=2)
            q = torch.cat([q_pass, q_turned], dim=-1)
        else:
            q, keys = dsa.rotated(self, q, *dsa.latents(self, hidden_states), rotate, call)
        if self.store_full_length_kv:
            shared_kv_states[kind] = keys
        q = self.softmax_scaling(q, position_ids, head_dim_first=False)
        if self.indexer is None:
            indices = dsa.given(self, prev_topk_indices)
        else:
            indices = _select(self.indexer, hidden_states, position_ids, rotate, call)
        o = dsa.attend(self, q, keys, indices)
        return self.o_proj(o.flatten(2)), None, indices


@torch.no_grad()
def _select(
    indexer: Any, hidden_states: Tensor, position_ids: Tensor, rotate: Any, call: dsa.Call
) -> Tensor:
    """As dsa.select, but the query is made of the hidden states and grows with its position."""
    q = dsa.heads(indexer.wq_b(indexer.q_input_norm(hidden_states)), indexer.head_dim)
    q = indexer.softmax_scaling(q, position_ids, head_dim_first=False)
    k = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)
    q, k = dsa.turned(indexer, q, k, rotate, call)
    return dsa.best(indexer, hidden_states, q, k, call)


class MistralLarge4TextTopkRouter(hf.MistralLarge4TextTopkRouter):
    """Routing by groups of softmax scores: `route`."""

    _transom_original = hf.MistralLarge4TextTopkRouter

    @instead_of(hf.MistralLarge4TextTopkRouter)
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the original: logits, weights, ids."""
        logits = dsa.router_logits(self, hidden_states)
        ids, weights = transom.route(
            logits,
            self.top_k,
            score="softmax",
            # Groups count by the sum of their two best scores, as route has it where a bias is.
            bias=logits.new_zeros(self.num_experts),
            groups=self.num_group,
            top_groups=self.topk_group,
            scale=self.routed_scaling_factor,
        )
        return logits, weights, ids.long()


FAMILY = Family(
    replacements=(
        dsa.attention(MistralLarge4TextAttention, hf.MistralLarge4TextIndexer),
        dsa.routing(MistralLarge4TextTopkRouter),
    ),
    base=hf.MistralLarge4TextModel,
    attention=hf.MistralLarge4TextAttention,
    mixes=False,
)
