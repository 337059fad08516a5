"""torch_npu's operators played on the CPU: its schemas, and references that are as strict about
arguments as its documentation is."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from transom.backends.ascend._schemas import SCHEMAS

PLAYED = {}
"""The references by operator."""
CALLED = set()
"""Operators that were called."""


def plays(function):
    @functools.wraps(function)
    def noted(*args, **kwargs):
        CALLED.add(function.__name__)
        return function(*args, **kwargs)

    PLAYED[function.__name__] = noted
    return noted


def define() -> torch.library.Library:
    """Declare the operators in torch.ops.npu; they last as long as what is returned."""
    library = torch.library.Library("npu", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, PLAYED[name], "CPU")
    return library


def packed(*tensors: Tensor) -> None:
    assert all(t.is_contiguous() for t in tensors), "the vendor takes contiguous tensors"


@plays
def npu_grouped_matmul(
    x,
    weight,
    *,
    bias=None,
    scale=None,
    offset=None,
    antiquant_scale=None,
    antiquant_offset=None,
    per_token_scale=None,
    group_list=None,
    activation_input=None,
    activation_quant_scale=None,
    activation_quant_offset=None,
    split_item=0,
    group_type=None,
    group_list_type=0,
    act_type=0,
    tuning_config=None,
    output_dtype=None,
    x_dtype=None,
    weight_dtype=None,
    scale_dtype=None,
    per_token_scale_dtype=None,
):
    (x,), (weight,) = x, weight
    assert (split_item, group_type, group_list_type, act_type) == (3, 0, 0, 0)
    assert x.dtype == weight.dtype and group_list.dtype == torch.int64
    packed(x)
    assert weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()
    ends = group_list.tolist()
    assert ends == sorted(ends) and ends[-1] == len(x) and len(ends) == len(weight) <= 1024
    y = x.new_empty(len(x), weight.shape[2])
    for e, (start, end) in enumerate(zip([0, *ends], ends)):
        y[start:end] = (x[start:end].double() @ weight[e].double()).to(x.dtype)
    return [y]


@plays
def npu_moe_init_routing_v2(
    x,
    expert_idx,
    *,
    scale=None,
    offset=None,
    active_num=-1,
    expert_capacity=-1,
    expert_num=-1,
    drop_pad_mode=0,
    expert_tokens_num_type=0,
    expert_tokens_num_flag=False,
    quant_mode=-1,
    active_expert_range=(),
    row_idx_type=0,
    x_dtype=None,
):
    (T, K), flat = expert_idx.shape, expert_idx.flatten()
    assert expert_idx.dtype == torch.int32 and active_num == T * K and expert_tokens_num_flag
    assert (drop_pad_mode, expert_tokens_num_type, quant_mode, row_idx_type) == (0, 1, -1, 0)
    assert list(active_expert_range) == [0, expert_num]
    assert 0 <= flat.min() <= flat.max() < expert_num
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=expert_num)
    return x[order // K], order.argsort().to(torch.int32), counts, x.new_empty(0)


@plays
def npu_moe_token_unpermute(
    permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None
):
    assert sorted_indices.dtype == torch.int32 and not padded_mode and restore_shape is None
    rows = permuted_tokens[sorted_indices.long()].view(*probs.shape, -1)
    return (rows * probs[..., None]).sum(1).to(permuted_tokens.dtype)


@plays
def npu_moe_gating_top_k(
    x,
    k,
    *,
    bias=None,
    input_ids=None,
    tid2eid=None,
    k_group=1,
    group_count=1,
    group_select_mode=0,
    renorm=0,
    norm_type=0,
    out_flag=False,
    routed_scaling_factor=1.0,
    eps=1e-20,
):
    assert renorm == 0 and (bias is None or bias.dtype == x.dtype) and x.shape[1] <= 2048
    s = x.sigmoid() if norm_type else x.softmax(-1)
    key = s if bias is None else s + bias
    groups = key.view(len(x), group_count, -1)
    best = groups.topk(2, -1).values.sum(-1) if group_select_mode else groups.amax(-1)
    taken = torch.zeros_like(best).scatter(1, best.topk(k_group, -1).indices, 1.0).bool()
    key = groups.masked_fill(~taken[..., None], -torch.inf).flatten(1)
    ids = torch.sort(key, dim=-1, descending=True, stable=True).indices[:, :k]
    y = s.gather(1, ids)
    if norm_type:
        y = y / (y.sum(-1, keepdim=True) + eps)
    return y * routed_scaling_factor, ids.to(torch.int32), s.float()


@plays
def npu_lightning_indexer(
    query,
    key,
    weights,
    *,
    actual_seq_lengths_query=None,
    actual_seq_lengths_key=None,
    block_table=None,
    layout_query="BSND",
    layout_key="BSND",
    sparse_count=2048,
    sparse_mode=3,
    pre_tokens=2**63 - 1,
    next_tokens=2**63 - 1,
    return_value=False,
):
    assert (layout_query, layout_key, sparse_mode) == ("TND", "PA_BSND", 0)
    assert query.dtype == key.dtype == weights.dtype and query.shape[1:] == (64, 128)
    assert key.shape[1] % 16 == 0 and key.shape[1] <= 1024 and key.shape[2:] == (1, 128)
    packed(query, key, weights, block_table)
    ends = actual_seq_lengths_query.tolist()
    out = torch.full((len(query), 1, sparse_count), -7, dtype=torch.int32)  # nobody said -1
    for b, (start, end) in enumerate(zip([0, *ends], ends)):
        length = int(actual_seq_lengths_key[b])
        keys = key[block_table[b].long()].flatten(0, 2)[:length].double()
        dots = torch.einsum("thd,nd->thn", query[start:end].double(), keys).relu()
        score = torch.einsum("th,thn->tn", weights[start:end].double(), dots)
        best = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, :sparse_count]
        out[start:end, 0, : best.shape[1]] = best.to(torch.int32)
    return out, out


@plays
def npu_sparse_flash_attention(
    query,
    key,
    value,
    sparse_indices,
    scale_value,
    *,
    block_table=None,
    actual_seq_lengths_query=None,
    actual_seq_lengths_kv=None,
    query_rope=None,
    key_rope=None,
    sparse_block_size=1,
    layout_query="BSND",
    layout_kv="BSND",
    sparse_mode=3,
    pre_tokens=2**63 - 1,
    next_tokens=2**63 - 1,
    attention_mode=0,
    return_softmax_lse=False,
    sinks=None,
):
    assert (layout_query, layout_kv, sparse_mode, attention_mode) == ("BSND", "BSND", 0, 2)
    assert query.shape[-1] == key.shape[-1] == 512 and query_rope.shape[-1] == 64
    packed(query, key, value, sparse_indices, query_rope, key_rope)
    assert key.shape[2] == 1 and sparse_indices.dtype == torch.int32 and sparse_block_size == 1
    q = torch.cat([query, query_rope], -1).double()
    rows = torch.cat([key, key_rope], -1).double()[:, :, 0]
    at = sparse_indices[:, :, 0].long()
    taken = torch.stack([rows[b][at[b].clamp(0)] for b in range(len(at))])
    logits = torch.einsum("bshd,bsld->bshl", q, taken) * scale_value
    logits = logits.masked_fill(at[:, :, None] < 0, -1e30)
    largest = logits.amax(-1)
    p = (logits - largest[..., None]).exp()
    total = p.sum(-1)
    o = torch.einsum("bshl,bsld->bshd", p / total[..., None], taken[..., :512])
    return o.to(query.dtype), largest.float()[:, None], total.float()[:, None]


@plays
def npu_swiglu(input, dim=-1):
    gate, up = input.double().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


@plays
def npu_mhc_sinkhorn(x, *, eps=1e-6, num_iters=20, out_flag=0):
    assert x.dtype == torch.float32 and x.dim() == 3 and 1 <= num_iters <= 100
    comb = x.double().softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(num_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb.float(), x.new_empty(0), x.new_empty(0)


@plays
def npu_mhc_pre(
    x, phi, alpha, bias, *, gamma=None, norm_eps=1e-6, hc_eps=1e-6, out_flag=0, inner_precise=0
):
    assert x.dim() == 3 and phi.dtype == alpha.dtype == bias.dtype == torch.float32
    packed(x)
    n, flat = x.shape[1], x.flatten(1).double()
    mix = flat @ phi.double().T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    a = mix * alpha.double().repeat_interleave(torch.tensor([n, n, n * n])) + bias
    pre, post, rest = a.split([n, n, n * n], -1)
    pre = pre.sigmoid() + hc_eps
    h = (pre[..., None] * x).sum(1).to(x.dtype)
    empty = x.new_empty(0)
    return h, 2 * post.sigmoid().float(), rest.float().view(-1, n, n), empty, empty, empty


@plays
def npu_mhc_post(x, h_res, h_out, h_post):
    assert h_res.dtype == h_post.dtype == torch.float32 and x.dtype == h_out.dtype
    packed(x, h_res, h_out, h_post)
    mixed = torch.einsum("tjk,tjd->tkd", h_res.double(), x.double())
    return (mixed + h_post.double()[..., None] * h_out.double()[:, None]).to(x.dtype)
