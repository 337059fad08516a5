"""SparseAttention beside the eager layers of transformers, with the same weights."""

from __future__ import annotations

import pytest
import torch

from transom.nn.attention import IndexShape, LatentShape, SharedShape, SparseAttention
from transom.nn.rotary import Rotary, Yarn

pytest.importorskip("transformers", minversion="5.23")

HIDDEN = 48
# Sixteen indexer heads: scores of exactly 0, whose ties transformers breaks as it likes, are rare.
INDEX = IndexShape(heads=16, dim=16, top_k=4)


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The state with every key's longest known prefix replaced."""
    out = {}
    for key, value in state.items():
        prefix = max((n for n in names if key == n or key.startswith(n + ".")), key=len)
        out[names[prefix] + key[len(prefix) :]] = value
    return out


COMPRESSOR = {"kv_proj": "wkv", "gate_proj": "wgate", "position_bias": "position_bias"}
V4 = {
    "q_a_proj": "wq_a",
    "q_a_norm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_proj": "wkv",
    "kv_norm": "kv_norm",
    "o_a_proj": "wo_a",
    "o_b_proj": "wo_b",
    "sinks": "sink",
    **{f"compressor.{a}": f"compressor.{b}" for a, b in COMPRESSOR.items()},
    "compressor.kv_norm": "compressor.norm",
    **{f"compressor.indexer.{a}": f"index_keys.{b}" for a, b in COMPRESSOR.items()},
    "compressor.indexer.kv_norm": "index_keys.norm",
    "compressor.indexer.q_b_proj": "indexer.wq",
    "compressor.indexer.scorer.weights_proj": "indexer.wproj",
}
V32 = {
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "indexer.wq_b": "indexer.wq",
    "indexer.weights_proj": "indexer.wproj",
    "indexer.wk": "index_keys.wk",
    "indexer.k_norm": "index_keys.norm",
}


def causal(tokens: int, window: int) -> torch.Tensor:
    i = torch.arange(tokens)
    seen = (i[:, None] >= i) & (i[:, None] - i < window)
    return torch.where(seen, 0.0, -torch.inf).expand(2, 1, -1, -1)


def randomised(module: torch.nn.Module, scale: float) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return module.float()


@pytest.mark.parametrize("place", range(3), ids=["window", "csa", "hca"])
@pytest.mark.parametrize("tokens", [3, 4, 8, 30])
@torch.no_grad()
def test_v4_layers(place: int, tokens: int) -> None:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as model

    yarn = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}
    yarn |= {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0}
    config = DeepseekV4Config(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=16,
        sliding_window=7,
        index_n_heads=INDEX.heads,
        index_head_dim=INDEX.dim,
        index_topk=INDEX.top_k,
        num_hidden_layers=3,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        max_position_embeddings=1024,
        partial_rotary_factor=0.25,
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            "compress": {"rope_theta": 1.6e5, "partial_rotary_factor": 0.25, **yarn},
        },
    )
    config._attn_implementation = "eager"
    theirs = randomised(model.DeepseekV4Attention(config, place), 0.3)
    shape = SharedShape(HIDDEN, 4, 32, 24, 2, 16, 7, config.rms_norm_eps)
    main = Rotary(8, 1e4, "interleaved", "last")
    compress = Rotary(8, 1.6e5, "interleaved", "last", Yarn(16.0, 64, 32.0, 1.0))
    ours = (
        SparseAttention.window(shape, main),
        SparseAttention.csa(shape, compress, ratio=4, index=INDEX),
        SparseAttention.hca(shape, compress, ratio=8),
    )[place]
    ours.load_state_dict(renamed(theirs.state_dict(), V4))
    x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    positions = torch.arange(tokens).expand(2, -1)
    rotary = model.DeepseekV4RotaryEmbedding(config)
    embeddings = {kind: rotary(x, positions, layer_type=kind) for kind in ("main", "compress")}
    want, _ = theirs(x, embeddings, positions, causal(tokens, 7), None)
    assert (ours(x).output - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("tokens", [3, 4, 5, 30])
@torch.no_grad()
def test_edge_47_v32_layers_with_their_future_picks_masked_again(tokens: int) -> None:
    from transformers import DeepseekV32Config
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as model

    config = DeepseekV32Config(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        index_n_heads=INDEX.heads,
        index_head_dim=INDEX.dim,
        index_topk=INDEX.top_k,
        num_hidden_layers=1,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    config._attn_implementation = "eager"
    theirs = randomised(model.DeepseekV32Attention(config, 0), 0.3)
    shape = LatentShape(HIDDEN, 4, 24, 16, 12, 8, 10, 1e-6)
    ours = SparseAttention.dsa(
        shape,
        Rotary(8, 1e4, "interleaved", "last"),
        index=INDEX,
        index_rotary=Rotary(8, 1e4, "half", "first"),
    )
    ours.load_state_dict(renamed(theirs.state_dict(), V32))
    x = torch.randn(2, tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    positions = torch.arange(tokens).expand(2, -1)
    embeddings = model.DeepseekV32RotaryEmbedding(config)(x, positions)
    want, _ = theirs(x, embeddings, causal(tokens, tokens), None, positions)
    assert (ours(x).output - want).abs().max() <= 1e-5 * want.abs().max()
