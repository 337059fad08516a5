"""GLM-5.3 of transformers through the operators: latents over pools of tokens, and streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.glm5_next import modeling_glm5_next as hf

import transom

from . import delta_rule, dsa, hyper_connections, pools
from .padding import Slots
from .patching import Family, Replacement
from .untouched import attends_instead_of, instead_of


class Glm5NextTextAttention(hf.Glm5NextTextAttention):
    """Latent attention, without rotation, over the pools that the indexer selects and the tail."""

    _transom_original = hf.Glm5NextTextAttention

    @attends_instead_of(hf.Glm5NextTextAttention)
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        prev_topk_indices: Tensor | None = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As the original."""
        call = dsa.Call((), slots, past_key_values)
        z, q = dsa.low_rank_query(self, hidden_states)
        q, keys = dsa.rotated(self, q, *dsa.latents(self, hidden_states), dsa.unrotated, call)
        if self.indexer is None:
            indices = dsa.given(self, prev_topk_indices)
        else:
            indices = _select(self.indexer, hidden_states, z, call)
        o = dsa.attend(self, q, keys, indices)
        # The original hands its selection to the next layer alone.
        return self.o_proj(o.flatten(2)), None, indices if self.next_skip_topk else None


@torch.no_grad()
def _select(indexer: Any, hidden_states: Tensor, z: Tensor, call: dsa.Call) -> Tensor:
    """indices[B, S, K] of the tokens in the best pools and behind the last whole one."""
    batch, queries = hidden_states.shape[:2]
    slots, m, dim = call.slots, indexer.index_kpool, indexer.head_dim
    k = indexer.k_norm(indexer.wk(hidden_states))
    gate = nn.functional.linear(hidden_states, indexer.index_kpool_compress_gate)
    own = slots.own()
    if call.cache is not None:
        # A row of the cache: key, gate, and 1 for a token, 0 for padding.
        holds = k.new_ones(batch, queries, 1) if own is None else own[..., None].to(k)
        rows = call.cache.update_indexer(torch.cat([k, gate, holds], dim=-1), indexer.layer_idx)
        k, gate = rows[..., :dim], rows[..., dim : 2 * dim]
    entries, _ = transom.compress_kv(
        pools.packed(slots, k),
        pools.packed(slots, gate),
        indexer.index_kpool_compress_ape,
        overlap=False,
    )
    count = pools.seen(slots, batch, queries, k.device)
    q = dsa.heads(indexer.wq_b(z), dim)
    weights = dsa.head_weights(indexer, hidden_states)
    chosen = pools.best(q, entries, weights, indexer.index_topk // m, count, m)
    if indexer.index_kpool_always_select_tail:
        chosen = pools.with_tail(chosen, count, m)
    indices = pools.tokens(chosen, count, m, slots)
    return indices if own is None else indices.masked_fill(~own[..., None], -1)


class Glm5NextTextLinearAttention(hf.Glm5NextTextLinearAttention):
    """Kimi Delta Attention: `gated_delta_rule` with a decay for each channel."""

    _transom_original = hf.Glm5NextTextLinearAttention

    @instead_of(hf.Glm5NextTextLinearAttention)
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


class Glm5NextTextTopkRouter(hf.Glm5NextTextTopkRouter):
    """Routing by groups: `route`."""

    _transom_original = hf.Glm5NextTextTopkRouter
    forward = instead_of(hf.Glm5NextTextTopkRouter)(dsa.route_groups)


class Glm5NextTextHyperConnection(hf.Glm5NextTextHyperConnection):
    """The coefficients of one sublayer and its input: `mhc_pre`."""

    _transom_original = hf.Glm5NextTextHyperConnection
    forward = instead_of(hf.Glm5NextTextHyperConnection)(hyper_connections.pre)


class Glm5NextTextDecoderLayer(hf.Glm5NextTextDecoderLayer):
    """A block whose two residual mixes are `mhc_post`."""

    _transom_original = hf.Glm5NextTextDecoderLayer

    @instead_of(hf.Glm5NextTextDecoderLayer)
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        prev_topk_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original: the streams [B, S, R, D] and a selection for the next layer, or None."""
        indices = None
        post, comb, collapsed = self.attn_hc(hidden_states)
        x = self.input_layernorm(collapsed)
        kwargs["attention_mask"] = attention_mask
        if self.block_type == "linear_attention":
            f = self.self_attn(hidden_states=x, cache_params=past_key_values, **kwargs)
        else:
            f, _, indices = self.self_attn(
                hidden_states=x,
                past_key_values=past_key_values,
                prev_topk_indices=prev_topk_indices,
                **kwargs,
            )
        hidden_states = hyper_connections.post(f, hidden_states, post, comb)
        post, comb, collapsed = self.ffn_hc(hidden_states)
        f = self.mlp(self.post_attention_layernorm(collapsed))
        return hyper_connections.post(f, hidden_states, post, comb), indices


def _hole(slots: Slots) -> str | None:
    """Why a call with these slots is not covered, or None."""
    valid = slots.valid
    if valid is None:
        return None
    if torch.compiler.is_compiling():
        return "padding can't be searched for holes while tracing; covered: no padding"
    runs = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0]
    if bool((runs > 1).any()):
        return "the tokens of a row are not one run; covered: padding on the left or the right"
    return None


FAMILY = Family(
    replacements=(
        dsa.attention(Glm5NextTextAttention, hf.Glm5NextTextIndexer),
        dsa.routing(Glm5NextTextTopkRouter),
        delta_rule.linear_attention(Glm5NextTextLinearAttention),
        Replacement(
            hf.Glm5NextTextHyperConnection,
            Glm5NextTextHyperConnection,
            "mhc_pre",
            passes_over=lambda module: ("input_norm",),
        ),
        Replacement(hf.Glm5NextTextDecoderLayer, Glm5NextTextDecoderLayer, "mhc_post"),
    ),
    base=hf.Glm5NextTextModel,
    attention=hf.Glm5NextTextAttention,
    mixes=False,
    recurrent=("linear_attention",),
    uncovered=_hole,
)
