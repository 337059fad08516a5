"""Qwen3.8-Flash of transformers through the operators: grouped queries over pools of tokens.

Pool p holds tokens p m .. p m + m - 1 of a row, padding left out; its key is the mean of theirs,
normed and rotated to the first token's place. A query sees the pools with the best scores
sum_h relu(u[h] . P[p]) and the tokens behind the last whole pool.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen4_exp import modeling_qwen4_exp as hf

import transom

from . import delta_rule, dsa, pools
from .padding import Slots
from .patching import Family, Replacement
from .untouched import attends_instead_of, instead_of


class Qwen4ExpTextAttention(hf.Qwen4ExpTextAttention):
    """Gated attention over the pools that the indexer selects and the tail."""

    _transom_original = hf.Qwen4ExpTextAttention

    @attends_instead_of(hf.Qwen4ExpTextAttention)
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original; position_embeddings are those of all tokens, the cached ones first."""
        queries = hidden_states.shape[1]
        cos, sin = (x[:, -queries:] for x in position_embeddings)
        q, gate = dsa.heads(self.q_proj(hidden_states), 2 * self.head_dim).chunk(2, dim=-1)
        k = self.k_norm(dsa.heads(self.k_proj(hidden_states), self.head_dim))
        v = dsa.heads(self.v_proj(hidden_states), self.head_dim)
        q, k = hf.apply_rotary_pos_emb(self.q_norm(q), k, cos, sin, unsqueeze_dim=2)
        if past_key_values is not None:
            # The cache holds them as transformers does: [B, H, N, D].
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            k, v = past_key_values.update(k, v, self.layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        call = dsa.Call(position_embeddings, slots, past_key_values)
        chosen, block = _select(self.indexer, hidden_states, call)
        o: Any = transom.block_sparse_attention(
            q,
            k,
            v,
            chosen.unsqueeze(2).expand(-1, -1, k.shape[2], -1),
            block_size=block,
            causal=True,
            scale=self.scaling,
        )
        o = o.flatten(2) * torch.sigmoid(gate.flatten(2))
        return self.o_proj(o), None


@torch.no_grad()
def _select(indexer: Any, hidden_states: Tensor, call: dsa.Call) -> tuple[Tensor, int]:
    """indices[B, S, K] of pools of slots, and their size: 1 where padding lies between tokens."""
    batch, queries = hidden_states.shape[:2]
    m, slots = indexer.compress_ratio, call.slots
    both = dsa.heads(indexer.index_qk_proj(hidden_states), indexer.index_head_dim)
    q, raw = both.split([indexer.index_n_heads, indexer.index_kv_heads], dim=2)
    cos, sin = call.angles
    own = cos[:, -queries:], sin[:, -queries:]
    q = hf.apply_rotary_pos_emb(indexer.q_layernorm(q), None, *own, unsqueeze_dim=2)
    raw = raw.squeeze(2)
    if call.cache is not None:
        raw = call.cache.update_indexer(raw, indexer.layer_idx)
    means = pools.whole(pools.packed(slots, raw), m).float().mean(2).to(raw.dtype)
    # At the place of a pool's first token.
    first = (
        pools.whole(pools.packed(slots, x.expand(batch, -1, -1)), m)[:, :, 0] for x in (cos, sin)
    )
    entries = hf.apply_rotary_pos_emb(
        indexer.k_layernorm(means).unsqueeze(2), None, *first, unsqueeze_dim=2
    ).squeeze(2)
    count = pools.seen(slots, batch, queries, raw.device)
    weights = torch.ones(q.shape[:3], dtype=torch.float32, device=q.device)
    chosen = pools.best(q, entries, weights, indexer.block_topk, count, m)
    chosen = pools.with_tail(chosen, count, m)
    if slots.valid is None:
        return chosen, m
    return pools.tokens(chosen, count, m, slots), 1


class Qwen4ExpTextGatedDeltaNet(hf.Qwen4ExpTextGatedDeltaNet):
    """Gated DeltaNet: `gated_delta_rule` with a decay for each head."""

    _transom_original = hf.Qwen4ExpTextGatedDeltaNet

    @instead_of(hf.Qwen4ExpTextGatedDeltaNet)
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


class Qwen4ExpTextTopKRouter(hf.Qwen4ExpTextTopKRouter):
    """Routing by softmax scores: `route`."""

    _transom_original = hf.Qwen4ExpTextTopKRouter

    forward = instead_of(hf.Qwen4ExpTextTopKRouter)(dsa.route_softmax)


def _operators(module: Any) -> str:
    indexer = module.indexer
    return (
        f"block_sparse_attention over {indexer.block_topk} pools of {indexer.compress_ratio} "
        "tokens, lightning_indexer"
    )


def _refuse(module: Any) -> str | None:
    if type(module.indexer) is not hf.Qwen4ExpTextQSAIndexer:
        return f"its indexer is a {type(module.indexer).__name__}; covered: {hf.__name__}'s own"
    if module.indexer.index_kv_heads != 1:
        return f"its indexer has {module.indexer.index_kv_heads} key heads; covered: 1"
    return None


FAMILY = Family(
    replacements=(
        Replacement(
            hf.Qwen4ExpTextAttention,
            Qwen4ExpTextAttention,
            _operators,
            _refuse,
            lambda module: ("indexer",),
        ),
        dsa.routing(Qwen4ExpTextTopKRouter),
        delta_rule.linear_attention(Qwen4ExpTextGatedDeltaNet),
    ),
    base=hf.Qwen4ExpTextModel,
    attention=hf.Qwen4ExpTextAttention,
    mixes=True,
    recurrent=("linear_attention",),
)
