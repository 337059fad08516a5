"""mhc_pre: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.mhc.mhc_pre import mhc_pre_backward

T, R, D = 9, 4, 80
ARGS = dict(iterations=20, eps=1e-6, rms_eps=1e-6, post_scale=2.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64, t: int = T, r: int = R, d: int = D) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = (2 + r) * r
    return [
        normal(t, r, d, dtype=dtype),
        normal(rows, r * d, seed=1, dtype=wide) / 4,
        normal(3, seed=2, dtype=wide),
        normal(rows, seed=3, dtype=wide),
    ]


def oracle(x, fn, scale, base, iterations, eps, rms_eps, post_scale):
    """Contracts 2.1, line by line, differentiable, in float64."""
    x, fn, scale, base = (a.double() for a in (x, fn, scale, base))
    r = x.shape[-2]
    xf = x.flatten(-2)
    mix = (xf @ fn.T) * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + rms_eps)
    pre = torch.sigmoid(mix[:, :r] * scale[0] + base[:r]) + eps
    post = post_scale * torch.sigmoid(mix[:, r : 2 * r] * scale[1] + base[r : 2 * r])
    m = torch.softmax((mix[:, 2 * r :] * scale[2] + base[2 * r :]).view(-1, r, r), -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return (pre[..., None] * x).sum(-2), post, m


def calc_diff(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return 1 - 2 * float((a * b).sum()) / float((a * a + b * b).sum())


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_lies_near_the_oracle(dtype, limit):
    call = inputs(dtype)
    got, want = transom.mhc_pre(*call, **ARGS), oracle(*call, **ARGS)
    assert [a.dtype for a in got] == [dtype, torch.float32, torch.float32]
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) <= limit


def test_edge_71_widths_that_are_no_power_of_two_meet_the_threshold_of_the_product():
    """Contracts 14: calc_diff < 1e-8, at 4*7168 = 28672 terms."""
    call = inputs(torch.bfloat16, t=3, d=7168)
    call[1] = call[1] / 40
    for a, b in zip(transom.mhc_pre(*call, **ARGS)[1:], oracle(*call, **ARGS)[1:], strict=True):
        assert calc_diff(a, b) < 1e-8


@pytest.mark.parametrize("t", [0, 1, 7])
def test_edge_70_any_number_of_tokens(t):
    call = inputs(t=t)
    h, post, comb = transom.mhc_pre(*call, **ARGS)
    assert h.shape == (t, D) and post.shape == (t, R) and comb.shape == (t, R, R)
    for a, b in zip((h, post, comb), oracle(*call, **ARGS), strict=True):
        torch.testing.assert_close(a, b)


def test_edge_72_zero_streams_leave_the_base_terms():
    x, fn, scale, base = inputs()
    h, post, comb = transom.mhc_pre(torch.zeros_like(x), fn, scale, base, **ARGS)
    assert not h.any()
    torch.testing.assert_close(post, 2 * torch.sigmoid(base[R : 2 * R]).expand(T, R))
    want = transom.sinkhorn(base[2 * R :].view(1, R, R), iterations=20, eps=1e-6)
    torch.testing.assert_close(comb, want.expand(T, R, R))


def test_edge_72_the_gradient_at_zero_streams_is_finite():
    x, fn, scale, base = inputs(torch.float32)
    grads = mhc_pre_backward(
        torch.ones(T, D), torch.ones(T, R), torch.ones(T, R, R), 0 * x, fn, scale, base, **ARGS
    )
    assert all(bool(g.isfinite().all()) for g in grads)


def test_edge_75_one_stream():
    call = inputs(r=1)
    for a, b in zip(transom.mhc_pre(*call, **ARGS), oracle(*call, **ARGS), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("r, iterations", [(1, 1), (2, 3), (4, 4)])
def test_gradients_agree_with_finite_differences(r, iterations):
    call = [a.requires_grad_() for a in inputs(t=2, r=r, d=3)]
    args = {**ARGS, "iterations": iterations, "rms_eps": 1e-3}
    assert torch.autograd.gradcheck(lambda *a: transom.mhc_pre(*a, **args), call)


def test_float32_gradients_agree_with_the_oracle():
    call = [a.requires_grad_() for a in inputs(torch.float32)]
    wide = [a.detach().double().requires_grad_() for a in call]
    got, want = transom.mhc_pre(*call, **ARGS), oracle(*wide, **ARGS)
    dy = [normal(*a.shape, seed=7) for a in want]
    grads = torch.autograd.grad(got, call, [a.to(g.dtype) for a, g in zip(dy, got, strict=True)])
    for a, b in zip(grads, torch.autograd.grad(want, wide, dy), strict=True):
        assert a.dtype == torch.float32
        assert float((a.double() - b).abs().max() / b.abs().max()) <= 2e-5


def test_an_output_that_nobody_used_has_no_part_in_the_gradient():
    call = [a.requires_grad_() for a in inputs(t=2, d=5)]
    wide = [a.detach().requires_grad_() for a in call]
    got = torch.autograd.grad(transom.mhc_pre(*call, **ARGS)[0].sum(), call)
    want = torch.autograd.grad(oracle(*wide, **ARGS)[0].sum(), wide, materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_parameters_get_bfloat16_gradients():
    call = [a.bfloat16().requires_grad_() for a in inputs()]
    for a in torch.autograd.grad(transom.mhc_pre(*call, **ARGS)[0].sum(), call):
        assert a.dtype == torch.bfloat16


def test_blocks_leading_dims_and_vmap(monkeypatch):
    x, *rest = inputs(t=12)
    whole = transom.mhc_pre(x, *rest, **ARGS)
    split = x.unflatten(0, (3, 4))
    each = torch.vmap(lambda a: transom.mhc_pre(a, *rest, **ARGS))(split)
    for a, b, c in zip(transom.mhc_pre(split, *rest, **ARGS), each, whole, strict=True):
        torch.testing.assert_close(a.flatten(0, 1), c)
        torch.testing.assert_close(b.flatten(0, 1), c)
    dy = [torch.ones_like(a) for a in whole]
    grads = mhc_pre_backward(*dy, x, *rest, **ARGS)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.02")
    again = transom.mhc_pre(x, *rest, **ARGS), mhc_pre_backward(*dy, x, *rest, **ARGS)
    for a, b in zip((*whole, *grads), (*again[0], *again[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_token_has_the_same_bits_alone_and_among_many(deterministic):
    x, *rest = inputs(torch.float32, t=77)
    whole = transom.mhc_pre(x, *rest, **ARGS)
    grads = [normal(*y.shape, seed=9, dtype=y.dtype) for y in whole]
    dx = mhc_pre_backward(*grads, x, *rest, **ARGS)[0]
    for t in (0, 1, 31, 32, 50, 76):
        one = slice(t, t + 1)
        alone = transom.mhc_pre(x[one], *rest, **ARGS)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, whole, strict=True))
        own = mhc_pre_backward(*(g[one] for g in grads), x[one], *rest, **ARGS)[0]
        assert torch.equal(own, dx[one])


def test_gradients_repeat_bit_for_bit():
    call = inputs(torch.bfloat16)
    dy = [torch.ones_like(a) for a in transom.mhc_pre(*call, **ARGS)]
    first = mhc_pre_backward(*dy, *call, **ARGS)
    for _ in range(19):
        again = mhc_pre_backward(*dy, *call, **ARGS)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(iterations=0), "mhc_pre: iterations is 0; must be >= 1"),
        (dict(eps=-1.0), "mhc_pre: eps is -1.0; must be >= 0"),
        (dict(rms_eps=-1.0), "mhc_pre: rms_eps is -1.0; must be >= 0"),
    ],
)
def test_bad_arguments_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        transom.mhc_pre(*inputs(), **{**ARGS, **change})


def test_a_head_s_fn_is_refused():
    x, fn, scale, base = inputs()
    with pytest.raises(ValueError, match=r"mhc_pre: fn has 4 where .* expected \(2\+R\)\*R = 24"):
        transom.mhc_pre(x, fn[:R], scale, base, **ARGS)


def test_the_composite_ran_forward_and_backward():
    call = [a.requires_grad_() for a in inputs(t=2)]
    with transom.record() as calls:
        sum(a.sum() for a in transom.mhc_pre(*call, **ARGS)).backward()
    assert [(c.op, c.impl) for c in calls] == [
        ("mhc_pre", "composite"),
        ("mhc_pre_backward", "composite"),
    ]
