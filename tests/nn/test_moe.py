"""nn.MoE: routing schemes, hash routing, shared experts, quantised weights, casting, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import transom
from transom.nn.moe import MoE
from transom.weights import replace_weight


def layer(seed: int = 0, **changes) -> MoE:
    torch.manual_seed(seed)
    return MoE(**{**dict(hidden=16, inner=12, experts=8, top_k=3), **changes})


def tokens_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(moe: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every expert of every token in float64."""
    gate, up = torch.einsum("td,efd->tef", x.double(), moe.gate_up.double()).chunk(2, -1)
    y = torch.einsum("tei,edi->ted", functional.silu(gate) * up, moe.down.double())
    w = torch.zeros(x.shape[0], moe.experts, dtype=torch.float64)
    for slot in range(ids.shape[1]):
        used = ids[:, slot] >= 0
        w[used] += (
            functional.one_hot(ids[used, slot].long(), moe.experts) * weights[used, slot, None]
        )
    return torch.einsum("te,ted->td", w, y)


def test_is_the_weighted_sum_of_the_chosen_experts():
    moe, x = layer(), tokens_of(2, 5, 16)
    with transom.record() as calls:
        y = moe(x)
    assert [c.op for c in calls] == ["route", "moe_experts"]
    flat = x.view(10, 16)
    probabilities = (flat.double() @ moe.router.double().T).softmax(-1)
    top = probabilities.topk(3)
    weights = top.values / top.values.sum(-1, keepdim=True)
    assert torch.allclose(
        y.view(10, 16).double(), dense(moe, flat, top.indices, weights), atol=1e-6
    )


def test_deepseek_v3_routing_with_groups_and_a_selection_bias():
    moe = layer(score="sigmoid", groups=4, top_groups=2, selection_bias=True, scale=2.5)
    x = tokens_of(20, 16)
    moe.selection_bias[2:4] = 10.0
    ids, weights = moe.routing(x)
    assert all({2, 3} <= set(row) for row in ids.tolist())
    scores = (x @ moe.router.T).sigmoid().gather(1, ids.long())
    assert torch.allclose(weights, 2.5 * scores / scores.sum(1, keepdim=True), rtol=1e-5)


def test_hash_routing_takes_experts_from_the_table_and_weights_from_the_router():
    table = torch.tensor([[0, 1, 2], [7, 7, 3], [5, -1, 4]])
    moe, x = layer(token_experts=table, score="sqrtsoftplus", scale=1.5), tokens_of(1, 4, 16)
    tokens = torch.tensor([[1, 2, 0, -100]])
    ids, weights = moe.routing(x, tokens=tokens)
    assert ids.tolist() == [[7, 7, 3], [5, -1, 4], [0, 1, 2], [-1, -1, -1]]
    assert torch.allclose(weights[:3].sum(1), torch.full((3,), 1.5))
    y = moe(x, tokens=tokens)
    assert torch.allclose(y[0].double(), dense(moe, x[0], ids, weights), atol=1e-6)
    assert torch.equal(y[0, 3], torch.zeros(16))
    y.sum().backward()
    assert (moe.router.grad != 0).any()


def test_replayed_routing_gives_the_same_output():
    moe, x = layer(), tokens_of(6, 16)
    assert torch.equal(moe(x, preset=moe.routing(x)[0]), moe(x))


def test_a_masked_token_sees_the_shared_expert_only():
    moe, x = layer(shared_inner=6), tokens_of(2, 3, 16)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    y = moe(x, mask=mask)
    gate, up = (x @ moe.shared_gate_up[0].T).chunk(2, -1)
    shared = (functional.silu(gate) * up) @ moe.shared_down[0].T
    assert torch.allclose(y[~mask], shared[~mask], atol=1e-6)
    assert torch.allclose(y[mask], moe(x)[mask], atol=1e-6)


def test_the_clamp_holds_for_the_shared_expert_too():
    moe, x = layer(shared_inner=6, limit=0.05), tokens_of(3, 16)
    gate, up = (x @ moe.shared_gate_up[0].T).chunk(2, -1)
    h = functional.silu(gate.clamp(max=0.05)) * up.clamp(-0.05, 0.05)
    y = moe(x, mask=torch.zeros(3, dtype=torch.bool))
    assert torch.allclose(y, h @ moe.shared_down[0].T, atol=1e-7)


def test_a_gate_scales_the_shared_expert():
    gated, x = layer(shared_inner=6, shared_gate=True), tokens_of(3, 16)
    none = torch.zeros(3, dtype=torch.bool)
    gate, up = (x @ gated.shared_gate_up[0].T).chunk(2, -1)
    shared = (functional.silu(gate) * up) @ gated.shared_down[0].T
    want = (x @ gated.shared_gate.T).sigmoid() * shared
    assert torch.allclose(gated(x, mask=none), want, atol=1e-6)


def test_every_parameter_gets_a_gradient():
    moe = layer(
        shared_inner=6,
        shared_gate=True,
        router_bias=True,
        biases=True,
        interleaved=True,
        activation="swiglu_oai",
        limit=7.0,
        score="topk_softmax",
        selection_bias=True,
    )
    x = tokens_of(40, 16).requires_grad_()
    moe(x).square().sum().backward()
    assert (x.grad != 0).any()
    for name, parameter in moe.named_parameters():
        assert torch.isfinite(parameter.grad).all() and (parameter.grad != 0).any(), name


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_weights_may_be_quantised(format):
    moe = layer(hidden=32, inner=32, shared_inner=32)
    x = tokens_of(5, 32).requires_grad_()
    exact = layer(hidden=32, inner=32, shared_inner=32)
    for name in ("gate_up", "down", "shared_gate_up", "shared_down"):
        weight = transom.quantize(getattr(moe, name).detach(), format)
        replace_weight(moe, name, weight)
        getattr(exact, name).data.copy_(weight.dequantize())
    y = moe(x)
    assert torch.allclose(y, exact(x), atol=1e-6)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert {n for n, _ in moe.named_parameters()} == {"router"}
    again = layer(seed=5, hidden=32, inner=32, shared_inner=32)
    for name in ("gate_up", "down", "shared_gate_up", "shared_down"):
        replace_weight(again, name, transom.quantize(getattr(again, name).detach(), format))
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again(x), y)


def test_casting_the_module_keeps_the_selection_bias_and_the_table():
    moe = layer(selection_bias=True, token_experts=torch.tensor([[0, 1, 2]]))
    moe.selection_bias.fill_(1.001)
    moe.to(torch.bfloat16)
    assert moe.router.dtype == torch.bfloat16
    assert moe.selection_bias.dtype == torch.float32
    assert torch.equal(moe.selection_bias, torch.full((8,), 1.001))
    assert moe.token_experts.dtype == torch.int32
    moe.to("meta").to_empty(device="cpu")
    assert moe.selection_bias.dtype == torch.float32


def test_bfloat16_tokens_are_routed_in_float32():
    moe, x = layer(score="sigmoid").to(torch.bfloat16), tokens_of(9, 16).bfloat16()
    wide = layer(score="sigmoid")
    wide.load_state_dict(moe.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(moe.routing(x), wide.routing(x.float()), strict=True)
    )
    assert moe(x).dtype == torch.bfloat16


def test_edge_19_a_token_has_the_same_bits_alone_and_among_many():
    moe, x = layer(shared_inner=5), tokens_of(100, 16)
    torch.use_deterministic_algorithms(True)
    try:
        many = moe(x)
        for t in (0, 41, 99):
            assert torch.equal(moe(x[t : t + 1])[0], many[t])
    finally:
        torch.use_deterministic_algorithms(False)


def test_balance_lowers_the_bias_of_loaded_experts():
    moe = layer(selection_bias=True)
    moe.balance(torch.tensor([[0, 0, 1], [0, -1, 2]]), 0.5)
    assert moe.selection_bias.tolist() == [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    with pytest.raises(
        ValueError, match="MoE: balance was called; the layer has no selection_bias"
    ):
        layer().balance(torch.tensor([[0]]), 0.1)


def test_edge_01_no_tokens():
    assert layer(shared_inner=4)(torch.zeros(2, 0, 16)).shape == (2, 0, 16)


def test_compiles_without_a_graph_break():
    moe = layer(shared_inner=4, token_experts=torch.tensor([[0, 1, 2], [3, 4, 5]]))
    x, tokens = tokens_of(4, 16), torch.tensor([0, 1, 1, 0])
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, tokens=tokens), moe(x, tokens=tokens), atol=1e-6)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"MoE: token_experts has shape \[4, 2\]; expected \[vocabul"
    ):
        layer(token_experts=torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="MoE: token_experts holds 8; must be in -1..experts-1 = -1..7"
    ):
        layer(token_experts=torch.full((4, 3), 8))
    with pytest.raises(ValueError, match="MoE: shared_gate is True; shared_inner is 0"):
        layer(shared_gate=True)
    moe = layer(token_experts=torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="MoE: tokens is None; hash routing expects"):
        moe(tokens_of(2, 16))
    with pytest.raises(ValueError, match="MoE: tokens holds 4; token_experts has 4 rows"):
        moe(tokens_of(2, 16), tokens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="route: k is 9; must be in 1..E = 1..8"):
        layer(top_k=9)(tokens_of(2, 16))
