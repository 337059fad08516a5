"""mhc_head: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.mhc.mhc_head import mhc_head_backward

T, R, D = 9, 4, 80
ARGS = dict(eps=1e-6, rms_eps=1e-6)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64, t: int = T, r: int = R, d: int = D) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        normal(t, r, d, dtype=dtype),
        normal(r, r * d, seed=1, dtype=wide) / 4,
        normal(1, seed=2, dtype=wide),
        normal(r, seed=3, dtype=wide),
    ]


def oracle(x, fn, scale, base, eps, rms_eps):
    x, fn, scale, base = (a.double() for a in (x, fn, scale, base))
    xf = x.flatten(-2)
    mix = (xf @ fn.T) * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + rms_eps)
    return ((torch.sigmoid(mix * scale + base) + eps)[..., None] * x).sum(-2)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_lies_near_the_oracle(dtype, limit):
    call = inputs(dtype)
    got, want = transom.mhc_head(*call, **ARGS), oracle(*call, **ARGS)
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max() / want.abs().max()) <= limit


def test_is_the_first_output_of_mhc_pre_with_the_same_rows():
    x, fn, scale, base = inputs()
    rows = (2 + R) * R
    h, _, _ = transom.mhc_pre(
        x,
        torch.cat([fn, normal(rows - R, R * D)]),
        scale.repeat(3),
        torch.cat([base, normal(rows - R)]),
        iterations=3,
        post_scale=2.0,
        **ARGS,
    )
    torch.testing.assert_close(transom.mhc_head(x, fn, scale, base, **ARGS), h)


@pytest.mark.parametrize("t", [0, 1, 7])
def test_edge_70_any_number_of_tokens(t):
    call = inputs(t=t)
    torch.testing.assert_close(transom.mhc_head(*call, **ARGS), oracle(*call, **ARGS))


def test_edge_72_zero_streams_give_zeros():
    x, *rest = inputs()
    assert not transom.mhc_head(0 * x, *rest, **ARGS).any()


@pytest.mark.parametrize("r", [1, 3])
def test_gradients_agree_with_finite_differences(r):
    call = [a.requires_grad_() for a in inputs(t=2, r=r, d=3)]
    assert torch.autograd.gradcheck(lambda *a: transom.mhc_head(*a, eps=1e-6, rms_eps=1e-3), call)


def test_blocks_and_leading_dims(monkeypatch):
    x, *rest = inputs(t=12)
    whole = transom.mhc_head(x, *rest, **ARGS)
    split = transom.mhc_head(x.unflatten(0, (3, 4)), *rest, **ARGS)
    torch.testing.assert_close(split.flatten(0, 1), whole)
    grads = mhc_head_backward(whole, x, *rest, **ARGS)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.02")
    torch.testing.assert_close(transom.mhc_head(x, *rest, **ARGS), whole)
    for a, b in zip(grads, mhc_head_backward(whole, x, *rest, **ARGS), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="mhc_head: eps is -1.0; must be >= 0"):
        transom.mhc_head(*inputs(), eps=-1.0, rms_eps=1e-6)
