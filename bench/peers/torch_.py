"""PyTorch's own operators, put together as a user without other libraries would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import PLAIN, Case
from ..measure import Candidate, Function

Values = Mapping[str, Any]


def probe() -> str | None:
    """torch is always there."""
    return None


def candidates(case: Case, values: Values) -> list[Candidate]:
    """What torch has for this operator."""
    made: list[Candidate] = []

    def add(name: str, call: Function, note: str, size: float = 0.0) -> None:
        made.append(Candidate(name, "torch", lambda _: call, note, size))

    if case.format != PLAIN:
        return made
    op = case.op
    if op == "moe_experts":
        add("torch mm loop", experts_loop, "an mm for each expert with tokens, index_add")
        if case.dims["T"] * case.dims["K"] > 1:
            add("torch grouped_mm", experts_grouped, "F.grouped_mm over the sorted slots")
    elif op == "grouped_gemm":
        add("torch mm loop", product_loop, "an mm for each expert with rows")
        add("torch grouped_mm", product_grouped, "F.grouped_mm")
    elif op == "route":
        add("torch topk", route, "score, topk, gather")
    elif op == "lightning_indexer":
        add("torch blocked mm", indexer, "blocks of 64 queries: mm, relu_, bmm; topk")
        if case.dims["S"] > 1:
            scores = 4.0 * case.dims["S"] * case.dims["N"] * case.dims["H"]
            add("torch mm, scores only", scores_only, "one bare matmul of all scores", scores)
    elif op == "sparse_attention":
        add("torch gather + bmm", gather_bmm, "keys gathered for 32 queries at a time, two bmm")
        d = case.dims
        dense = 4.0 * d["S"] * (d["N"] + d["S"]) * 1.5
        add("torch SDPA", dense_attention, "scaled_dot_product_attention, dense mask", dense)
        if 1 < d["S"] <= FLEX:
            note = "flex_attention, compiled for the shape; block mask made before"
            made.append(Candidate("torch flex_attention", "torch", flex_attention, note, dense))
    elif op == "block_sparse_attention":
        add(
            "torch SDPA",
            dense_blocks,
            "scaled_dot_product_attention, dense mask",
            8.0 * case.dims["S"] * case.dims["N"] * case.dims["Hkv"],
        )
    elif op in ("hashed_embedding", "hashed_embedding_out"):
        note = "transom's hash; index_select(out=) of the rows"
        made.append(Candidate("torch index_select", "torch", _select, note))
        if op == "hashed_embedding":
            add("torch embedding", embedding, "transom's hash; F.embedding of the rows")
    elif op == "ngram_hash":
        add("torch int64", ngram, "int64 products, xor and remainder of whole tensors")
    elif op == "short_conv":
        add("torch conv1d", conv, "F.conv1d by channels, silu")
    return made


def activation(both: Tensor, v: Values) -> Tensor:
    """h(gate, up) of the joint product."""
    gate, up = (both[..., ::2], both[..., 1::2]) if v["interleaved"] else both.chunk(2, -1)
    if v["limit"] is not None:
        gate, up = gate.clamp(max=v["limit"]), up.clamp(-v["limit"], v["limit"])
    if v["activation"] == "swiglu_oai":
        return (up + 1) * gate * torch.sigmoid(v["alpha"] * gate)
    return F.silu(gate) * up


def _biased(y: Tensor, bias: Tensor | None, expert: Any) -> Tensor:
    return y if bias is None else y + bias[expert]


def experts_loop(v: Values) -> Tensor:
    """One pair of products for each expert that has tokens."""
    x, ids, weights = v["x"], v["ids"], v["weights"].to(v["x"].dtype)
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        both = _biased(x[token] @ v["gate_up"][e].t(), v["gate_up_bias"], e)
        out = _biased(activation(both, v) @ v["down"][e].t(), v["down_bias"], e)
        y.index_add_(0, token, out * weights[token, slot, None])
    return y


def experts_grouped(v: Values) -> Tensor:
    """The slots sorted by expert, two grouped products, and their sum by token."""
    x, K = v["x"], v["ids"].shape[1]
    sorted_ids, order = v["ids"].flatten().sort(stable=True)
    experts = v["gate_up"].shape[0]
    ends = torch.bincount(sorted_ids, minlength=experts).cumsum(0).to(torch.int32)
    both = F.grouped_mm(x[order // K], v["gate_up"].transpose(1, 2), offs=ends)
    both = _biased(both, v["gate_up_bias"], sorted_ids)
    out = F.grouped_mm(activation(both, v), v["down"].transpose(1, 2), offs=ends)
    out = _biased(out, v["down_bias"], sorted_ids)
    out = out * v["weights"].flatten()[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add_(0, order // K, out)


def product_loop(v: Values) -> Tensor:
    """The rows of each expert times its weight."""
    y = v["x"].new_empty(v["x"].shape[0], v["weight"].shape[1])
    start = 0
    for e, end in enumerate(v["offsets"].tolist()):
        if end > start:
            torch.mm(v["x"][start:end], v["weight"][e].t(), out=y[start:end])
        start = end
    return y


def product_grouped(v: Values) -> Tensor:
    """The same in one call."""
    ends = v["offsets"].to(torch.int32)
    return F.grouped_mm(v["x"], v["weight"].transpose(1, 2), offs=ends)


def route(v: Values) -> tuple[Tensor, Tensor]:
    """The published formulas, group by group where there are groups."""
    z = v["logits"].float()
    if v["score"] == "topk_softmax":
        best, ids = z.topk(v["k"], dim=-1)
        return ids.to(torch.int32), torch.softmax(best, -1)
    score = {
        "softmax": lambda: torch.softmax(z, -1),
        "sigmoid": lambda: torch.sigmoid(z),
        "sqrtsoftplus": lambda: F.softplus(z).sqrt(),
    }[v["score"]]()
    key = score if v["bias"] is None else score + v["bias"]
    if v["groups"] > 1:
        by_group = key.unflatten(-1, (v["groups"], -1))
        group = by_group.topk(2, dim=-1).values.sum(-1)
        kept = group.topk(v["top_groups"], dim=-1).indices
        mask = torch.zeros_like(group, dtype=torch.bool).scatter_(1, kept, True)
        key = by_group.masked_fill(~mask[..., None], -torch.inf).flatten(-2)
    ids = key.topk(v["k"], dim=-1).indices
    weights = score.gather(1, ids)
    return ids.to(torch.int32), v["scale"] * weights / (weights.sum(-1, keepdim=True) + 1e-20)


def indexer(v: Values) -> Tensor:
    """Blocks of queries, so that the scores of all heads stay in the cache."""
    q, k, visible, top_k = v["q"][0], v["k"][0], v["visible"][0], v["top_k"]
    weights = v["weights"][0].to(q.dtype)
    S, H, D = q.shape
    N = k.shape[0]
    out = torch.full((S, top_k), -1, dtype=torch.int32)
    places, keys = torch.arange(N), k.t()
    for s in range(0, S, 64):
        part = q[s : s + 64]
        scores = (part.reshape(-1, D) @ keys).relu_().view(-1, H, N)
        total = torch.bmm(weights[s : s + 64, None], scores)[:, 0]
        seen = visible[s : s + 64, None]
        total.masked_fill_(places >= seen, -torch.inf)
        ids = total.topk(min(top_k, N), dim=-1).indices
        out[s : s + 64, : ids.shape[1]] = ids.masked_fill(ids >= seen, -1)
    return out[None]


def scores_only(v: Values) -> Tensor:
    """The matrix product that no indexer can do without, all of it; then what makes it one."""
    q, k = v["q"][0], v["k"][0]
    scores = (q.flatten(0, 1) @ k.t()).relu_().view(*q.shape[:2], -1)
    total = torch.bmm(v["weights"][0].to(q.dtype)[:, None], scores)[:, 0]
    total.masked_fill_(torch.arange(k.shape[0]) >= v["visible"][0][:, None], -torch.inf)
    ids = total.topk(min(v["top_k"], k.shape[0]), dim=-1).indices
    ids = ids.masked_fill(ids >= v["visible"][0][:, None], -1).to(torch.int32)
    return F.pad(ids, (0, v["top_k"] - ids.shape[1]), value=-1)[None]


def _keys_of(v: Values, s: int, e: int) -> tuple[Tensor, Tensor]:
    """(keys [e-s, L, D], seen [e-s, L]) of queries s..e: their entries and their window."""
    q, kv = v["q"][0], v["kv"][0]
    parts, masks = [], []
    if kv.shape[0]:
        visible = v["visible"][0, s:e, None]
        if v["indices"] is not None:
            ids = v["indices"][0, s:e].long()
            masks.append(ids >= 0)
            parts.append(kv[ids.clamp(min=0)])
        else:
            parts.append(kv.expand(e - s, -1, -1))
            masks.append(torch.arange(kv.shape[0]) < visible)
    if v["local_kv"] is not None:
        local, window = v["local_kv"][0], v["window"]
        first = local.shape[0] - q.shape[0] + torch.arange(s, e)[:, None] - window + 1
        places = first + torch.arange(window)
        masks.append(places >= 0)
        parts.append(local[places.clamp(min=0)])
    return torch.cat(parts, 1), torch.cat(masks, 1)


def gather_bmm(v: Values) -> Tensor:
    """For 32 queries at a time: their keys copied together, two batched products and a softmax."""
    q = v["q"][0]
    out = torch.empty(*q.shape[:2], v["v_dim"], dtype=q.dtype)
    for s in range(0, q.shape[0], 32):
        e = min(s + 32, q.shape[0])
        keys, seen = _keys_of(v, s, e)
        logits = torch.bmm(q[s:e], keys.transpose(1, 2)).mul_(v["scale"])
        logits.masked_fill_(~seen[:, None], -torch.inf)
        if v["sink"] is not None:
            sink = v["sink"].to(logits.dtype).expand(e - s, -1)[..., None]
            p = torch.softmax(torch.cat((logits, sink), -1), -1)[..., :-1]
        else:
            p = torch.softmax(logits, -1)
        torch.bmm(p, keys[..., : v["v_dim"]], out=out[s:e])
    return out[None]


def _mask(v: Values) -> Tensor:
    """[S, N + M]: what each query sees."""
    S, N = v["q"].shape[1], v["kv"].shape[1]
    parts = []
    if N and v["indices"] is not None:
        ids = v["indices"][0].long()
        mask = torch.zeros(S, N + 1, dtype=torch.bool)
        parts.append(mask.scatter_(1, ids.masked_fill(ids < 0, N), True)[:, :N])
    elif N:
        parts.append(torch.arange(N) < v["visible"][0][:, None])
    if v["local_kv"] is not None:
        M = v["local_kv"].shape[1]
        at, place = torch.arange(M - S, M)[:, None], torch.arange(M)
        parts.append((place <= at) & (place > at - v["window"]))
    return torch.cat(parts, 1)


def dense_attention(v: Values) -> Tensor:
    """All entries and tokens with a mask; the sink is one more key, of logit `sink`."""
    q = v["q"].transpose(1, 2)
    keys = v["kv"] if v["local_kv"] is None else torch.cat((v["kv"], v["local_kv"]), 1)
    mask = torch.zeros(1, 1, q.shape[2], keys.shape[1], dtype=q.dtype)
    mask.masked_fill_(~_mask(v), -torch.inf)
    values = keys[..., : v["v_dim"]]
    if v["sink"] is not None:
        keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
        sink = v["sink"].to(q.dtype).view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
        mask = torch.cat((mask.expand(1, q.shape[1], -1, -1), sink), -1)
    heads = q.shape[1]
    out = F.scaled_dot_product_attention(
        q,
        keys[:, None].expand(-1, heads, -1, -1),
        values[:, None].expand(-1, heads, -1, -1),
        attn_mask=mask,
        scale=v["scale"],
    )
    return out.transpose(1, 2).contiguous()


FLEX = 1024
"""Queries up to which flex_attention is asked on a CPU: it takes longer than SDPA there, and its
checks and compilation as long again."""


def flex_attention(values: Values) -> Function:
    """Compiled flex_attention over all entries and tokens, those that a query doesn't see masked;
    the sink is one more key without a value, whose score is set (on CPUs it returns no
    log-sum-exp, by which bench/accelerator.py goes around that key)."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    torch.compiler.reset()  # else the eighth shape of a run would be computed without a compiler
    compiled: Any = torch.compile(flex, dynamic=False)
    masks: dict[int, Any] = {}
    no_sink = torch.full(values["q"].shape[2:3], -torch.inf)

    def call(v: Values) -> Tensor:
        q = v["q"].transpose(1, 2)
        keys = v["kv"] if v["local_kv"] is None else torch.cat((v["kv"], v["local_kv"]), 1)
        keys, last = F.pad(keys, (0, 0, 0, 1))[:, None], keys.shape[1]
        sink = no_sink if v["sink"] is None else v["sink"].float()
        if id(v) not in masks:
            seen = F.pad(_mask(v), (0, 1), value=True)
            S, N = seen.shape
            masks[id(v)] = create_block_mask(
                lambda b, h, i, j: seen[i, j], None, None, S, N, device="cpu"
            )
        out = compiled(
            q,
            keys,
            keys[..., : v["v_dim"]],
            block_mask=masks[id(v)],
            scale=v["scale"],
            score_mod=lambda score, b, h, i, j: torch.where(j == last, sink[h], score),
            enable_gqa=True,
        )
        return out.transpose(1, 2).contiguous()

    return call


def dense_blocks(v: Values) -> Tensor:
    """All keys with the mask of the lists."""
    q, k = v["q"].transpose(1, 2), v["k"].transpose(1, 2)
    S, N, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    blocks = -(-N // v["block_size"])
    ids = v["block_indices"][0].long()  # [S, Hkv, L]
    chosen = torch.zeros(S, k.shape[1], blocks + 1, dtype=torch.bool)
    chosen.scatter_(2, ids.masked_fill(ids < 0, blocks), True)
    mask = chosen[..., :blocks].repeat_interleave(v["block_size"], 2)[..., :N].transpose(0, 1)
    mask = mask & (torch.arange(N) <= torch.arange(N - S, N)[:, None])
    out = F.scaled_dot_product_attention(
        q,
        k,
        v["v"].transpose(1, 2),
        attn_mask=mask.repeat_interleave(group, 0)[None],
        scale=v["scale"],
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous()


def _rows(v: Values) -> Tensor:
    import transom

    named = {n: v[n] for n in ("multipliers", "moduli", "offsets", "pad")}
    return transom.ngram_hash(v["tokens"], **named).flatten()


def _select(v: Values) -> Callable[[Values], Tensor]:
    width = v["table"].shape[1]
    out = torch.empty(v["tokens"].numel() * v["moduli"].numel(), width, dtype=v["table"].dtype)

    def call(v: Values) -> Tensor:
        torch.index_select(v["table"], 0, _rows(v), out=out)
        return out.view(*v["tokens"].shape, -1)

    return call


def embedding(v: Values) -> Tensor:
    """The rows in new memory."""
    return F.embedding(_rows(v), v["table"]).view(*v["tokens"].shape, -1)


def ngram(v: Values) -> Tensor:
    """A tensor of all hashes for each n-gram size."""
    tokens, multipliers, moduli = v["tokens"], v["multipliers"], v["moduli"]
    n = multipliers.numel()
    padded = F.pad(tokens, (n - 1, 0), value=v["pad"])
    S, mix, out = tokens.shape[1], tokens * multipliers[0], []
    for g in range(1, n):
        mix = mix ^ (padded[:, n - 1 - g : n - 1 - g + S] * multipliers[g])
        out.append(torch.remainder(mix[..., None], moduli[g - 1]))
    rows = torch.cat(out, -1)
    return (rows if v["offsets"] is None else rows + v["offsets"]).to(torch.int32)


def conv(v: Values) -> Tensor:
    """Depth-wise convolution over time."""
    x, weight = v["v"].transpose(1, 2), v["weight"]
    lead = (weight.shape[1] - 1) * v["dilation"]
    y = F.conv1d(
        F.pad(x, (lead, 0)),
        weight[:, None].to(x.dtype),
        dilation=v["dilation"],
        groups=weight.shape[0],
    )
    return F.silu(y).transpose(1, 2).contiguous()
