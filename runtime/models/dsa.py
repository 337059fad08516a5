"""DeepSeek Sparse Attention of transformers through the operators, for DeepSeek-V3.2 and GLM-DSA.

Hugging Face expands every latent to keys and values of all heads, scores all of them and masks what
the indexer did not select. Here the up-projections move to the query and the output (the absorbed
form): the latent row of a token, 512 numbers and its 64 rotated ones, is key and value of all heads
at once, and only the selected rows are read.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import transom

from .padding import Slots
from .patching import Family, Replacement
from .untouched import ORIGINAL, attends_instead_of, instead_of

Rotate = Callable[..., tuple[Tensor, Tensor]]


def attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    slots: Slots,
    past_key_values: Any,
    indices: Tensor | None,
    rotate: Rotate,
    rotate_index: Rotate,
) -> tuple[Tensor, Tensor]:
    """The layer's output [B, S, hidden] and the slots indices[B, S, K] that it attended to.

    indices               those of an earlier layer; None: this layer's indexer selects
    rotate, rotate_index  the family's rotation of queries and keys, in attention and in the indexer
    """
    batch, queries = hidden_states.shape[:2]
    nope, rope, rank = self.qk_nope_head_dim, self.qk_rope_head_dim, self.kv_lora_rank
    cos, sin = position_embeddings

    q_residual = self.q_a_layernorm(self.q_a_proj(hidden_states))
    q = self.q_b_proj(q_residual).view(batch, queries, -1, self.qk_head_dim)
    q_pass, q_rope = q.split([nope, rope], dim=-1)
    latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([rank, rope], dim=-1)
    latent = self.kv_a_layernorm(latent).view(batch, 1, queries, rank)
    q_rope, k_rope = rotate(q_rope, k_rope.unsqueeze(2), cos, sin, unsqueeze_dim=2)
    k_rope = k_rope.transpose(1, 2)
    if past_key_values is not None:
        latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
    keys = torch.cat([latent, k_rope], dim=-1).squeeze(1)

    if indices is None:
        with torch.no_grad():
            indices = select(
                self.indexer,
                hidden_states,
                q_residual,
                position_embeddings,
                slots,
                past_key_values,
                rotate_index,
            )
    up = self.kv_b_proj.weight.view(-1, nope + self.v_head_dim, rank)
    q_latent = torch.einsum("bshn,hnr->bshr", q_pass, up[:, :nope])
    o = transom.sparse_attention(
        torch.cat([q_latent.to(q_rope.dtype), q_rope], dim=-1),
        keys,
        indices,
        scale=self.scaling,
        v_dim=rank,
    )
    o = torch.einsum("bshr,hvr->bshv", o, up[:, nope:])
    return self.o_proj(o.reshape(batch, queries, -1)), indices


def select(
    indexer: Any,
    hidden_states: Tensor,
    q_residual: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    slots: Slots,
    past_key_values: Any,
    rotate: Rotate,
) -> Tensor:
    """indices[B, S, K] of the slots that each query attends to, -1 after the last."""
    batch, queries = hidden_states.shape[:2]
    cos, sin = position_embeddings
    split = [indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim]
    q_rope, q_pass = (
        indexer.wq_b(q_residual).view(batch, queries, -1, indexer.head_dim).split(split, dim=-1)
    )
    k_rope, k_pass = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2).split(split, dim=-1)
    q_rope, k_rope = rotate(q_rope, k_rope, cos, sin, unsqueeze_dim=2)
    q = torch.cat([q_rope, q_pass], dim=-1)
    k = torch.cat([k_rope, k_pass], dim=-1).squeeze(2)
    if past_key_values is not None:
        k = past_key_values.update_indexer(k, indexer.layer_idx)
    project = indexer.weights_proj
    weights = project(hidden_states.to(project.weight.dtype)).float()
    weights = weights * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    top_k = min(indexer.index_topk, k.shape[1])
    if slots.valid is None:
        seen = torch.arange(slots.past + 1, slots.past + queries + 1, device=k.device).expand(
            batch, -1
        )
        return transom.lightning_indexer(q, k, weights, top_k, visible=seen)
    # Padding may stand anywhere: with the tokens' keys in front, what a query sees is a prefix
    # again.
    order, seen = slots.packed(k.device)
    packed = k.gather(1, order[..., None].expand(-1, -1, k.shape[2]))
    found = transom.lightning_indexer(q, packed, weights, top_k, visible=seen)
    slot = order.gather(1, found.clamp_min(0).flatten(1).long()).view_as(found)
    return torch.where(found < 0, -1, slot).to(torch.int32)


def route_groups(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The router's logits, weights and ids, as both families define them: sigmoid, bias, groups."""
    flat = hidden_states.view(-1, self.hidden_dim)
    logits = nn.functional.linear(flat.float(), self.weight.float())
    ids, weights = transom.route(
        logits,
        self.top_k,
        score="sigmoid",
        bias=self.e_score_correction_bias,
        groups=self.num_group,
        top_groups=self.topk_group,
        renormalize=self.norm_topk_prob,
        scale=self.routed_scaling_factor,
    )
    return logits, weights, ids.long()


# Families ----------------------------------------------------------------------------------------


@functools.cache
def family(name: str) -> Family:
    """The replacements of `deepseek_v32` or `glm_moe_dsa`: layers of GLM-DSA share selections."""
    hf: Any = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    prefix, shares = {"deepseek_v32": ("DeepseekV32", False), "glm_moe_dsa": ("GlmMoeDsa", True)}[
        name
    ]
    attention: type[nn.Module] = getattr(hf, f"{prefix}Attention")
    router: type[nn.Module] = getattr(hf, f"{prefix}TopkRouter")
    indexer: type[nn.Module] = getattr(hf, f"{prefix}Indexer")
    # The indexer of V3.2 rotates halves, its attention pairs; GLM-DSA pairs in both.
    pairs = hf.apply_rotary_pos_emb_interleave
    rotate_index = pairs if shares else hf.apply_rotary_pos_emb
    forward = (_attends_and_shares if shares else _attends)(attention, pairs, rotate_index)
    replacing = _replacing(attention, attends_instead_of(attention)(forward))
    routing = _replacing(router, instead_of(router)(route_groups))
    return Family(
        replacements=(
            Replacement(
                attention,
                replacing,
                operators,
                lambda module: refuse(module, indexer),
                lambda module: (
                    ("kv_b_proj",) if module.indexer is None else ("kv_b_proj", "indexer")
                ),
            ),
            Replacement(router, routing, lambda module: "route"),
        ),
        base=getattr(hf, f"{prefix}Model"),
        attention=attention,
        mixes=not shares,
    )


def _replacing(original: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass of the same name with this forward; pickle finds it as an attribute of this
    module."""
    own = {"forward": forward, "__module__": __name__, ORIGINAL: original}
    return type(original.__name__, (original,), own)


def __getattr__(name: str) -> Any:
    for known in ("deepseek_v32", "glm_moe_dsa"):
        for r in family(known).replacements if _camel(known) in name else ():
            if r.replacement.__name__ == name:
                return r.replacement
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _attends(
    attention: type[nn.Module], rotate: Rotate, rotate_index: Rotate
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Latent attention over the tokens that the indexer selects, and only those."""
        output, _ = attend(
            self,
            hidden_states,
            position_embeddings,
            slots,
            past_key_values,
            None,
            rotate,
            rotate_index,
        )
        return output, None

    return forward


def _attends_and_shares(
    attention: type[nn.Module], rotate: Rotate, rotate_index: Rotate
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        prev_topk_indices: Tensor | None = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Latent attention over the tokens that its own or an earlier layer's indexer selects; the
        indices that it hands on end in -1."""
        if self.indexer is None and prev_topk_indices is None:
            raise ValueError(
                f"{attention.__name__}: a layer without indexer got no indices; "
                "expected those of an earlier layer"
            )
        output, indices = attend(
            self,
            hidden_states,
            position_embeddings,
            slots,
            past_key_values,
            prev_topk_indices if self.indexer is None else None,
            rotate,
            rotate_index,
        )
        return output, None, indices

    return forward


def operators(module: Any) -> str:
    """What the report says of a replaced attention module."""
    latent = f"{module.kv_lora_rank} + {module.qk_rope_head_dim}"
    text = f"sparse_attention over selected latents of {latent}"
    if module.indexer is None:
        return f"{text}, selection of the layer before"
    return f"{text}, lightning_indexer (top {module.indexer.index_topk})"


def refuse(module: Any, indexer: type[nn.Module]) -> str | None:
    """Why the attention `module` with an indexer of class `indexer` can't be replaced, or None."""
    up = module.kv_b_proj
    if type(up) is not nn.Linear or type(up.weight) is not nn.Parameter or up.bias is not None:
        name = type(up).__name__
        return f"kv_b_proj is a {name}; the absorbed form reads the weight of a plain nn.Linear"
    if module.indexer is not None and type(module.indexer) is not indexer:
        return f"its indexer is a {type(module.indexer).__name__}; covered: {indexer.__name__}"
    chosen = module.config._attn_implementation
    if chosen not in ("eager", "sdpa", None):
        return f"the attention chosen is {chosen!r}; covered: eager, sdpa"
    return None
