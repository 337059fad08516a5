"""Native moe_experts: layouts of the weights, parts of the rows, one token among many."""

from __future__ import annotations

import pytest
import torch

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def draw(T, D, width, E, K, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E, (T, K), generator=g)
    gate_up = (torch.randn(E, 2 * width, D, generator=g) / D**0.5).to(dtype)
    down = (torch.randn(E, D, width, generator=g) / width**0.5).to(dtype)
    x, weights = torch.randn(T, D, generator=g).to(dtype), torch.rand(T, K, generator=g)
    return x, ids, weights, gate_up, down


def run(*args, impl="native", **kwargs):
    with transom.use(impl):
        return transom.moe_experts(*args, **kwargs)


def close(got, want):
    limit = 2e-5 * want.double().abs().max() + 2 * torch.finfo(got.dtype).eps * want.double().abs()
    return ((got.double() - want.double()).abs() <= limit).all()


def transposed(w):
    return w.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("order", [None, transposed])
@pytest.mark.parametrize("T, D, width", [(1, 33, 31), (9, 130, 129), (70, 64, 40)])
def test_every_layout_of_the_weights(dtype, interleaved, order, T, D, width):
    x, ids, weights, gate_up, down = draw(T, D, width, 5, 3, dtype)
    g = torch.Generator().manual_seed(1)
    form = dict(
        activation="swiglu_oai",
        limit=1.0,
        interleaved=interleaved,
        gate_up_bias=torch.randn(5, 2 * width, generator=g).to(dtype),
        down_bias=torch.randn(5, D, generator=g).to(dtype),
    )
    want = run(x, ids, weights, gate_up, down, impl="reference", **form)
    if order:
        gate_up, down = order(gate_up), order(down)
    for position in ("after", "before"):
        got = run(x, ids, weights, gate_up, down, weight_position=position, **form)
        assert close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("megabytes", ["0.02", "0.2", "1"])
def test_parts_of_tokens_and_of_experts_give_the_same_bits(monkeypatch, dtype, megabytes):
    args = draw(500, 96, 64, 3, 2, dtype)
    want = run(*args)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", megabytes)
    assert torch.equal(run(*args), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_beside_any_number_of_tokens(dtype):
    x, ids, weights, gate_up, down = draw(300, 300, 70, 2, 2, dtype)
    together = run(x, ids, weights, gate_up, down)
    for first, tokens in [*((3, n) for n in range(1, 20)), (0, 130), (7, 257)]:
        some = slice(first, first + tokens)
        alone = run(x[some], ids[some], weights[some], gate_up, down)
        assert torch.equal(alone, together[some])


def test_tokens_without_experts_and_what_lies_behind_empty_slots():
    x, ids, weights, gate_up, down = draw(8, 40, 30, 4, 3)
    ids[2] = -1
    ids[5, 1] = -1
    weights[2], weights[5, 1] = float("nan"), float("inf")
    gate_up[3], ids[ids == 3] = float("nan"), -1
    x[2] = float("nan")
    got = run(x, ids, weights, gate_up, down)
    assert torch.isfinite(got).all()
    assert (got[2] == 0).all()
    assert (run(x, ids.fill_(-1), weights, gate_up, down) == 0).all()
    assert run(x[:0], ids[:0], weights[:0], gate_up, down).shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_real_length_are_accurate(dtype):
    x, ids, weights, gate_up, down = draw(40, 2048, 768, 2, 2, dtype)
    want = torch.zeros(40, 2048, dtype=torch.float64)
    for t, s in ids.ge(0).nonzero().tolist():
        e = ids[t, s]
        gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
        want[t] += weights[t, s] * (down[e].double() @ (gate / (1 + (-gate).exp()) * up))
    error = (run(x, ids, weights, gate_up, down).double() - want).abs().max() / want.abs().max()
    assert error < (2e-6 if dtype == torch.float32 else 4e-3)
