"""mhc_post: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.mhc.mhc_post import mhc_post_backward

T, R, D = 9, 4, 80


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64, t: int = T, r: int = R, d: int = D) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        normal(t, d, dtype=dtype),
        normal(t, r, d, seed=1, dtype=dtype),
        normal(t, r, seed=2, dtype=wide),
        normal(t, r, r, seed=3, dtype=wide),
    ]


def oracle(f, x, post, comb):
    f, x, post, comb = (a.double() for a in (f, x, post, comb))
    return torch.einsum("tk,td->tkd", post, f) + torch.einsum("tjk,tjd->tkd", comb, x)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_lies_near_the_oracle(dtype, limit):
    call = inputs(dtype)
    got, want = transom.mhc_post(*call), oracle(*call)
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max() / want.abs().max()) <= limit


def test_edge_68_comb_contracts_its_first_axis():
    """comb[j,k]: how much of stream j goes to stream k; transposes of doubly stochastic matrices
    are so too."""
    f, x, post, _ = inputs(t=1)
    comb = torch.zeros(1, R, R, dtype=torch.float64)
    comb[0, 0, 2] = 1
    y = transom.mhc_post(f, x, 0 * post, comb)
    assert torch.equal(y[0, 2], x[0, 0]) and not y[0, [0, 1, 3]].any()


def test_identity_comb_and_post_of_one_are_a_plain_residual():
    f, x, post, _ = inputs()
    y = transom.mhc_post(f, x, torch.ones_like(post), torch.eye(R).double().expand(T, R, R))
    torch.testing.assert_close(y, x + f[:, None])


@pytest.mark.parametrize("t", [0, 1, 7])
def test_edge_70_any_number_of_tokens(t):
    call = inputs(t=t)
    torch.testing.assert_close(transom.mhc_post(*call), oracle(*call))


def test_edge_71_widths_that_are_no_power_of_two():
    call = inputs(t=2, d=7168)
    torch.testing.assert_close(transom.mhc_post(*call), oracle(*call))


def test_edge_74_bfloat16_streams_stay_near_float32_over_122_sublayers():
    """One rounding a sublayer and no other: the drift stays a random walk of half units."""
    _, narrow, _, _ = inputs(torch.bfloat16)
    wide = narrow.double()
    for layer in range(122):
        f = normal(T, D, seed=layer) / 8
        comb = transom.sinkhorn(normal(T, R, R, seed=layer), iterations=20, eps=1e-6)
        post = torch.ones(T, R, dtype=torch.float64)
        wide = transom.mhc_post(f, wide, post, comb)
        narrow = transom.mhc_post(f.bfloat16(), narrow, post.float(), comb.float())
    assert float((narrow.double() - wide).norm() / wide.norm()) < 122**0.5 * 2**-8


def test_edge_76_the_output_is_new_memory():
    f, x, post, comb = inputs()
    before = x.clone()
    y = transom.mhc_post(f, x, post, comb)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(x, before)


@pytest.mark.parametrize("r", [1, 3])
def test_gradients_agree_with_finite_differences(r):
    call = [a.requires_grad_() for a in inputs(t=2, r=r, d=3)]
    assert torch.autograd.gradcheck(transom.mhc_post, call)


def test_gradients_of_post_and_comb_are_near_the_oracle():
    """Contracts 2.3: coefficient gradients to 1e-4."""
    call = [a.requires_grad_() for a in inputs(torch.float32)]
    wide = [a.detach().double().requires_grad_() for a in call]
    dy = normal(T, R, D, seed=5)
    got = torch.autograd.grad(transom.mhc_post(*call), call, dy.float())
    want = torch.autograd.grad(oracle(*wide), wide, dy)
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) <= 2e-5


def test_blocks_leading_dims_and_vmap(monkeypatch):
    call = inputs(t=12)
    whole = transom.mhc_post(*call)
    split = [a.unflatten(0, (3, 4)) for a in call]
    torch.testing.assert_close(transom.mhc_post(*split).flatten(0, 1), whole)
    torch.testing.assert_close(torch.vmap(transom.mhc_post)(*split).flatten(0, 1), whole)
    grads = mhc_post_backward(whole, *call)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.02")
    torch.testing.assert_close(transom.mhc_post(*call), whole)
    for a, b in zip(grads, mhc_post_backward(whole, *call), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_keeps_the_streams_in_float32():
    f, x, post, comb = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = transom.mhc_post(f.bfloat16(), x, post, comb)
    assert y.dtype == torch.float32


def test_bad_shapes_are_refused():
    f, x, post, comb = inputs()
    with pytest.raises(ValueError, match="mhc_post: post has T = .*; f has T = "):
        transom.mhc_post(f, x, post[1:], comb)
    with pytest.raises(TypeError, match="mhc_post: f is float32; expected float64"):
        transom.mhc_post(f.float(), x, post, comb)
