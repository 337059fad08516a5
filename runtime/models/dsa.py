"""Latent attention over selected tokens (DeepSeek Sparse Attention), of the families that have it.

Hugging Face expands every latent to keys and values of all heads, scores all of them and masks what
the indexer did not select. Here the up-projections move to the query and the output (the absorbed
form): the latent row of a token, r numbers and its dr rotated ones, is key and value of all heads
at once, and only the selected rows are read.

    z = RMS(W_qa x), [qn, qr] = W_qb z;  [c, kr] = W_kva x, c = RMS(c);  qr, kr rotated
    o[h] = V_h sum_j softmax_j(scale * ((U_h^T qn[h]) . c[j] + qr[h] . kr[j])) c[j],  [U, V] = W_kvb

over the tokens j that are largest in sum_h w[h] relu(u[h] . k[j]), the indexer's scores. A family's
own module says where its query, latents, indexer and output differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import transom

from .padding import Slots
from .patching import Replacement
from .untouched import ORIGINAL

Rotate = Callable[..., tuple[Tensor, Tensor]]


class Call(NamedTuple):
    """What a layer is called with beside its hidden states."""

    angles: tuple[Tensor, ...]
    """cos and sin of the tokens' positions; empty where nothing is rotated."""
    slots: Slots
    cache: Any
    """transformers' own, or None."""


def low_rank_query(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """z[B, S, rank], which the indexer takes too, and the query[B, S, H, dn + dr] made of it."""
    z = self.q_a_layernorm(self.q_a_proj(hidden_states))
    return z, heads(self.q_b_proj(z), self.qk_head_dim)


def heads(x: Tensor, dim: int) -> Tensor:
    """[B, S, H * dim] -> [B, S, H, dim]."""
    return x.unflatten(-1, (-1, dim))


def latents(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens' latents [B, S, 1, r], normed, and the parts [B, S, 1, dr] to be rotated."""
    both = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(2)
    latent, k = both.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
    return self.kv_a_layernorm(latent), k


def rotated(
    self: Any, q: Tensor, latent: Tensor, k: Tensor, rotate: Rotate, call: Call
) -> tuple[Tensor, Tensor]:
    """q[B, S, H, dn + dr] with its last part rotated, and keys[B, N, r + dr]: latents beside
    rotated parts, those in the cache first.

    The cache holds them as transformers does: [B, 1, N, .] each.
    """
    q_pass, q_turned = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
    q_turned, k_turned = rotate(q_turned, k, *call.angles, unsqueeze_dim=2)
    q = torch.cat([q_pass, q_turned.to(q.dtype)], dim=-1)
    latent, k = latent.transpose(1, 2), k_turned.to(k.dtype).transpose(1, 2)
    if call.cache is not None:
        latent, k = call.cache.update(latent, k, self.layer_idx)
    return q, torch.cat([latent, k], dim=-1).squeeze(1)


def attend(
    self: Any, q: Tensor, keys: Tensor, indices: Tensor, sink: Tensor | None = None
) -> Tensor:
    """o[B, S, H, dv] of q[B, S, H, dn + dr] over the rows indices[B, S, K] of keys[B, N, r + dr].

    indices  -1 after the last
    sink     [H] of logits that take part in the softmax and have no value
    """
    return _absorbed(self, q, keys, indices, sink=sink)


def attend_window(self: Any, q: Tensor, keys: Tensor, window: int, slots: Slots) -> Tensor:
    """As attend(), over the last `window` rows up to the query's own that hold a token."""
    count = keys.shape[1]
    valid = slots.last(count, keys.device)
    return _absorbed(
        self, q, keys[:, :0], None, local_kv=keys, window=min(window, count), local_valid=valid
    )


def _absorbed(self: Any, q: Tensor, keys: Tensor, indices: Tensor | None, **more: Any) -> Tensor:
    nope, rank = self.qk_nope_head_dim, self.kv_lora_rank
    up = self.kv_b_proj.weight.view(-1, nope + self.v_head_dim, rank)
    q_pass, q_turned = q.split([nope, self.qk_rope_head_dim], dim=-1)
    q_latent = torch.einsum("bshn,hnr->bshr", q_pass, up[:, :nope]).to(q.dtype)
    q = torch.cat([q_latent, q_turned], dim=-1)
    o: Any = transom.sparse_attention(q, keys, indices, scale=self.scaling, v_dim=rank, **more)
    return torch.einsum("bshr,hvr->bshv", o, up[:, nope:])


def given(self: Any, indices: Tensor | None) -> Tensor:
    """The indices of an earlier layer, which a layer without indexer attends to."""
    if indices is None:
        raise ValueError(
            f"{type(self).__name__}: a layer without indexer got no indices; "
            "expected those of an earlier layer"
        )
    return indices


@torch.no_grad()
def select(indexer: Any, hidden_states: Tensor, z: Tensor, rotate: Rotate, call: Call) -> Tensor:
    """indices[B, S, K] of the slots that each query attends to, -1 after the last.

    As most families have it: the query of z, a normed key, and the first dims rotated.
    """
    q = heads(indexer.wq_b(z), indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)
    return best(indexer, hidden_states, *turned(indexer, q, k, rotate, call), call)


def turned(indexer: Any, q: Tensor, k: Tensor, rotate: Rotate, call: Call) -> tuple[Tensor, Tensor]:
    """The indexer's q[B, S, H, D] and k[B, S, 1, D], their first dims rotated."""
    width = indexer.qk_rope_head_dim
    q_turned, k_turned = rotate(q[..., :width], k[..., :width], *call.angles, unsqueeze_dim=2)
    return (
        torch.cat([q_turned, q[..., width:]], dim=-1),
        torch.cat([k_turned, k[..., width:]], dim=-1),
    )


def best(indexer: Any, hidden_states: Tensor, q: Tensor, k: Tensor, call: Call) -> Tensor:
    """indices[B, S, K] of the slots with the best scores of q[B, S, H, D] with k[B, S, 1, D] and
    the keys in the cache, among those up to the query's own that hold a token."""
    batch, queries = hidden_states.shape[:2]
    slots, k = call.slots, k.squeeze(2)
    if call.cache is not None:
        k = call.cache.update_indexer(k, indexer.layer_idx)
    weights = head_weights(indexer, hidden_states)
    top_k = min(indexer.index_topk, k.shape[1])
    if slots.valid is None:
        seen = torch.arange(slots.past + 1, slots.past + queries + 1, device=k.device)
        return transom.lightning_indexer(q, k, weights, top_k, visible=seen.expand(batch, -1))
    # Padding may stand anywhere: with the tokens' keys in front, what a query sees is a prefix
    # again.
    order, seen = slots.packed(k.device)
    packed = k.gather(1, order[..., None].expand(-1, -1, k.shape[2]))
    return slots.unpacked(transom.lightning_indexer(q, packed, weights, top_k, visible=seen))


def head_weights(indexer: Any, hidden_states: Tensor) -> Tensor:
    """The weights [B, S, H] of an indexer's heads, in float32."""
    project = indexer.weights_proj
    weights = project(hidden_states.to(project.weight.dtype)).float()
    return weights * (indexer.n_heads**-0.5 * indexer.softmax_scale)


def unrotated(q: Tensor, k: Any, *angles: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Any]:
    """The rotation of a layer that has none."""
    return q, k


def route_groups(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A router's logits, weights and ids: sigmoid, a bias that only chooses, and groups."""
    logits = router_logits(self, hidden_states)
    ids, weights = transom.route(
        logits,
        self.top_k,
        score="sigmoid",
        bias=self.e_score_correction_bias,
        groups=self.num_group or 1,
        top_groups=self.topk_group or 1,
        renormalize=self.norm_topk_prob,
        scale=self.routed_scaling_factor,
    )
    return logits, weights, ids.long()


def route_softmax(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A router's logits, weights and ids: softmax, its product in the weight's dtype."""
    logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    ids, weights = transom.route(
        logits,
        self.top_k,
        score="softmax",
        renormalize=getattr(self, "norm_topk_prob", True),  # Qwen3.5 always does
    )
    return logits, weights.to(logits.dtype), ids.long()


def router_logits(self: Any, hidden_states: Tensor) -> Tensor:
    """[B * S, E], the product taken in float32."""
    flat = hidden_states.view(-1, self.hidden_dim)
    return nn.functional.linear(flat.float(), self.weight.float())


def routing(router: type[nn.Module]) -> Replacement:
    """The replacement of a router by `router`, a subclass of it."""
    return Replacement(vars(router)[ORIGINAL], router, "route")


def attention(
    replacing: type[nn.Module],
    indexer: type[nn.Module],
    chosen: tuple[str, ...] = ("eager", "sdpa"),
) -> Replacement:
    """The replacement of an attention by its subclass `replacing`.

    indexer  the class that its indexers must be of
    chosen   the attention implementations of transformers that it stands in for
    """
    return Replacement(
        vars(replacing)[ORIGINAL],
        replacing,
        _operators,
        lambda module: _refuse(module, indexer, chosen),
        lambda module: ("kv_b_proj",) if module.indexer is None else ("kv_b_proj", "indexer"),
    )


def _operators(module: Any) -> str:
    latent = f"{module.kv_lora_rank} + {module.qk_rope_head_dim}"
    window = getattr(module, "sliding_window", None)
    if module.indexer is not None:
        return (
            f"sparse_attention over selected latents of {latent}, "
            f"lightning_indexer (top {module.indexer.index_topk})"
        )
    if getattr(module, "skip_topk", False):
        return f"sparse_attention over selected latents of {latent}, selection of the layer before"
    if window is not None:
        return f"sparse_attention over a window of {window} latents of {latent}"
    return f"sparse_attention over all latents of {latent}"


def _refuse(module: Any, indexer: type[nn.Module], chosen: tuple[str, ...]) -> str | None:
    """Why this attention can't be replaced, or None."""
    up = module.kv_b_proj
    if type(up) is not nn.Linear or type(up.weight) is not nn.Parameter or up.bias is not None:
        name = type(up).__name__
        return f"kv_b_proj is a {name}; the absorbed form reads the weight of a plain nn.Linear"
    if module.indexer is not None and type(module.indexer) is not indexer:
        return f"its indexer is a {type(module.indexer).__name__}; covered: {indexer.__name__}"
    seen = module.config._attn_implementation
    if seen not in (*chosen, None):
        return f"the attention chosen is {seen!r}; covered: {', '.join(chosen)}"
    return None
