"""The native compressor: what the kit cannot know of chunks, channels at once and threads."""

from __future__ import annotations

import pytest
import torch

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def made(B=1, S=37, D=24, m=4, overlap=True, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = D * (1 + overlap)
    kv, gate = torch.randn(2, B, S, W, generator=g).to(dtype)
    return kv, gate, torch.randn(m, W, generator=g)


def run(kv, gate, bias, overlap, state=None, impl="native"):
    with transom.use(impl), transom.record() as calls:
        entries, state = transom.compress_kv(kv, gate, bias, overlap=overlap, state=state)
    assert [c.impl for c in calls] == [impl]
    return entries, state


def gradients(kv, gate, bias, overlap, impl="native"):
    leaves = [x.clone().requires_grad_() for x in (kv, gate, bias)]
    with transom.use(impl), transom.record() as calls:
        half = kv.shape[1] // 2
        first, state = transom.compress_kv(
            leaves[0][:, :half], leaves[1][:, :half], leaves[2], overlap=overlap
        )
        rest, state = transom.compress_kv(
            leaves[0][:, half:], leaves[1][:, half:], leaves[2], overlap=overlap, state=state
        )
        both = torch.cat([first, rest], 1).float()
        (both.square().sum() + state.kv.sum()).backward()
    assert {c.impl for c in calls} == {impl}
    return [x.grad for x in leaves]


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("m", [1, 4, 128])
def test_chunks_give_the_bits_of_the_whole(m, overlap):
    kv, gate, bias = made(2, 300, 40, m, overlap)
    want, last = run(kv, gate, bias, overlap)
    for sizes in ([1, 2, 3, 4, 290], [127, 1, 1, 171], [300]):
        state, found = None, []
        for a, b in zip(kv.split(sizes, 1), gate.split(sizes, 1), strict=True):
            entries, state = run(a, b, bias, overlap, state)
            found.append(entries)
        assert torch.equal(torch.cat(found, 1), want)
        assert torch.equal(state.kv, last.kv) and torch.equal(state.gate, last.gate)


@pytest.mark.parametrize("D", [1, 15, 16, 17, 511, 513, 1030])
@pytest.mark.parametrize("overlap", [False, True])
def test_across_the_edges_of_the_channels_at_once(D, overlap):
    args = made(1, 19, D, 4, overlap)
    got, state = run(*args, overlap)
    want, expected = run(*args, overlap, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.kv, expected.kv, rtol=0, atol=0)


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_through_the_state_agree_with_the_composite(overlap):
    args = made(2, 31, 40, 4, overlap)
    for got, want in zip(
        gradients(*args, overlap), gradients(*args, overlap, impl="composite"), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_at_any_number_of_threads(threads, dtype):
    args = made(2, 700, 600, 4, True, dtype)
    threads(1)
    one, grads = run(*args, True)[0], gradients(*args, True)
    for n in (2, 3, 7):
        threads(n)
        assert torch.equal(run(*args, True)[0], one)
        assert all(map(torch.equal, gradients(*args, True), grads))


def test_slots_that_are_left_out_may_hold_anything():
    kv, gate, bias = made(1, 8, 16, 4, True)
    gate[0, 2], kv[0, 2] = -torch.inf, torch.nan
    gate[0, :, 3] = gate[0, :, 19] = -torch.inf  # a channel without any slot
    got = run(kv, gate, bias, True)[0]
    assert torch.isfinite(got).all() and (got[0, :, 3] == 0).all()
    torch.testing.assert_close(got, run(kv, gate, bias, True, impl="reference")[0])


def test_strided_inputs_are_read_where_they_lie():
    kv, gate, bias = made(2, 21, 24)
    want = run(kv, gate, bias, True)[0]
    wide = torch.full((2, 21, 2, 97), torch.nan)
    wide[:, :, 0, 1::2], wide[:, :, 1, :48] = kv, gate
    got = run(wide[:, :, 0, 1::2], wide[:, :, 1, :48], bias.T.contiguous().T, True)[0]
    assert torch.equal(got, want)


def test_float64_is_declined_with_a_sentence():
    kv, gate, bias = made(dtype=torch.float64)
    (shown,) = transom.explain("compress_kv", kv, gate, bias.double(), overlap=True).rejected[
        "native"
    ]
    assert shown == "kv is float64; supported: float32, bfloat16, float16"
