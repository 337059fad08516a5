"""short_conv: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.engram.short_conv import short_conv_backward

B, S, C, K, DILATION = 2, 14, 6, 4, 3
REACH = (K - 1) * DILATION


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def oracle(v: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
    """torch's own convolution over the padded rows, in float64."""
    if before is None:
        before = v.new_zeros(v.shape[0], REACH, v.shape[2])
    rows = torch.cat([before, v], 1).double().transpose(1, 2)
    z = torch.nn.functional.conv1d(
        rows, weight.double()[:, None], dilation=DILATION, groups=weight.shape[0]
    )
    return torch.nn.functional.silu(z).transpose(1, 2)


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float64, 1e-14), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)]
)
def test_is_a_causal_depthwise_convolution(dtype, limit):
    v, weight = normal(B, S, C, dtype=dtype), normal(C, K, dtype=dtype)
    y, _ = transom.short_conv(v, weight, dilation=DILATION)
    want = oracle(v, weight)
    assert y.dtype == dtype
    assert float((y.double() - want).abs().max() / want.abs().max()) <= limit


def test_edge_62_the_state_is_the_last_nine_rows():
    v, weight = normal(B, S, C), normal(C, K)
    _, state = transom.short_conv(v, weight, dilation=DILATION)
    assert REACH == 9
    assert torch.equal(state, v[:, -9:])


@pytest.mark.parametrize("short", range(9))
def test_edge_62_a_sequence_shorter_than_the_state(short):
    v, weight = normal(B, S, C), normal(C, K)
    y, state = transom.short_conv(v[:, :short], weight, dilation=DILATION)
    torch.testing.assert_close(y, oracle(v, weight)[:, :short])
    assert not state[:, : 9 - short].any()
    assert torch.equal(state[:, 9 - short :], v[:, :short])


@pytest.mark.parametrize("cut", [1, 4, 8, 9, 10, 13])
def test_edge_60_chunks_with_state_equal_the_whole(cut):
    v, weight = normal(B, S, C), normal(C, K)
    whole, last = transom.short_conv(v, weight, dilation=DILATION)
    first, state = transom.short_conv(v[:, :cut], weight, dilation=DILATION)
    second, state = transom.short_conv(v[:, cut:], weight, dilation=DILATION, state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert torch.equal(state, last)


def test_edge_60_token_by_token_decode_equals_the_whole():
    v, weight = normal(B, S, C), normal(C, K)
    whole, _ = transom.short_conv(v, weight, dilation=DILATION)
    state = None
    for s in range(S):
        y, state = transom.short_conv(v[:, s : s + 1], weight, dilation=DILATION, state=state)
        torch.testing.assert_close(y[:, 0], whole[:, s])


def test_edge_62_zero_weights_give_zeros():
    v = normal(B, S, C)
    assert not transom.short_conv(v, torch.zeros(C, K).double(), dilation=DILATION)[0].any()


def test_taps_are_read_dilation_rows_apart():
    v = torch.zeros(1, 12, 1, dtype=torch.float64)
    v[0, 0] = 1
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double()
    y, _ = transom.short_conv(v, weight, dilation=DILATION)
    assert y[0, :, 0].nonzero().flatten().tolist() == [0, 3, 6, 9]
    torch.testing.assert_close(y[0, [0, 3, 6, 9], 0], torch.nn.functional.silu(weight[0].flip(0)))


def test_one_tap_has_no_state():
    v, weight = normal(B, S, C), normal(C, 1)
    y, state = transom.short_conv(v, weight, dilation=DILATION)
    assert state.shape == (B, 0, C)
    torch.testing.assert_close(y, torch.nn.functional.silu(v * weight[:, 0]))


@pytest.mark.parametrize("s", [0, 1, 5, 11])
def test_gradients_agree_with_finite_differences(s):
    v, weight = normal(B, s, 2).requires_grad_(), normal(2, K).requires_grad_()
    state = normal(B, REACH, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, w, st: transom.short_conv(v, w, dilation=DILATION, state=st), (v, weight, state)
    )


def test_the_gradient_flows_through_the_state():
    v, weight = normal(B, S, C).requires_grad_(), normal(C, K)
    whole = torch.autograd.grad(transom.short_conv(v, weight, dilation=DILATION)[0].sum(), v)[0]
    first, state = transom.short_conv(v[:, :5], weight, dilation=DILATION)
    second, _ = transom.short_conv(v[:, 5:], weight, dilation=DILATION, state=state)
    torch.testing.assert_close(torch.autograd.grad(first.sum() + second.sum(), v)[0], whole)


def test_blocks_of_any_size_give_the_same_result(monkeypatch):
    v, weight = normal(B, S, C), normal(C, K)
    dy, dstate = normal(B, S, C, seed=2), normal(B, REACH, C, seed=3)
    y = transom.short_conv(v, weight, dilation=DILATION)[0]
    grads = short_conv_backward(dy, dstate, v, weight, dilation=DILATION)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.002")
    torch.testing.assert_close(y, transom.short_conv(v, weight, dilation=DILATION)[0])
    again = short_conv_backward(dy, dstate, v, weight, dilation=DILATION)
    for a, b in zip(grads, again, strict=True):
        torch.testing.assert_close(a, b)


def test_a_state_of_another_length_is_refused():
    with pytest.raises(
        ValueError, match=r"short_conv: state has 8 .*expected \(K-1\)\*dilation = 9"
    ):
        transom.short_conv(normal(B, S, C), normal(C, K), dilation=3, state=normal(B, 8, C))
    with pytest.raises(ValueError, match="short_conv: dilation is 0; must be >= 1"):
        transom.short_conv(normal(B, S, C), normal(C, K), dilation=0)
