"""Small models with seeded weights: the DeepSeek-V4 of `transom run`, and one per family for tests.

A freshly initialised transformers model is nearly constant: with the usual spread of 0.02 a model
of this size gives almost equal logits everywhere, and "the same greedy tokens" would say nothing.
The weights here are drawn so that every branch matters: fan-in scaled matrices, norms that differ
from one, sinks, biases, hash tables.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from .tiny_configs import tiny_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ByteTokenizer:
    """Text as its UTF-8 bytes: ids 0..255 are bytes, then `bos_token_id` and `eos_token_id`."""

    bos_token_id = 256
    eos_token_id = 257
    vocab_size = 258

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """The ids of `text`, the beginning-of-sequence id in front unless `add_bos` is False."""
        ids = list(text.encode("utf-8"))
        return [self.bos_token_id, *ids] if add_bos else ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; ids above 255 are skipped, bytes that are not UTF-8 become U+FFFD."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


def builtin_config() -> PretrainedConfig:
    """The built-in DeepSeek-V4: the real model's kinds of layers, at about 47 million parameters.

    Window 128, CSA 4 with the best 512 entries and HCA 128 as in V4-Flash, whose list of layers
    also starts with two window layers. Up to 2048 tokens every entry is among the best 512. Beyond,
    a selection whose last places are nearly tied may fall differently under another order of
    summation: with weights drawn at random one query in some thousands, and then its logits differ
    by per cents (trained indexers give near-ties little attention).
    """
    from transformers import DeepseekV4Config

    csa, hca = "compressed_sparse_attention", "heavily_compressed_attention"
    return DeepseekV4Config(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        head_dim=128,
        partial_rotary_factor=0.25,
        q_lora_rank=256,
        num_experts_per_tok=4,
        n_routed_experts=16,
        layer_types=["sliding_attention", "sliding_attention", csa, hca, csa, hca],
        mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe", "moe", "moe"],
        compress_rates={csa: 4, hca: 128},
        sliding_window=128,
        o_groups=4,
        o_lora_rank=128,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=512,
        max_position_embeddings=65536,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
        pad_token_id=None,
    )


def builtin_model(
    *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, ByteTokenizer]:
    """The built-in model with seeded weights, in evaluation mode, and its tokenizer.

    As when transformers loads a checkpoint, the modules that the family keeps in float32 stay so.
    """
    model = seeded_model(builtin_config(), seed=seed)
    kept = set(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model, ByteTokenizer()


def tiny_model(family: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model of `tiny_config(family, **changes)` with seeded weights, in evaluation mode."""
    return seeded_model(tiny_config(family, **changes), seed=seed)


def seeded_model(config: PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """The language model of `config` in fp32 with weights that depend on `seed` alone."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as TEXT
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if type(config) in TEXT else AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32)
    fill(model, seed=seed)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, *, seed: int = 0) -> None:
    """Draws every parameter and routing buffer of `model` from one generator, in order of names."""
    source = torch.Generator().manual_seed(seed)
    tied: set[int] = set()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) in tied:
            continue
        tied.add(id(parameter))
        mean, spread = _spread(name, parameter)
        parameter.copy_(torch.randn(parameter.shape, generator=source) * spread + mean)
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("tid2eid"):
            experts = _experts_of(model, name)
            keys = torch.rand(buffer.shape[0], experts, generator=source)
            buffer.copy_(keys.argsort(dim=-1)[:, : buffer.shape[1]])
        elif name.endswith(("e_score_correction_bias", "rotary_emb.alpha")):
            buffer.copy_(torch.randn(buffer.shape, generator=source) * 0.1)


def _spread(name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation for one parameter."""
    last = name.rsplit(".", 1)[-1]
    if last == "scale" or last == "hc_scale":
        return 1.0, 0.2
    if last in ("base", "hc_base", "sinks", "position_bias"):
        return 0.0, 0.5
    if last.endswith("bias"):
        return 0.0, 0.2
    if parameter.ndim == 1:  # norm weights
        return 1.0, 0.1
    if "embed_tokens" in name:
        return 0.0, 1.0
    # gpt-oss stores its expert matrices as [E, in, out], everyone else as [..., out, in].
    transposed = (
        parameter.ndim == 3 and parameter.shape[1] < parameter.shape[2] and last == "gate_up_proj"
    )
    fan_in = parameter.shape[1] if transposed else parameter.shape[-1]
    gain = 3.0 if name.startswith("lm_head") else 1.0
    return 0.0, gain / math.sqrt(fan_in)


def _experts_of(model: nn.Module, name: str) -> int:
    return int(model.get_submodule(name.rsplit(".", 1)[0]).num_experts)  # type: ignore[arg-type]
