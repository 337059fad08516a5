"""Hugging Face transformers' DeepSeek-V4, as its model runs it eagerly."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..cases import PLAIN, Case
from ..measure import Candidate, Function
from .torch_ import _mask

Values = Mapping[str, Any]


def probe() -> str | None:
    """It must have the model."""
    try:
        _model()
    except ImportError as error:
        return f"this transformers has no DeepSeek-V4: {error}"
    return None


def _model() -> Any:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    return modeling_deepseek_v4


def candidates(case: Case, values: Values) -> list[Candidate]:
    """Its modules for the operators that they cover."""
    if case.format != PLAIN:
        return []
    d = case.dims
    if case.op == "moe_experts" and values["limit"] and values["activation"] == "silu":
        return [_one(_experts, "DeepseekV4Experts, eager")]
    if case.op == "mhc_pre":
        return [_one(_pre, "DeepseekV4HyperConnection")]
    if case.op == "mhc_post":
        return [_one(lambda _: _post, "the decoder layer's two lines after a sublayer")]
    if case.op == "mhc_head":
        return [_one(_head, "DeepseekV4HyperHead")]
    if case.op == "lightning_indexer":
        scores = 4.0 * d["S"] * d["H"] * d["N"] * 2
        return [_one(_indexer, "DeepseekV4IndexerScorer and topk", scores)]
    if case.op == "sparse_attention" and values["sink"] is not None and d["D"] == d["Dv"]:
        # logits, their softmax and its parts, each S x keys for every head
        keys = values["kv"].shape[1] + (values["local_kv"].shape[1] if d["window"] else 0)
        held = 4.0 * d["S"] * keys * d["H"] * values["q"].itemsize
        return [_one(_attention, "eager_attention_forward, dense mask", held)]
    return []


def _one(prepare: Any, note: str, size: float = 0.0) -> Candidate:
    return Candidate("transformers eager", "transformers", prepare, note, size)


def _bare(kind: Any, **parts: Any) -> Any:
    """A module of this class with these attributes, made without its random weights."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    for name, value in parts.items():
        setattr(module, name, value)
    return module.eval()


def _frozen(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _experts(v: Values) -> Function:
    module = _bare(
        _model().DeepseekV4Experts,
        num_experts=v["gate_up"].shape[0],
        hidden_dim=v["x"].shape[1],
        intermediate_dim=v["down"].shape[2],
        gate_up_proj=_frozen(v["gate_up"]),
        down_proj=_frozen(v["down"]),
        act_fn=torch.nn.SiLU(),
        limit=v["limit"],
        config=SimpleNamespace(_experts_implementation="eager"),
    )
    return lambda v: module(v["x"], v["ids"], v["weights"].to(v["x"].dtype))


def _norm(eps: float) -> Any:
    return _model().DeepseekV4UnweightedRMSNorm(eps=eps)


def _pre(v: Values) -> Function:
    module = _bare(
        _model().DeepseekV4HyperConnection,
        hc_mult=v["x"].shape[1],
        hc_sinkhorn_iters=v["iterations"],
        hc_eps=v["eps"],
        input_norm=_norm(v["rms_eps"]),
        fn=_frozen(v["fn"]),
        base=_frozen(v["base"]),
        scale=_frozen(v["scale"]),
    )

    def call(v: Values) -> tuple[Tensor, ...]:
        post, comb, h = module(v["x"][None])
        return h[0], post[0], comb[0]

    return call


def _post(v: Values) -> Tensor:
    dtype = v["x"].dtype
    added = v["post"].to(dtype).unsqueeze(-1) * v["f"].unsqueeze(-2)
    return added + torch.matmul(v["comb"].to(dtype).transpose(-1, -2), v["x"])


def _head(v: Values) -> Function:
    module = _bare(
        _model().DeepseekV4HyperHead,
        hc_mult=v["x"].shape[1],
        input_norm=_norm(v["rms_eps"]),
        eps=v["eps"],
        hc_fn=_frozen(v["fn"]),
        hc_base=_frozen(v["base"]),
        hc_scale=_frozen(v["scale"]),
    )
    return lambda v: module(v["x"][None])[0]


def _indexer(v: Values) -> Function:
    # its projection of the hidden states gives the weights, which are given here
    module = _bare(
        _model().DeepseekV4IndexerScorer,
        softmax_scale=1.0,
        weights_scaling=1.0,
        weights_proj=torch.nn.Identity(),
    )

    def call(v: Values) -> Tensor:
        scores = module(v["q"], v["k"], v["weights"])[0]
        seen = v["visible"][0][:, None]
        scores = scores.masked_fill(torch.arange(scores.shape[1]) >= seen, -torch.inf)
        ids = scores.topk(min(v["top_k"], scores.shape[1]), dim=-1).indices
        ids = ids.masked_fill(ids >= seen, -1).to(torch.int32)
        return torch.nn.functional.pad(ids, (0, v["top_k"] - ids.shape[1]), value=-1)[None]

    return call


def _attention(v: Values) -> Function:
    def call(v: Values) -> Tensor:
        keys = torch.cat((v["kv"], v["local_kv"]), 1)[:, None]
        mask = torch.zeros(1, 1, v["q"].shape[1], keys.shape[2], dtype=keys.dtype)
        mask.masked_fill_(~_mask(v), torch.finfo(keys.dtype).min)
        module = SimpleNamespace(
            num_key_value_groups=v["q"].shape[2], sinks=v["sink"].to(keys.dtype), training=False
        )
        q = v["q"].transpose(1, 2)
        return _model().eager_attention_forward(module, q, keys, keys, mask, v["scale"])[0]

    return call
