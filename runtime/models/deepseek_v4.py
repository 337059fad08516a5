"""DeepSeek-V4 of transformers through the operators: attention, compressors, indexer, routing, mHC.

Attention can't come in through the attention registry: there a selection of entries arrives as a
dense mask over all of them. So the module's forward is replaced; its projections, norms, rotations
and caches stay Hugging Face's own, in their layout, and a sequence can go on with or without the
patch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

import transom
from transom.kernels.attention.compress_kv import CompressState

from . import hyper_connections
from .linear import ends, narrow, product, slow_here
from .padding import Slots
from .patching import Family, Replacement
from .untouched import attends_instead_of, instead_of

_SCORES = {"SqrtSoftplusActivation": "sqrtsoftplus", "Sigmoid": "sigmoid"}


class DeepseekV4Attention(hf.DeepseekV4Attention):
    """Window, HCA or CSA attention as one `sparse_attention` over entries, window and sink."""

    _transom_original = hf.DeepseekV4Attention

    @attends_instead_of(hf.DeepseekV4Attention)
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original."""
        batch, queries = hidden_states.shape[:2]
        cos, sin = position_embeddings[self.rope_layer_type]
        turn = _Rotation(cos, sin, slots.kept)
        q_residual = self.q_a_norm(self.q_a_proj(hidden_states))
        q = self.q_b_norm(self.q_b_proj(q_residual).view(batch, queries, -1, self.head_dim))
        q = turn(q, 2)
        kv = self.kv_norm(self.kv_proj(hidden_states)).view(batch, 1, queries, self.head_dim)
        kv = turn(kv, 1)
        if past_key_values is not None:
            kv = past_key_values.update(kv, kv, self.layer_idx)[0]
        local = kv.squeeze(1)

        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        entries, indices, visible = local[:, :0], None, None
        if self.compressor is not None:
            entries = _entries(self.compressor, "compressor", hidden_states, layer)
            count = (position_ids + 1) // self.compressor.compress_rate
            count = count.clamp(0, entries.shape[1]).expand(batch, queries)
            if self.layer_type == "compressed_sparse_attention":
                with torch.no_grad():  # what is selected is an index; no gradient passes
                    indices = _select(
                        self.compressor.indexer,
                        hidden_states,
                        q_residual,
                        position_ids,
                        layer,
                        count,
                    )
            elif queries > 1:  # a single query sees every entry that there is, as in the original
                visible = count
        o: Any = transom.sparse_attention(
            q,
            entries.to(q.dtype),
            indices,
            visible=visible,
            local_kv=local,
            window=self.sliding_window,
            sink=hyper_connections.as_or_wide(self.sinks, q),
            scale=self.scaling,
            local_valid=slots.last(local.shape[1], local.device),
        )
        # Values were rotated with their keys: turned back at the query's position.
        o = turn(o, 2, back=True)
        grouped = o.reshape(batch, queries, self.config.o_groups, -1)
        return self.o_b_proj(self.o_a_proj(grouped).flatten(2)), None


_COMPLEX = ("cpu", "cuda")
"""Devices of which torch's own kernels take complex numbers; others need not have any."""


class _Rotation:
    """Rotary embedding on complex numbers: a third of the operations of Hugging Face's.

    Where a gradient may pass or the call is traced, on other devices, and for dims that make no
    pairs, it is theirs.
    """

    def __init__(self, cos: Tensor, sin: Tensor, kept: dict[Any, Any]) -> None:
        self.cos, self.sin, self.kept = cos, sin, kept

    def __call__(self, x: Tensor, dim: int, *, back: bool = False) -> Tensor:
        """x turned by the angles, which lack its `dim`, or back."""
        cos, sin = self.cos, self.sin
        width = 2 * cos.shape[-1]
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        plain |= x.device.type not in _COMPLEX
        if plain or x.shape[-1] % 2 or not x.is_contiguous():
            return hf.apply_rotary_pos_emb(x, cos, -sin if back else sin, unsqueeze_dim=dim)
        key = id(cos), dim, back
        _, turns = self.kept.get(key, (None, None))
        if turns is None:
            turns = torch.complex(cos.float(), -sin.float() if back else sin.float())
            turns = turns.unsqueeze(dim)
            self.kept[key] = cos, turns  # while cos is held, no other tensor has its id
        x = x.clone()  # a hook may have kept what came in
        tail = x[..., -width:]
        pairs = torch.view_as_complex(tail.float().unflatten(-1, (-1, 2)))
        tail.copy_(torch.view_as_real(pairs * turns).flatten(-2))
        return x


class DeepseekV4GroupedLinear(hf.DeepseekV4GroupedLinear):
    """The first half of the output projection: a matrix for each group of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """As the original: [..., groups, K] -> [..., groups, N]."""
        if not narrow(x, self.weight):
            return super().forward(x)
        groups, dim = x.shape[-2:]
        rows = x.reshape(-1, groups, dim).transpose(0, 1)
        weight = self.weight.view(groups, -1, dim)
        y = transom.grouped_gemm(rows.reshape(-1, dim), weight, ends(groups, rows.shape[1]))
        return y.view(groups, rows.shape[1], -1).transpose(0, 1).reshape(*x.shape[:-1], -1)


def _entries(part: Any, name: str, hidden_states: Tensor, layer: Any) -> Tensor:
    """entries[B, N, D] of the compressor or indexer `part`, with those in the cache `layer`."""
    m, dim = part.compress_rate, part.head_dim
    overlap = not isinstance(part, hf.DeepseekV4HCACompressor)
    kv, gate, first = part.kv_proj(hidden_states), part.gate_proj(hidden_states), 0
    if layer is not None:
        kv, gate, first = layer.store_compression_weights(name, kv, gate)
    if kv.shape[1] < m:
        entries = kv.new_zeros(kv.shape[0], 0, dim)
    else:
        state = None
        if overlap and layer is not None:
            block = kv[:, -m:][:, None], (gate[:, -m:] + part.position_bias)[:, None]
            state = _previous_block(*layer.update_overlap_state(name, *block, dim))
        entries, _ = transom.compress_kv(kv, gate, part.position_bias, overlap=overlap, state=state)
        entries = part.kv_norm(entries)
        positions = torch.arange(entries.shape[1], device=entries.device) * m + first
        positions = positions.unsqueeze(0).expand(entries.shape[0], -1)
        cos, sin = part.rotary_emb(entries, position_ids=positions, layer_type=part.rope_layer_type)
        entries = hf.apply_rotary_pos_emb(entries.unsqueeze(1), cos, sin).squeeze(1)
    return entries if layer is None else layer.update_compressor_states(name, entries)


def _previous_block(kv: Tensor | None, gate: Tensor | None) -> CompressState | None:
    """compress_kv's state before a whole block, from the half of its channels in the cache."""
    if kv is None or gate is None:
        return None
    wide = torch.promote_types(kv.dtype, torch.float32)
    m, dim = kv.shape[1:]
    # The second half of the previous block's channels is never read again; the m rows after it are
    # not filled yet.
    return CompressState(
        nn.functional.pad(kv.to(wide), (0, dim, 0, m)),
        nn.functional.pad(gate.to(wide), (0, dim, 0, m), value=-torch.inf),
        position=0,
    )


def _select(
    indexer: Any,
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    layer: Any,
    count: Tensor,
) -> Tensor | None:
    """indices[B, S, K]: the best of each query's first count[B, S] entries; None without any."""
    keys = _entries(indexer, "indexer", hidden_states, layer)
    if not keys.shape[1]:
        return None
    batch, queries = hidden_states.shape[:2]
    cos, sin = indexer.rotary_emb(
        hidden_states, position_ids=position_ids, layer_type=indexer.rope_layer_type
    )
    q = indexer.q_b_proj(q_residual).view(batch, queries, -1, indexer.head_dim)
    q = _Rotation(cos, sin, {})(q, 2)
    scorer = indexer.scorer
    weights = scorer.weights_proj(hidden_states).float() * (
        scorer.weights_scaling * scorer.softmax_scale
    )
    top_k = min(indexer.index_topk, keys.shape[1])
    return transom.lightning_indexer(q, keys.to(q.dtype), weights, top_k, visible=count)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """The products of a router: [..., D] -> [B * S, E]."""
    x = x.reshape(-1, x.shape[-1])
    fast = narrow(x, weight) and slow_here()
    return product(x, weight) if fast else nn.functional.linear(x, weight)


class DeepseekV4TopKRouter(hf.DeepseekV4TopKRouter):
    """Top-k routing: `route` on the logits of the learned gate."""

    _transom_original = hf.DeepseekV4TopKRouter

    @instead_of(hf.DeepseekV4TopKRouter)
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the original: logits, weights, ids."""
        logits = _logits(hidden_states, self.weight)
        ids, weights = transom.route(
            logits,
            self.top_k,
            score=_SCORES[type(self.score_fn).__name__],
            bias=self.e_score_correction_bias,
            scale=self.routed_scaling_factor,
        )
        return logits, weights.to(logits.dtype), ids.long()


class DeepseekV4HashRouter(hf.DeepseekV4HashRouter):
    """Hash routing: `route` with the ids of the token's row in the table."""

    _transom_original = hf.DeepseekV4HashRouter

    @instead_of(hf.DeepseekV4HashRouter)
    def forward(self, hidden_states: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the original: logits, weights, ids."""
        logits = _logits(hidden_states, self.weight)
        preset = self.tid2eid[input_ids.reshape(-1)].long()
        ids, weights = transom.route(
            logits,
            self.top_k,
            score=_SCORES[type(self.score_fn).__name__],
            scale=self.routed_scaling_factor,
            preset=preset,
        )
        return logits, weights.to(logits.dtype), ids.long()


class DeepseekV4HyperConnection(hf.DeepseekV4HyperConnection):
    """The coefficients of one sublayer and its input: `mhc_pre`."""

    _transom_original = hf.DeepseekV4HyperConnection

    @instead_of(hf.DeepseekV4HyperConnection)
    def forward(self, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the original: post[B, S, R], comb[B, S, R, R] and the collapsed input [B, S, D]."""
        return hyper_connections.pre(self, hidden_streams)


class DeepseekV4HyperHead(hf.DeepseekV4HyperHead):
    """The last collapse of the streams: `mhc_head`."""

    _transom_original = hf.DeepseekV4HyperHead

    @instead_of(hf.DeepseekV4HyperHead)
    def forward(self, x: Tensor) -> Tensor:
        """As the original: [B, S, R, D] -> [B, S, D]."""
        coefficients = (
            hyper_connections.as_or_wide(p, x) for p in (self.hc_fn, self.hc_scale, self.hc_base)
        )
        return transom.mhc_head(x, *coefficients, eps=self.eps, rms_eps=self.input_norm.eps)


class DeepseekV4DecoderLayer(hf.DeepseekV4DecoderLayer):
    """A block whose two residual mixes are `mhc_post`."""

    _transom_original = hf.DeepseekV4DecoderLayer

    @instead_of(hf.DeepseekV4DecoderLayer)
    def forward(
        self, hidden_states: Tensor, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """As the original: [B, S, R, D] -> [B, S, D] streams of the same shape."""
        post, comb, collapsed = self.attn_hc(hidden_states)
        f, _ = self.self_attn(self.input_layernorm(collapsed), **kwargs)
        hidden_states = hyper_connections.post(f, hidden_states, post, comb)
        post, comb, collapsed = self.ffn_hc(hidden_states)
        f = self.mlp(self.post_attention_layernorm(collapsed), input_ids=input_ids)
        return hyper_connections.post(f, hidden_states, post, comb)


def _attention_operators(module: Any) -> str:
    window = f"sparse_attention over a window of {module.sliding_window}"
    if module.layer_type == "sliding_attention":
        return window
    m = module.compressor.compress_rate
    if module.layer_type == "heavily_compressed_attention":
        return f"{window} and all entries of {m} tokens (HCA), compress_kv"
    top = module.compressor.indexer.index_topk
    return f"{window} and {top} entries of {m} tokens (CSA), compress_kv, lightning_indexer"


def _parts_of_attention(module: Any) -> tuple[str, ...]:
    if module.compressor is None:
        return ()
    if not hasattr(module.compressor, "indexer"):
        return ("compressor",)
    return "compressor", "compressor.indexer", "compressor.indexer.scorer"


def _refuse_attention(module: Any) -> str | None:
    known = {
        "sliding_attention": type(None),
        "heavily_compressed_attention": hf.DeepseekV4HCACompressor,
        "compressed_sparse_attention": hf.DeepseekV4CSACompressor,
    }
    if module.layer_type not in known:
        return f"layer type is {module.layer_type!r}; covered: {', '.join(known)}"
    if type(module.compressor) is not known[module.layer_type]:
        return (
            f"its compressor is a {type(module.compressor).__name__}; covered: {hf.__name__}'s own"
        )
    if module.compressor is not None and hasattr(module.compressor, "indexer"):
        if type(module.compressor.indexer) is not hf.DeepseekV4Indexer:
            name = type(module.compressor.indexer).__name__
            return f"its indexer is a {name}; covered: {hf.__name__}'s own"
    chosen = module.config._attn_implementation
    if chosen not in ("eager", None):
        return f"the attention chosen is {chosen!r}; covered: eager"
    return None


def _refuse_router(module: Any) -> str | None:
    score = type(module.score_fn).__name__
    if score not in _SCORES:
        return f"its scoring function is {score}; covered: sqrtsoftplus, sigmoid"
    if type(module.score_fn) not in (type(ACT2FN["sqrtsoftplus"]), nn.Sigmoid):
        return (
            f"its scoring function is a {score} of another library; covered: sqrtsoftplus, sigmoid"
        )
    return None


FAMILY = Family(
    replacements=(
        Replacement(
            hf.DeepseekV4Attention,
            DeepseekV4Attention,
            _attention_operators,
            _refuse_attention,
            _parts_of_attention,
        ),
        Replacement(
            hf.DeepseekV4TopKRouter,
            DeepseekV4TopKRouter,
            "route",
            _refuse_router,
            lambda module: ("score_fn",),
        ),
        Replacement(
            hf.DeepseekV4HashRouter,
            DeepseekV4HashRouter,
            "route (ids from the table)",
            _refuse_router,
            lambda module: ("score_fn",),
        ),
        Replacement(
            hf.DeepseekV4HyperConnection,
            DeepseekV4HyperConnection,
            "mhc_pre",
            passes_over=lambda module: ("input_norm",),
        ),
        Replacement(
            hf.DeepseekV4HyperHead,
            DeepseekV4HyperHead,
            "mhc_head",
            passes_over=lambda module: ("input_norm",),
        ),
        Replacement(hf.DeepseekV4DecoderLayer, DeepseekV4DecoderLayer, "mhc_post"),
    ),
    base=hf.DeepseekV4Model,
    attention=hf.DeepseekV4Attention,
    mixes=True,
)
