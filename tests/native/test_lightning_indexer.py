"""The native indexer: what the kit cannot know of panels, shares of keys, lists of candidates."""

from __future__ import annotations

import pytest
import torch

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def whole_numbers(B=1, S=5, N=700, H=3, D=20, seed=0, high=3):
    """Scores that are exact in any order of their sums, and often equal."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(-2, high, (B, S, H, D), generator=g).float()
    k = torch.randint(-2, high, (B, N, D), generator=g).float()
    weights = torch.randint(-2, 4, (B, S, H), generator=g) / 2
    visible = torch.randint(0, N + 1, (B, S), generator=g)
    return q, k, weights, visible


def select(q, k, weights, visible, top_k, impl="native"):
    with transom.use(impl), transom.record() as calls:
        indices = transom.lightning_indexer(q, k, weights, top_k, visible=visible)
    assert [c.impl for c in calls] == [impl]
    return indices


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("D", [1, 7, 128, 256, 257, 600])
@pytest.mark.parametrize("N", [1, 15, 16, 17, 33, 300])
def test_across_the_edges_of_panels_and_pieces(N, D):
    q, k, weights, visible = whole_numbers(2, 3, N, 2, D, N + D)
    for top_k in (1, 16, 40):
        want = select(q, k, weights, visible, top_k, "reference")
        assert torch.equal(select(q, k, weights, visible, top_k), want)


@pytest.mark.parametrize("top_k", [1, 64, 1000, 1024, 1500])
def test_lists_that_are_cut_many_times_keep_the_first_of_equal_scores(top_k):
    args = whole_numbers(1, 2, 6000, 1, 2, top_k)  # a few dozen different scores
    args[3].fill_(6000)
    assert torch.equal(select(*args, top_k), select(*args, top_k, "reference"))


@pytest.mark.parametrize("falling", [False, True])
def test_scores_that_rise_or_fall_along_the_keys(falling):
    k = torch.arange(5000.0)[None, :, None]
    k = k.flip(1) if falling else k
    q, weights, visible = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), torch.tensor([[4990]])
    (got,) = select(q, k, weights, visible, 70)[0]
    first = 0 if falling else 4990 - 70
    assert torch.equal(got, torch.arange(first, first + 70, dtype=torch.int32))


@pytest.mark.parametrize("S", [1, 2, 40])
def test_the_same_selection_at_any_number_of_threads(threads, S):
    g = torch.Generator().manual_seed(S)
    q, k = torch.randn(1, S, 8, 64, generator=g), torch.randn(1, 3000, 64, generator=g)
    weights, visible = torch.randn(1, S, 8, generator=g), torch.full((1, S), 2900)
    threads(1)
    one = select(q, k, weights, visible, 256)
    for n in (2, 3, 7):  # with one query the keys are shared out
        threads(n)
        assert torch.equal(select(q, k, weights, visible, 256), one)


def test_a_query_selects_the_same_alone_and_among_others():
    g = torch.Generator().manual_seed(9)
    q, k = torch.randn(1, 37, 8, 64, generator=g), torch.randn(1, 900, 64, generator=g)
    weights, visible = torch.randn(1, 37, 8, generator=g), torch.full((1, 37), 890)
    together = select(q, k, weights, visible, 64)
    for s in (0, 15, 16, 36):
        one = slice(s, s + 1)
        alone = select(q[:, one], k, weights[:, one], visible[:, one], 64)
        assert torch.equal(alone[0, 0], together[0, s])


def test_nan_is_never_selected_and_minus_infinity_only_where_there_is_room():
    k = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 0.0])[None, :, None]
    q, weights = torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1)  # scores -1, NaN, -2, -inf, -0
    visible = torch.tensor([[5]])
    assert select(q, k, weights, visible, 3)[0, 0].tolist() == [0, 2, 4]
    assert select(q, k, weights, visible, 5)[0, 0].tolist() == [0, 2, 3, 4, -1]


def test_zero_and_minus_zero_are_equal_scores():
    k = torch.tensor([-1.0, 0.0, -2.0, 1.0])[None, :, None]  # relu gives 0 three times
    q, visible = torch.ones(1, 1, 1, 1), torch.tensor([[4]])
    for sign in (1.0, -1.0):
        got = select(q, k, torch.full((1, 1, 1), sign), visible, 2)[0, 0].tolist()
        assert got == ([0, 3] if sign > 0 else [0, 1])


def test_strided_queries_and_keys_are_read_where_they_lie():
    q, k, weights, visible = whole_numbers(2, 6, 90, 4, 24)
    want = select(q, k, weights, visible, 20)
    far = torch.full((2, 6, 4, 50), float("nan"))[..., 1:49:2].copy_(q)
    wide = torch.full((2, 24, 91), float("nan"))[..., 1:].copy_(k.mT).mT
    assert torch.equal(select(far, wide, weights.mT.contiguous().mT, visible, 20), want)


def test_float64_is_declined_with_a_sentence():
    q, k, weights, visible = whole_numbers()
    double = (x.double() for x in (q, k, weights))
    (shown,) = transom.explain("lightning_indexer", *double, 5, visible=visible).rejected["native"]
    assert shown == "q is float64; supported: float32, bfloat16, float16"
