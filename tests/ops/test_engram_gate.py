"""engram_gate: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.engram.engram_gate import engram_gate_backward

T, R, D = 33, 4, 576


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64, t: int = T, d: int = D) -> list[Tensor]:
    weight = normal(R, d, seed=3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [
        normal(t, R, d, dtype=dtype),
        normal(t, R, d, seed=1, dtype=dtype),
        normal(t, d, seed=2, dtype=dtype),
        weight,
    ]


def oracle(x, key, value, weight, eps=1e-20, clamp=1e-6):
    """Contracts 3.1 (e) and (g), differentiable, in float64."""
    x, key, value, weight = (a.double() for a in (x, key, value, weight))
    hx = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    hk = key / (key.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    dot = (hx * weight * hk).sum(-1) / x.shape[-1] ** 0.5
    s = dot.abs().clamp_min(clamp).sqrt()
    gate = torch.sigmoid(torch.where(torch.signbit(dot), -s, s))
    return x + gate[..., None] * value[:, None]


def calc_diff(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    total = float((a * a + b * b).sum())
    return 0.0 if total == 0 else 1 - 2 * float((a * b).sum()) / total


def test_float32_meets_the_published_thresholds():
    """Contracts 14: calc_diff < 2e-10 forward, 1e-8 backward, 1e-10 for the weight's gradient."""
    call = inputs(torch.float32)
    dy = normal(T, R, D, seed=9, dtype=torch.float32)
    wide = [a.double().requires_grad_() for a in call]
    want = oracle(*wide)
    grads = torch.autograd.grad(want, wide, dy.double())
    assert calc_diff(transom.engram_gate(*call, eps=1e-20), want) < 2e-10
    got = engram_gate_backward(dy, *call, eps=1e-20)
    limits = (1e-8, 1e-8, 1e-8, 1e-10)
    for a, b, limit in zip(got, grads, limits, strict=True):
        assert calc_diff(a, b) < limit


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_lies_near_the_oracle(dtype, limit):
    call = inputs(dtype)
    want = oracle(*call)
    got = transom.engram_gate(*call, eps=1e-20)
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max() / want.abs().max()) <= limit


def test_gradients_agree_with_finite_differences():
    call = [a.requires_grad_() for a in inputs(t=2, d=5)]
    assert torch.autograd.gradcheck(lambda *a: transom.engram_gate(*a, eps=1e-6), call)
    mask = torch.tensor([True, False])
    assert torch.autograd.gradcheck(
        lambda *a: transom.engram_gate(*a, eps=1e-6, mask=mask, residual=False), call
    )


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_edge_61_a_dot_of_zero_counts_as_positive_and_has_no_gradient(zero):
    """sigmoid(1e-3), not 0.5 as a sign function would give."""
    x = torch.full((1, 1, 2), zero, dtype=torch.float64, requires_grad=True)
    key = torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=True)
    value, weight = torch.ones(1, 2).double(), torch.ones(1, 2).double()
    y = transom.engram_gate(x, key, value, weight, eps=1e-20)
    torch.testing.assert_close(y, torch.full_like(y, 0.500249999979167), rtol=0, atol=1e-15)
    dx, dkey = torch.autograd.grad(y.sum(), (x, key))
    assert torch.equal(dx, torch.ones_like(dx)) and not dkey.any()


def test_edge_61_below_the_clamp_the_gate_is_constant():
    x = torch.tensor([[[1.0, 1e-8]]], dtype=torch.float64)
    key = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    value, weight = torch.ones(1, 2).double(), torch.ones(1, 2).double()
    _, dkey, _, dweight = engram_gate_backward(torch.ones_like(x), x, key, value, weight, eps=1e-20)
    assert not dkey.any() and not dweight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edge_65_masked_tokens_return_x_bit_for_bit_and_read_nothing(dtype):
    x, key, value, weight = inputs(dtype, t=6, d=16)
    mask = torch.tensor([True, False, True, False, False, True])
    key[~mask], value[~mask] = float("nan"), float("inf")
    y = transom.engram_gate(x, key, value, weight, eps=1e-20, mask=mask)
    assert torch.equal(y[~mask], x[~mask]) and bool(y.isfinite().all())
    alone = transom.engram_gate(x[mask], key[mask], value[mask], weight, eps=1e-20)
    assert torch.equal(y[mask], alone)


def test_edge_65_masked_tokens_pass_the_gradient_through():
    x, key, value, weight = inputs(torch.float32, t=4, d=16)
    mask = torch.tensor([True, False, True, False])
    key[~mask], value[~mask] = float("nan"), float("nan")
    dy = normal(4, R, 16, seed=5, dtype=torch.float32)
    dx, dkey, dvalue, dweight = engram_gate_backward(
        dy, x, key, value, weight, eps=1e-20, mask=mask
    )
    assert torch.equal(dx[~mask], dy[~mask])
    assert not dkey[~mask].any() and not dvalue[~mask].any() and bool(dweight.isfinite().all())
    dx, *_ = engram_gate_backward(dy, x, key, value, weight, eps=1e-20, mask=mask, residual=False)
    assert not dx[~mask].any()


def test_without_the_residual_the_gated_value_is_left():
    x, key, value, weight = inputs()
    y = transom.engram_gate(x, key, value, weight, eps=1e-20)
    part = transom.engram_gate(x, key, value, weight, eps=1e-20, residual=False)
    torch.testing.assert_close(x + part, y)


def test_edge_51_no_tokens():
    x, key, value, weight = inputs(torch.float32, t=0)
    assert transom.engram_gate(x, key, value, weight, eps=1e-20).shape == (0, R, D)
    assert not engram_gate_backward(x, x, key, value, weight, eps=1e-20)[3].any()


def test_zero_rows_give_finite_gradients():
    x, key, value, weight = (torch.zeros_like(a) for a in inputs(torch.float32, t=2, d=8))
    for grad in engram_gate_backward(torch.ones_like(x), x, key, value, weight, eps=1e-20):
        assert bool(grad.isfinite().all())


def test_blocks_of_any_size_give_the_same_result(monkeypatch):
    call = inputs(torch.float32)
    dy = normal(T, R, D, seed=9, dtype=torch.float32)
    y, grads = transom.engram_gate(*call, eps=1e-20), engram_gate_backward(dy, *call, eps=1e-20)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.2")
    torch.testing.assert_close(y, transom.engram_gate(*call, eps=1e-20))
    for a, b in zip(grads, engram_gate_backward(dy, *call, eps=1e-20), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", [8, 100, 576])
def test_a_token_has_the_same_bits_alone_and_among_many(d):
    *streams, weight = inputs(torch.float32, t=77, d=d)
    whole = transom.engram_gate(*streams, weight, eps=1e-20)
    for t in range(77):
        alone = transom.engram_gate(*(a[t : t + 1] for a in streams), weight, eps=1e-20)
        assert torch.equal(alone[0], whole[t])


def test_gradients_repeat_bit_for_bit():
    call = inputs(torch.bfloat16)
    dy = normal(T, R, D, seed=9, dtype=torch.bfloat16)
    first = engram_gate_backward(dy, *call, eps=1e-20)
    for _ in range(19):
        again = engram_gate_backward(dy, *call, eps=1e-20)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_leading_dims_and_vmap_are_free():
    x, key, value, weight = inputs(t=6, d=8)
    y = transom.engram_gate(x, key, value, weight, eps=1e-20)
    split = [a.unflatten(0, (2, 3)) for a in (x, key, value)]
    assert torch.equal(transom.engram_gate(*split, weight, eps=1e-20).flatten(0, 1), y)
    each = torch.vmap(lambda *a: transom.engram_gate(*a, weight, eps=1e-20))(*split)
    assert torch.equal(each.flatten(0, 1), y)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(clamp=0.0), "engram_gate: clamp is 0.0; must be > 0"),
        (dict(eps=-1.0), "engram_gate: eps is -1.0; must be >= 0"),
        (
            dict(mask=torch.ones(T + 1, dtype=torch.bool)),
            "engram_gate: mask has T = [34]; x has T = [33]",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(change, text):
    with pytest.raises(ValueError) as error:
        transom.engram_gate(*inputs(), **{"eps": 1e-20, **change})
    assert str(error.value).startswith(text)


def test_the_composite_ran_forward_and_backward():
    x, *rest = inputs(t=2)
    with transom.record() as calls:
        transom.engram_gate(x.requires_grad_(), *rest, eps=1e-20).sum().backward()
    assert [(c.op, c.impl) for c in calls] == [
        ("engram_gate", "composite"),
        ("engram_gate_backward", "composite"),
    ]
