"""Modules of DeepSeek-V4-class models on transom's operators: plain, typed, built from explicit
numbers.

    MoE                 router, experts, shared experts, hash routing
    SparseAttention     .window, .hca, .csa (DeepSeek-V4) and .dsa (DeepSeek-V3.2), with an
                        immutable AttentionCache
    Engram              hashed n-gram embeddings: the January demo's form and V4.1's
    HyperConnection     manifold-constrained residual streams around a sublayer
None of them needs transformers. A weight of theirs may be quantised: `replace_weight(module, name,
transom.quantize(...))`.
"""

from __future__ import annotations

from ..kernels.attention.compress_kv import CompressState
from ..weights import advise_huge_pages, replace_weight
from .attention import (
    AttentionResult,
    LatentAttention,
    LatentShape,
    SharedAttention,
    SharedShape,
    SparseAttention,
)
from .attention_cache import AttentionCache
from .attention_parts import IndexShape, RMSNorm
from .engram import Engram, EngramCache
from .engram_hash import EngramHash, engram_hashes
from .hyper_connection import HyperConnection, HyperConnectionHead, to_streams
from .moe import MoE
from .rotary import Angles, Rotary, Yarn
from .token_map import build_token_map, token_map_checksum

__all__ = [
    "Angles",
    "AttentionCache",
    "AttentionResult",
    "CompressState",
    "Engram",
    "EngramCache",
    "EngramHash",
    "HyperConnection",
    "HyperConnectionHead",
    "IndexShape",
    "LatentAttention",
    "LatentShape",
    "MoE",
    "RMSNorm",
    "Rotary",
    "SharedAttention",
    "SharedShape",
    "SparseAttention",
    "Yarn",
    "advise_huge_pages",
    "build_token_map",
    "engram_hashes",
    "replace_weight",
    "to_streams",
    "token_map_checksum",
]
