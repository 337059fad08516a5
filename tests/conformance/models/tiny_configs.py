"""Configurations, one per family of transformers, small enough for tests, with every kind of layer
that the family has: windows, blocks, ratios and top-k that 40 tokens all cross.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def tiny_config(family: str, **changes: object) -> PretrainedConfig:
    """The configuration of `family` with `changes`; of models with a vision part, to the text's."""
    if family not in _MAKE:
        raise ValueError(f"tiny_config: family is {family!r}; known: {', '.join(FAMILIES)}")
    return _MAKE[family](changes)


def _deepseek_v4(changes: dict[str, object]) -> PretrainedConfig:
    from transformers import DeepseekV4Config

    csa, hca = "compressed_sparse_attention", "heavily_compressed_attention"
    return DeepseekV4Config(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "q_lora_rank": 24,
            "num_experts_per_tok": 2,
            "n_routed_experts": 6,
            "layer_types": ["sliding_attention", csa, hca, csa],
            "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
            "compress_rates": {csa: 4, hca: 8},
            "sliding_window": 6,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 16,
            "index_head_dim": 16,
            "index_topk": 3,
            "hc_sinkhorn_iters": 5,
            "swiglu_limit": 1.5,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": None,
            **changes,
        }
    )


def _dsa(changes: dict[str, object]) -> dict[str, object]:
    return {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 24,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "index_topk": 7,
        "index_head_dim": 16,
        "index_n_heads": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
        **changes,
    }


def _deepseek_v32(changes: dict[str, object]) -> PretrainedConfig:
    from transformers import DeepseekV32Config

    return DeepseekV32Config(**_dsa({"n_group": 4, "topk_group": 2, **changes}))


def _glm_moe_dsa(changes: dict[str, object]) -> PretrainedConfig:
    from transformers import GlmMoeDsaConfig

    return GlmMoeDsaConfig(**_dsa({"indexer_types": ["full", "shared", "full"], **changes}))


def _axk2(changes: dict[str, object]) -> PretrainedConfig:
    from transformers.models.axk2 import AXK2Config

    return AXK2Config(**_dsa({"n_group": 4, "topk_group": 2, "gated_norm_rank": 6, **changes}))


def _dots3_note(changes: dict[str, object]) -> PretrainedConfig:
    from transformers.models.dots3_note import Dots3NoteTextConfig

    indexed, window, full = "indexed_attention", "sliding_attention", "full_attention"
    own = {
        "num_hidden_layers": 4,
        "head_dim": 20,
        "sliding_window": 6,
        "shared_experts_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "layer_types": [indexed, window, full, indexed],
        "use_dsa": None,  # else every full layer becomes an indexed one
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 20,
        "swa_kv_lora_rank": 28,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 12,
    }
    return Dots3NoteTextConfig(**_dsa({**own, **changes}))


def _hy_v4(changes: dict[str, object]) -> PretrainedConfig:
    from transformers.models.hy_v4 import HYV4Config

    own = {
        "num_hidden_layers": 4,
        "indexer_types": ["full", "full", "shared", "shared"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "swiglu_limit": 1.5,
        "hc_mult": 4,
    }
    return HYV4Config(**_dsa({**own, **changes}))


def _mistral_large4(changes: dict[str, object]) -> PretrainedConfig:
    from transformers.models.mistral_large4 import MistralLarge4Config, MistralLarge4TextConfig

    full, shared = "full", "shared"
    own = {
        "num_hidden_layers": 6,
        "qk_nope_head_dim": 8,
        "n_group": 4,
        "topk_group": 2,
        "no_rope_layers": [1, 1, 0, 0, 1, 1],
        "kv_source_layers": [0, 1, 2, 2, 1, 1],
        "indexer_types": [full, full, full, shared, full, shared],
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 16,
    }
    text = MistralLarge4TextConfig(**_dsa({**own, **changes}))
    return MistralLarge4Config(text_config=text, vision_config=vision)


def _glm5_next(changes: dict[str, object]) -> PretrainedConfig:
    from transformers.models.glm5_next import Glm5NextConfig

    linear, indexed = "linear_attention", "indexed_attention"
    text = {
        "num_hidden_layers": 4,
        "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 16,
        "q_lora_rank": 24,
        "index_topk": 12,
        "index_kpool": 4,
        "layer_types": [linear, indexed, indexed, linear],
        "indexer_types": ["full", "full", "shared", "full"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 5,
        "swiglu_limit": 1.5,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "out_hidden_size": 32,
        "intermediate_size": 24,
        "projection_intermediate_size": 24,
    }
    kinds = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    ids = {f"{kind}_token_id": 90 + i for i, kind in enumerate(kinds)}
    return Glm5NextConfig(text_config=_dsa({**text, **changes}), vision_config=vision, **ids)


def _qwen4_exp(changes: dict[str, object]) -> PretrainedConfig:
    from transformers.models.qwen4_exp import Qwen4ExpTextConfig

    linear, indexed = "linear_attention", "indexed_attention"
    own = {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "layer_types": [linear, indexed, linear, indexed],
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "hc_count": 4,
        "hc_lowrank": 6,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 50,
        "heads_per_ngram": 4,
        "make_ngram_vocab_size_divisible_by": 16,
        "split_ngram_parts": 2,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 12,
        "indexer_compress_ratio": 4,
        "eos_token_id": 2,
    }
    return Qwen4ExpTextConfig(**_decoder({**own, **changes}))


_DELTA_NET = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


def _qwen3_next(changes: dict[str, object]) -> PretrainedConfig:
    from transformers import Qwen3NextConfig

    return Qwen3NextConfig(**_decoder({**_DELTA_NET, "norm_topk_prob": True, **changes}))


def _qwen3_5_moe(changes: dict[str, object]) -> PretrainedConfig:
    from transformers import Qwen3_5MoeTextConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    own = {"rope_parameters": {**rope, "mrope_section": [1, 1, 0], "mrope_interleaved": True}}
    return Qwen3_5MoeTextConfig(**_decoder({**_DELTA_NET, **own, **changes}))


def _kimi_linear(changes: dict[str, object]) -> PretrainedConfig:
    from transformers.models.kimi_linear import KimiLinearConfig

    own = {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "kv_lora_rank": 24,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
    }
    return KimiLinearConfig(**_decoder({**own, **changes}))


def _decoder(changes: dict[str, object]) -> dict[str, object]:
    return {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
        **changes,
    }


def _qwen3_moe(changes: dict[str, object]) -> PretrainedConfig:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_decoder(
            {"moe_intermediate_size": 24, "num_experts": 8, "norm_topk_prob": True, **changes}
        )
    )


def _gpt_oss(changes: dict[str, object]) -> PretrainedConfig:
    from transformers import GptOssConfig

    return GptOssConfig(
        **_decoder({"num_local_experts": 6, "sliding_window": 6, "swiglu_limit": 1.5, **changes})
    )


def _mixtral(changes: dict[str, object]) -> PretrainedConfig:
    from transformers import MixtralConfig

    return MixtralConfig(**_decoder({"num_local_experts": 6, **changes}))


_MAKE: dict[str, Callable[[dict[str, object]], PretrainedConfig]] = {
    "deepseek_v4": _deepseek_v4,
    "deepseek_v32": _deepseek_v32,
    "glm_moe_dsa": _glm_moe_dsa,
    "axk2": _axk2,
    "dots3_note": _dots3_note,
    "hy_v4": _hy_v4,
    "mistral_large4": _mistral_large4,
    "glm5_next": _glm5_next,
    "qwen4_exp": _qwen4_exp,
    "qwen3_next": _qwen3_next,
    "qwen3_5_moe": _qwen3_5_moe,
    "kimi_linear": _kimi_linear,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
}

FAMILIES: tuple[str, ...] = tuple(_MAKE)
"""The families that `tiny_config` knows."""
