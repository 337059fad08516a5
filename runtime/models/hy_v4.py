"""Hy4 of transformers through the operators: sinks, gates, and selections that layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.hy_v4 import modeling_hy_v4 as hf

from . import dsa
from .padding import Slots
from .patching import Family
from .untouched import attends_instead_of, instead_of


class HYV4Attention(hf.HYV4Attention):
    """Latent attention over the tokens of its own or an earlier layer's indexer, with a gate."""

    _transom_original = hf.HYV4Attention

    @attends_instead_of(hf.HYV4Attention)
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
        halves = hf.apply_rotary_pos_emb
        q, keys = dsa.rotated(self, q, *dsa.latents(self, hidden_states), halves, call)
        if self.indexer is None:
            indices = dsa.given(self, prev_topk_indices)
        else:
            indices = _select(self.indexer, hidden_states, z, call)
        o = dsa.attend(self, q, keys, indices, sink=self.sinks)
        o = o * torch.sigmoid(dsa.heads(self.gate_proj(hidden_states), self.gate_projection_size))
        return self.o_proj(o.flatten(2)), None, indices


@torch.no_grad()
def _select(indexer: Any, hidden_states: Tensor, z: Tensor, call: dsa.Call) -> Tensor:
    """As dsa.select, but the last dims are rotated and the key is normed in the norm's dtype."""
    q = dsa.heads(indexer.wq_b(z), indexer.head_dim)
    norm = indexer.k_norm
    k = norm(indexer.wk(hidden_states).to(norm.weight.dtype)).to(hidden_states.dtype).unsqueeze(2)
    still = indexer.head_dim - indexer.qk_rope_head_dim
    q_turned, k_turned = hf.apply_rotary_pos_emb(
        q[..., still:], k[..., still:], *call.angles, unsqueeze_dim=2
    )
    q = torch.cat([q[..., :still], q_turned], dim=-1)
    k = torch.cat([k[..., :still], k_turned], dim=-1)
    return dsa.best(indexer, hidden_states, q, k, call)


class HYV4TopkRouter(hf.HYV4TopkRouter):
    """Routing by groups: `route`."""

    _transom_original = hf.HYV4TopkRouter
    forward = instead_of(hf.HYV4TopkRouter)(dsa.route_groups)


FAMILY = Family(
    replacements=(
        dsa.attention(HYV4Attention, hf.HYV4Indexer, chosen=("eager",)),
        dsa.routing(HYV4TopkRouter),
    ),
    base=hf.HYV4Model,
    attention=hf.HYV4Attention,
    mixes=False,
)
