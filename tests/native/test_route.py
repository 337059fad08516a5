"""Native routing: ties, NaN, groups, presets, strides and sizes that the kit does not draw."""

from __future__ import annotations

import pytest
import torch

import transom
from transom.registry import OPS

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SCORES = ["softmax", "sigmoid", "sqrtsoftplus", "topk_softmax"]


@pytest.fixture
def g():
    return torch.Generator().manual_seed(7)


def both(op, *args, **kwargs):
    out = []
    for impl in ("native", "composite"):
        with transom.use(impl), transom.record() as calls:
            out.append(OPS[op](*args, **kwargs))
        assert [c.impl for c in calls if c.op == op] == [impl]
    return out


def agree(got, want, rtol=2e-6):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=rtol, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("E, k", [(1, 1), (7, 7), (8, 3), (33, 5), (256, 8), (1030, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes_off_the_width_and_rows_full_of_ties(g, dtype, score, E, k):
    # Multiples of a quarter: most rows hold the same number several times.
    logits = (4 * torch.randn(21, E, generator=g)).round().to(dtype) / 4
    agree(*both("route", logits, k, score=score))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "E, groups, top_groups", [(12, 12, 5), (24, 8, 3), (256, 8, 4), (70, 2, 1)]
)
def test_groups_with_ties_among_experts_and_groups(g, E, groups, top_groups, biased):
    logits = torch.randn(40, E, generator=g).round()
    bias = torch.randn(E, generator=g).round() if biased else None
    agree(
        *both(
            "route",
            logits,
            4,
            score="sigmoid",
            bias=bias,
            groups=groups,
            top_groups=top_groups,
            scale=2.5,
        )
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("E", [9, 150])
def test_keys_that_are_nan_or_minus_infinity_rank_last_by_index(g, E, score, groups):
    logits = torch.randn(30, E, generator=g)
    logits[torch.rand(30, E, generator=g) < 0.6] = -torch.inf
    if score != "softmax":  # there one NaN makes all scores NaN
        logits[torch.rand(30, E, generator=g) < 0.3] = torch.nan
    logits[0], logits[1] = torch.nan, -torch.inf
    k = E // 3 if groups == 3 else E
    got, want = both("route", logits, k, score=score, groups=groups, top_groups=1)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("score", SCORES)
def test_extreme_logits_keep_their_weights(score):
    logits = torch.tensor(
        [
            [-200.0, -190, -180, -210],
            [-20.5, -19.5, 19.5, 20.5],
            [100, 99, 0, -100],
            [-104, -103, -102, -300.0],
        ]
    )
    agree(*both("route", logits, 3, score=score), rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_presets_with_repeats_and_gaps_and_masked_tokens_that_are_not_read(g, score, index):
    logits = torch.randn(20, 19, generator=g)
    preset = torch.randint(-1, 19, (20, 2 * 5), generator=g).to(index)[:, ::2]
    preset[3] = -1
    mask = torch.rand(2 * 20, generator=g)[::2] < 0.7
    logits[~mask] = torch.nan
    got, want = both("route", logits, 5, score=score, preset=preset, mask=mask, scale=1.5)
    agree(got, want)
    assert (got[0][~mask] == -1).all() and (got[1][~mask] == 0).all()


@pytest.mark.parametrize("score", SCORES)
def test_a_preset_of_what_is_chosen_gives_the_same_bits(g, score):
    logits = torch.randn(64, 128, generator=g)
    with transom.use("native"):
        ids, weights = transom.route(logits, 6, score=score)
        again = transom.route(logits, 6, score=score, preset=ids)
    assert torch.equal(again[0], ids) and torch.equal(again[1], weights)


@pytest.mark.parametrize("score", SCORES)
def test_strided_and_expanded_logits(g, score):
    wide = torch.randn(2 * 11, 3 * 37, generator=g)
    for logits in (wide[::2, 1::3], wide[:1, :37].expand(11, 37), wide[:37, :11].T):
        got, want = both("route", logits, 4, score=score)
        agree(got, want)
        with transom.use("native"):
            plain = transom.route(logits.contiguous(), 4, score=score)
        assert torch.equal(plain[0], got[0]) and torch.equal(plain[1], got[1])


@pytest.mark.parametrize("score", SCORES)
def test_a_token_has_the_same_bits_alone_and_at_any_number_of_threads(g, score):
    logits = torch.randn(700, 256, generator=g)
    before = torch.get_num_threads()
    try:
        with transom.use("native"):
            torch.set_num_threads(1)
            one = transom.route(logits, 8, score=score)
            torch.set_num_threads(5)
            five = transom.route(logits, 8, score=score)
            alone = [transom.route(logits[t : t + 1], 8, score=score) for t in (0, 333, 699)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], five[0]) and torch.equal(one[1], five[1])
    for t, (ids, weights) in zip((0, 333, 699), alone, strict=True):
        assert torch.equal(ids[0], one[0][t]) and torch.equal(weights[0], one[1][t])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_with_repeated_and_missing_ids(g, dtype, renormalize, score):
    logits = (3 * torch.randn(40, 2 * 43, generator=g)).to(dtype)[:, ::2]
    ids = torch.randint(-1, 43, (40, 6), generator=g)
    ids[5] = -1
    ids[6] = 11
    logits[5] = torch.nan
    dweights = torch.randn(6, 40, generator=g).T
    got, want = both(
        "route_backward", dweights, logits, ids, score=score, renormalize=renormalize, scale=1.5
    )
    scale = want.abs().amax(1, keepdim=True).float() + 1e-2
    eps = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert ((got.float() - want.float()).abs() <= eps * (scale + want.float().abs())).all()
    assert (got[5] == 0).all()


def test_nan_logits_of_experts_that_were_not_chosen_have_no_gradient(g):
    logits, ids = torch.randn(3, 9, generator=g), torch.tensor([[1, 4]]).expand(3, 2)
    logits[:, 5] = torch.nan
    with transom.use("native"):
        got = OPS["route_backward"](torch.ones(3, 2), logits, ids, score="sigmoid")
    assert got.isfinite().all()


@pytest.mark.parametrize("op", ["route", "route_backward"])
def test_float64_is_declined_with_a_sentence(op):
    logits = torch.zeros(2, 4, dtype=torch.float64)
    if op == "route":
        plan = transom.explain(op, logits, 1, score="sigmoid")
    else:
        plan = transom.explain(
            op, logits[:, :1], logits, torch.zeros(2, 1, dtype=torch.int32), score="sigmoid"
        )
    assert plan.rejected["native"] == ("logits is float64; supported: float32, bfloat16, float16",)
