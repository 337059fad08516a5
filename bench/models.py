"""The shapes of real models: what a bench is about.

Every number is from the model's own configuration on its Hugging Face page (config.json), except
where a note says otherwise. A field that a model has not is None (or 0), and operators that need it
have no case for that model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts block: routed experts only."""

    count: int
    chosen: int
    width: int
    """Rows of down's input: the expert's inner size."""
    score: str
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    limit: float | None = None
    activation: str = "silu"
    bias: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Attention:
    """Attention over selected or compressed entries with one shared key and value head."""

    heads: int
    head_dim: int
    v_dim: int
    scale: float
    top_k: int
    window: int = 0
    ratios: tuple[int, ...] = ()
    """Tokens of an entry: small ratios are selected from (CSA), 128 is read whole (HCA)."""
    index_heads: int = 0
    index_dim: int = 128
    sink: bool = True
    row_bytes: int = 0
    """Of an entry as the model's cache packs it; 0: entries stay numbers."""


@dataclass(frozen=True)
class Blocks:
    """Attention over whole blocks of keys that a list names."""

    heads: int
    kv_heads: int
    head_dim: int
    block: int
    chosen: int


@dataclass(frozen=True)
class Engram:
    """Hashed n-gram embeddings."""

    sizes: int
    """The longest n-gram."""
    heads: int
    dim: int
    rows: int
    """Of each of the (sizes - 1) * heads columns."""
    stored: str
    """The rows' dtype or format in the checkpoint."""


@dataclass(frozen=True)
class Model:
    """What a model's configuration says that the operators need."""

    name: str
    title: str
    hidden: int
    source: str
    experts: Experts | None = None
    attention: Attention | None = None
    blocks: Blocks | None = None
    engram: Engram | None = None
    streams: int = 0
    """Residual streams of hyper-connections."""
    iterations: int = 20
    """Sinkhorn steps."""
    notes: tuple[str, ...] = field(default=())


_V4: dict[str, Any] = dict(
    head_dim=512, v_dim=512, scale=512**-0.5, window=128, index_heads=64, row_bytes=584
)

MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        Model(
            "v4-flash",
            "DeepSeek-V4-Flash",
            4096,
            "deepseek-ai/DeepSeek-V4-Flash, config.json",
            Experts(256, 6, 2048, "sqrtsoftplus", scale=1.5, limit=10.0),
            Attention(64, top_k=512, ratios=(4, 128), **_V4),
            streams=4,
        ),
        Model(
            "v4-pro",
            "DeepSeek-V4-Pro",
            7168,
            "deepseek-ai/DeepSeek-V4-Pro, config.json",
            Experts(384, 6, 3072, "sqrtsoftplus", scale=2.5, limit=10.0),
            Attention(128, top_k=1024, ratios=(4, 128), **_V4),
            streams=4,
        ),
        Model(
            "v3.2",
            "DeepSeek-V3.2",
            7168,
            "deepseek-ai/DeepSeek-V3.2, config.json",
            Experts(256, 8, 2048, "sigmoid", groups=8, top_groups=4, scale=2.5),
            # latent attention absorbed into 512 + 64: every token is an entry
            Attention(
                128, 576, 512, 192**-0.5 * 1.8735, 2048, ratios=(1,), index_heads=64, sink=False
            ),
        ),
        Model(
            "v4.1-flash",
            "DeepSeek-V4.1-Flash",
            5120,
            "vLLM and SGLang model files of DeepSeek-V4.1-Flash (secondary)",
            Experts(384, 6, 2304, "sqrtsoftplus", scale=1.5, limit=10.0),
            Attention(64, top_k=512, ratios=(2,), **{**_V4, "index_heads": 32, "row_bytes": 288}),
            engram=Engram(4, 8, 256, 16_000_000, "fp8"),
            streams=4,
            notes=("entries of ratio 2; the real model selects from a pool of 16,384 of them",),
        ),
        Model(
            "qwen3-30b",
            "Qwen3-30B-A3B",
            2048,
            "Qwen/Qwen3-30B-A3B, config.json",
            Experts(128, 8, 768, "softmax"),
        ),
        Model(
            "gpt-oss-20b",
            "gpt-oss-20b",
            2880,
            "openai/gpt-oss-20b, config.json",
            Experts(
                32,
                4,
                2880,
                "topk_softmax",
                limit=7.0,
                activation="swiglu_oai",
                bias=True,
                interleaved=True,
            ),
        ),
        Model(
            "engram-27b",
            "Engram-27B",
            2560,
            "Engram, arXiv 2601.07372, table of sizes",
            engram=Engram(3, 8, 80, 2_262_400, "bf16"),
            streams=4,
        ),
        Model(
            "minimax-m3",
            "MiniMax-M3",
            6144,
            "MiniMax-M3, config.json",
            Experts(128, 4, 3072, "sigmoid", scale=2.0, limit=7.0, activation="swiglu_oai"),
            blocks=Blocks(64, 4, 128, 128, 16),
        ),
    )
}
"""By name, as --model takes them."""


def find(text: str) -> Model:
    """The model of this name, or of the folder of a checkpoint (its config.json).

    ValueError says what is wrong. The model of a folder is known by the folder's name from then on.
    """
    if text in MODELS:
        return MODELS[text]
    path = Path(text) / "config.json"
    if not path.is_file():
        raise ValueError(f"{text!r} is neither a folder with config.json nor one of {_names()}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{path} cannot be read as JSON") from None
    name = path.resolve().parent.name
    MODELS[name] = made = from_config(name, config)
    return made


def _names() -> str:
    return ", ".join(MODELS)


def from_config(name: str, config: dict[str, Any]) -> Model:
    """A model as a Hugging Face configuration describes it; ValueError if it has no operator of
    ours.

    Understood are the fields of DeepSeek-V3 to V4, Qwen3-MoE, gpt-oss and Mixtral. What a
    configuration leaves out is what its class has by default.
    """
    get: Callable[[str], Any] = config.get
    kind = get("model_type") or ""
    experts = attention = None
    count = get("n_routed_experts") or get("num_experts") or get("num_local_experts")
    if count and get("num_experts_per_tok"):
        oai = kind == "gpt_oss"
        score = "topk_softmax" if oai else get("scoring_func") or _SCORES.get(kind, "softmax")
        experts = Experts(
            count,
            get("num_experts_per_tok"),
            get("moe_intermediate_size") or get("intermediate_size"),
            score,
            get("n_group") or 1,
            get("topk_group") or 1,
            get("routed_scaling_factor") or 1.0,
            7.0 if oai else get("swiglu_limit"),
            "swiglu_oai" if oai else "silu",
            oai,
            oai,
        )
    if get("index_topk"):
        latent = (get("kv_lora_rank") or 0) + (get("qk_rope_head_dim") or 0)
        dim = latent or get("head_dim") or 512
        rates = get("compress_ratios") or (get("compress_rates") or {}).values()
        attention = Attention(
            get("num_attention_heads"),
            dim,
            get("kv_lora_rank") or dim,
            dim**-0.5,
            get("index_topk"),
            0 if latent else get("sliding_window") or 0,
            (1,) if latent else tuple(sorted({r for r in rates if r})),
            get("index_n_heads") or 0,
            get("index_head_dim") or 128,
            sink=not latent,
        )
    if experts is None and attention is None:
        raise ValueError(
            f"{name}: its config.json describes neither routed experts nor an indexer "
            f"(model_type {kind!r}); transom bench has no case for it"
        )
    return Model(
        name,
        name,
        get("hidden_size"),
        "its config.json",
        experts,
        attention,
        streams=get("hc_mult") or 0,
        iterations=get("hc_sinkhorn_iters") or 20,
    )


_SCORES = {
    "deepseek_v4": "sqrtsoftplus",
    "deepseek_v32": "sigmoid",
    "deepseek_v3": "sigmoid",
    "glm_moe_dsa": "sigmoid",
}
"""Of families whose configurations may leave it out."""
