"""Native short_conv and its gradient: chunks, taps, layouts, threads."""

from __future__ import annotations

import pytest
import torch

import transom
from transom.kernels.engram.short_conv import short_conv_backward

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def run(op, *args, impl="native", **kwargs):
    with transom.use(impl), transom.record() as calls:
        out = op(*args, **kwargs)
    assert [(c.op, c.impl) for c in calls] == [(op.name, impl)]
    return out


def call(B=2, S=13, C=70, K=4, dilation=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    reach = (K - 1) * dilation
    v, dy = (torch.randn(B, S, C, generator=g).to(dtype) for _ in range(2))
    state, dnew = (torch.randn(B, reach, C, generator=g).to(dtype) for _ in range(2))
    return v, torch.randn(C, K, generator=g), state, dy, dnew


def agree(dtype, **sizes):
    dilation = sizes.get("dilation", 3)
    v, weight, state, dy, dnew = call(dtype=dtype, **sizes)
    for given in (state, None):
        options = dict(dilation=dilation, state=given)
        y, kept = run(transom.short_conv, v, weight, **options)
        want, rows = run(transom.short_conv, v, weight, impl="reference", **options)
        assert torch.equal(kept, rows)
        got = (y, *run(short_conv_backward, dy, dnew, v, weight, **options))
        expected = run(short_conv_backward, dy, dnew, v, weight, impl="reference", **options)
        for a, b in zip(got, (want, *expected), strict=True):
            scale = float(b.abs().max()) if b.numel() else 0.0
            limit = 1.01 * torch.finfo(a.dtype).eps * b.double().abs() + 1e-5 * scale
            assert ((a.double() - b.double()).abs() <= limit).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", [1, 9, 255, 257, 1025])
def test_channels_around_the_blocks(dtype, C):
    agree(dtype, B=1, S=6, C=C)


@pytest.mark.parametrize("K, dilation", [(1, 1), (1, 5), (2, 1), (3, 4), (4, 3), (5, 2), (9, 7)])
@pytest.mark.parametrize("S", [0, 1, 2, 9, 10, 70, 130])
def test_taps_and_rows_before_and_behind_the_reach(K, dilation, S):
    agree(torch.float32, S=S, C=19, K=K, dilation=dilation)


@pytest.mark.parametrize("cut", [0, 1, 5, 9, 12, 13])
def test_chunks_with_their_state_equal_the_whole_bit_for_bit(cut):
    v, weight, state, *_ = call(dtype=torch.bfloat16)
    whole, last = run(transom.short_conv, v, weight, dilation=3, state=state)
    first, kept = run(transom.short_conv, v[:, :cut], weight, dilation=3, state=state)
    second, kept = run(transom.short_conv, v[:, cut:], weight, dilation=3, state=kept)
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(kept, last)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_layout_gives_the_same_bits(dtype):
    v, weight, state, dy, dnew = call(dtype=dtype)
    want = run(transom.short_conv, v, weight, dilation=3, state=state)
    back = run(short_conv_backward, dy, dnew, v, weight, dilation=3, state=state)

    def spread(t):
        return torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2].copy_(t)

    def turned(t):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    for change in (spread, turned):
        a, w, s, d, e = (change(t) for t in (v, weight, state, dy, dnew))
        got = run(transom.short_conv, a, w, dilation=3, state=s)
        again = run(short_conv_backward, d, e, a, w, dilation=3, state=s)
        for x, y in zip((*got, *again), (*want, *back), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("B, S", [(1, 1), (64, 1), (1, 300), (3, 90)])
def test_the_same_bits_at_any_number_of_threads(B, S):
    v, weight, state, dy, dnew = call(B=B, S=S, C=530, dtype=torch.bfloat16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(
            (
                *run(transom.short_conv, v, weight, dilation=3, state=state),
                *run(short_conv_backward, dy, dnew, v, weight, dilation=3, state=state),
            )
        )
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_long_sum_of_the_weights_gradient_stays_accurate():
    v, weight, state, dy, dnew = call(B=1, S=6000, C=8)
    got = run(short_conv_backward, dy.abs(), dnew, v.abs(), weight.abs(), dilation=3, state=state)
    rows = [t.double() for t in (dy.abs(), dnew, v.abs(), weight.abs())]
    want = run(short_conv_backward, *rows, impl="composite", dilation=3, state=state.double())
    assert float((got[1] / want[1] - 1).abs().max()) < 2e-6


def test_the_rows_of_a_state_keep_their_bits():
    v, weight, state, *_ = call(dtype=torch.bfloat16, S=2)
    state.view(torch.int16)[0, 5] = 0x7FA5
    _, kept = run(transom.short_conv, v, weight, dilation=3, state=state)
    assert torch.equal(kept.view(torch.int16)[:, :7], state.view(torch.int16)[:, 2:])
