"""route: the schemes against formulas, ties, saturation, padding, presets, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import transom
from transom import route
from transom.kernels.moe.route import SCORES, route_backward

NAN = float("nan")


def logits_of(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()


def score_of(z: Tensor, score: str) -> Tensor:
    """Scores by torch's own functions, in float64."""
    z = z.double()
    if score == "softmax":
        return z.softmax(-1)
    if score == "sigmoid":
        return z.sigmoid()
    return functional.softplus(z).sqrt() if score == "sqrtsoftplus" else z


def by_formula(
    z: Tensor,
    k: int,
    score: str,
    *,
    bias: Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One group, tie-free logits, float64; differentiable."""
    s = score_of(z, score)
    ids = (s if bias is None else s + bias.double()).topk(k).indices
    w = s.gather(1, ids)
    if score == "topk_softmax":
        w = w.softmax(-1)
    elif renormalize:
        w = w / (w.sum(-1, keepdim=True) + 1e-20)
    return ids, scale * w


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_equals_the_formula(rng, score, biased, renormalize):
    z, bias = logits_of(rng, 33, 24), logits_of(rng, 24) if biased else None
    with transom.record() as calls:
        ids, w = route(z, 5, score=score, bias=bias, renormalize=renormalize, scale=1.5)
    assert [(c.op, c.impl) for c in calls] == [("route", "composite")]
    want_ids, want = by_formula(z, 5, score, bias=bias, renormalize=renormalize, scale=1.5)
    assert (ids.dtype, w.dtype) == (torch.int32, torch.float32)
    assert torch.equal(ids.long(), want_ids)
    assert (w - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scores_are_float32_or_wider_whatever_the_logits(rng, dtype):
    z = logits_of(rng, 16, 12).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids, w = route(z, 3, score="sigmoid")
    same_ids, same = route(z.to(wide), 3, score="sigmoid")
    assert w.dtype == wide
    assert torch.equal(ids, same_ids) and torch.equal(w, same)


def test_groups_keep_the_best_sums_of_two_with_a_bias_and_the_best_maximum_without():
    z = torch.tensor([[4.0, 0.0, 3.0, 2.9]])  # groups {0, 1} and {2, 3}
    bias = torch.full((4,), 0.25)
    assert route(z, 2, score="sigmoid", bias=bias, groups=2, top_groups=1)[0].tolist() == [[2, 3]]
    assert route(z, 2, score="sigmoid", groups=2, top_groups=1)[0].tolist() == [[0, 1]]


def test_weights_come_from_scores_without_the_bias(rng):
    z, bias = logits_of(rng, 4, 6), torch.tensor([0.0, 0, 0, 50, 0, 50])
    ids, w = route(z, 2, score="sigmoid", bias=bias, renormalize=False)
    assert all(sorted(row) == [3, 5] for row in ids.tolist())
    assert torch.allclose(w, z.sigmoid().gather(1, ids.long()))


def test_edge_01_no_tokens():
    for score in SCORES:
        z = torch.ones(0, 8, requires_grad=True)
        ids, w = route(z, 3, score=score, bias=torch.ones(8), groups=4, top_groups=2)
        assert ids.shape == w.shape == (0, 3)
        w.sum().backward()
        assert z.grad.shape == (0, 8)


@pytest.mark.parametrize(
    ("E", "k", "groups", "top_groups"),
    [(8, 1, 1, 1), (8, 8, 1, 1), (1, 1, 1, 1), (8, 3, 4, 4), (8, 4, 8, 4), (8, 8, 2, 2)],
)
@pytest.mark.parametrize("score", SCORES)
def test_edge_09_extremes_of_k_and_groups(rng, score, E, k, groups, top_groups):
    z = logits_of(rng, 7, E)
    ids, w = route(z, k, score=score, groups=groups, top_groups=top_groups)
    # a group's score is its best member's, so with one slot a group the choice is the best of all
    assert torch.equal(ids.long(), by_formula(z, k, score)[0]) or top_groups < groups
    assert torch.allclose(w.sum(1), torch.ones(7))
    assert (ids.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("E", [6, 37, 256])
def test_edge_10_equal_logits_go_to_the_lowest_indices(score, E):
    """torch's sigmoid and softplus round an array's last elements differently; these must tie."""
    z = torch.full((3, E), 0.7312)
    assert route(z, 4, score=score)[0].tolist() == [[0, 1, 2, 3]] * 3
    z[:, E - 1] = z[:, 2] = 0.9
    assert route(z, 4, score=score)[0].tolist() == [[2, E - 1, 0, 1]] * 3


def test_edge_10_tied_groups_go_to_the_lowest_index():
    z = torch.zeros(1, 12)
    for bias in (None, torch.zeros(12)):
        assert route(z, 4, score="sigmoid", bias=bias, groups=4, top_groups=2)[0].tolist() == [
            [0, 1, 2, 3]
        ]
        # the best group {9,10,11}, then the first of three equal ones, {0,1,2}
        y = z.index_fill(1, torch.tensor([9, 10]), 1.0)
        ids, _ = route(y, 4, score="sigmoid", bias=bias, groups=4, top_groups=2)
        assert ids.tolist() == [[9, 10, 0, 1]]


def test_edge_10_excluded_groups_lose_though_all_keys_are_negative(rng):
    z, bias = logits_of(rng, 50, 8), torch.full((8,), -5.0)
    bias[4:] -= 1
    ids, _ = route(z, 4, score="sigmoid", bias=bias, groups=2, top_groups=1)
    assert (ids < 4).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_edge_10_huge_logits_and_biases_stay_finite(rng, score, size):
    z = (logits_of(rng, 9, 8).sign() * size).requires_grad_()
    bias = torch.tensor([1e4, -1e4] * 4)
    for b in (None, bias):
        ids, w = route(z, 3, score=score, bias=b)
        assert torch.isfinite(w).all() and ((0 <= ids) & (ids < 8)).all()
        if b is not None and score != "topk_softmax":
            assert (ids % 2 == 0).all()
        (w * torch.arange(3)).sum().backward()
        assert torch.isfinite(z.grad).all()


def test_edge_11_scores_that_underflow_decide_as_long_as_float32_can_hold_them():
    z = torch.tensor([[-60.0, -62.0, -80.0], [-300.0, -300.0, -300.0]])
    ids, w = route(z, 2, score="sqrtsoftplus")
    want = np.exp([-30.0, -31.0])
    assert ids.tolist() == [[0, 1], [0, 1]]
    assert np.allclose(w[0], want / (want.sum() + 1e-20), rtol=1e-6)
    assert w[1].tolist() == [0.0, 0.0]


def test_softplus_is_linear_above_20():
    z = torch.tensor([[20.5, 19.5, 5000.0]])
    _, w = route(z, 3, score="sqrtsoftplus", renormalize=False)
    assert np.allclose(w[0], np.sqrt([5000.0, 20.5, 19.5 + np.log1p(np.exp(-19.5))]), rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_edge_25_nan_logits_never_give_an_id_out_of_range(rng, score):
    z = logits_of(rng, 6, 8)
    clean_ids, clean = route(z, 3, score=score, bias=torch.ones(8), groups=4, top_groups=2)
    z[0] = NAN
    z[1, ::2] = NAN
    z[2, 3] = float("inf")
    ids, w = route(z, 3, score=score, bias=torch.ones(8), groups=4, top_groups=2)
    assert ((0 <= ids) & (ids < 8)).all()
    assert torch.equal(ids[3:], clean_ids[3:]) and torch.equal(w[3:], clean[3:])


@pytest.mark.parametrize("score", SCORES)
def test_masked_tokens_get_no_expert_and_are_not_read(rng, score):
    z = logits_of(rng, 5, 8)
    z[1] = NAN
    mask = torch.tensor([True, False, True, True, False])
    z.requires_grad_()
    ids, w = route(z, 3, score=score, mask=mask)
    assert (ids[~mask] == -1).all() and (w[~mask] == 0).all()
    assert torch.equal(ids[mask], route(z[mask], 3, score=score)[0])
    dw = torch.ones(5, 3)
    dw[~mask] = NAN
    w.backward(dw)
    assert torch.equal(z.grad[~mask], torch.zeros(2, 8)) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_edge_05_and_08_a_preset_may_skip_and_repeat(rng, score, index):
    """Hash routing and replay: weights in the order of the preset, bias and groups aside."""
    z = logits_of(rng, 3, 6)
    preset = torch.tensor([[4, 0, -1], [2, 2, 5], [-1, -1, -1]], dtype=index)
    ids, w = route(z, 3, score=score, preset=preset, bias=torch.full((6,), 9.0), scale=2.0)
    assert ids.dtype == torch.int32 and torch.equal(ids, preset.int())
    s = score_of(z, score)
    if score == "topk_softmax":
        s = s.exp()
    for row in range(2):
        used = preset[row] >= 0
        chosen = s[row, preset[row][used].long()]
        assert torch.allclose(w[row][used].double(), 2 * chosen / chosen.sum(), rtol=1e-5)
    assert (w[preset < 0] == 0).all()


def test_replaying_a_selection_gives_the_same_weights(rng):
    z, bias = logits_of(rng, 9, 16), logits_of(rng, 16)
    ids, w = route(z, 4, score="sqrtsoftplus", bias=bias, scale=1.5)
    again, same = route(z, 4, score="sqrtsoftplus", preset=ids, scale=1.5)
    assert torch.equal(again, ids) and torch.equal(same, w)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_gradients_in_float64(rng, score, renormalize):
    z = torch.from_numpy(rng.standard_normal((4, 7)) * 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a: route(
            a, 3, score=score, renormalize=renormalize, scale=2.5, bias=torch.linspace(0, 1, 7)
        )[1],
        (z,),
    )
    preset = torch.tensor([[1, 1, 4], [0, -1, 6], [-1, -1, -1], [5, 2, 3]])
    assert torch.autograd.gradcheck(
        lambda a: route(a, 3, score=score, renormalize=renormalize, preset=preset)[1], (z,)
    )


@pytest.mark.parametrize("score", SCORES)
def test_gradients_equal_autograd_of_the_formula(rng, score):
    z, bias, dw = logits_of(rng, 20, 16), logits_of(rng, 16).requires_grad_(), logits_of(rng, 20, 4)
    mine, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    with transom.record() as calls:
        route(mine, 4, score=score, bias=bias, scale=1.5)[1].backward(dw)
    by_formula(exact, 4, score, bias=bias.detach(), scale=1.5)[1].backward(dw.double())
    assert [c.op for c in calls] == ["route", "route_backward"]
    assert bias.grad is None
    assert (mine.grad - exact.grad).abs().max() <= 2e-5 * exact.grad.abs().max()


def test_the_root_gradient_is_finite_where_the_score_is_zero():
    z = torch.tensor([[-1e4, -500.0, -100.0, -50.0]])
    for renormalize in (True, False):
        dz = route_backward(
            torch.ones(1, 4),
            z,
            torch.tensor([[0, 1, 2, 3]]),
            score="sqrtsoftplus",
            renormalize=renormalize,
        )
        assert torch.isfinite(dz).all()
    assert np.allclose(dz[0, 2:], np.exp([-50.0, -25.0]) / 2, rtol=1e-5, atol=0)


def test_edge_19_a_token_has_the_same_bits_alone_and_among_many(rng):
    z, bias = logits_of(rng, 4096, 24), logits_of(rng, 24)
    for score in SCORES:
        ids, w = route(z, 6, score=score, bias=bias, groups=4, top_groups=3)
        for t in (0, 1, 1365, 4095):
            one_ids, one = route(
                z[t : t + 1].clone(), 6, score=score, bias=bias, groups=4, top_groups=3
            )
            assert torch.equal(one_ids[0], ids[t]) and torch.equal(one[0], w[t])


@pytest.mark.parametrize("score", SCORES)
def test_bits_do_not_depend_on_how_many_tokens_the_workspace_holds(rng, score, monkeypatch):
    z, bias, mask = logits_of(rng, 150, 32), logits_of(rng, 32), logits_of(rng, 150) > -1
    call = dict(score=score, bias=bias, groups=4, top_groups=2, mask=mask, scale=1.5)
    ids, weights = route(z, 4, **call)
    dweights = logits_of(rng, 150, 4)
    gradient = route_backward(dweights, z, ids, score=score, scale=1.5)
    for bytes_held in (1, 9000, 60_000):  # one token, a few, about fifty
        monkeypatch.setenv("TRANSOM_WORKSPACE_MB", str(bytes_held / 2**20))
        cut = route(z, 4, **call)
        assert torch.equal(cut[0], ids) and torch.equal(cut[1], weights)
        assert torch.equal(route_backward(dweights, z, ids, score=score, scale=1.5), gradient)


def test_strides_and_index_dtypes_change_nothing(rng):
    z = logits_of(rng, 9, 12)
    want = route(z, 3, score="sigmoid")
    strided = logits_of(rng, 12, 18).T[::2]
    strided.copy_(z)
    assert all(
        torch.equal(a, b) for a, b in zip(route(strided, 3, score="sigmoid"), want, strict=True)
    )


def test_vmap_folds_into_the_tokens(rng):
    z = logits_of(rng, 3, 5, 8)
    ids, w = torch.vmap(lambda a: route(a, 2, score="softmax"))(z)
    flat_ids, flat = route(z.flatten(0, 1), 2, score="softmax")
    assert torch.equal(ids.flatten(0, 1), flat_ids) and torch.equal(w.flatten(0, 1), flat)


def test_compiles_with_its_gradient_without_a_graph_break(rng):
    z = logits_of(rng, 5, 8).requires_grad_()

    def loss(a: Tensor) -> Tensor:
        return (route(a, 2, score="sqrtsoftplus")[1] * torch.tensor([1.0, 2.0])).sum()

    (want,) = torch.autograd.grad(loss(z), z)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(z), z)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(k=9), "route: k is 9; must be in 1..E = 1..8"),
        (dict(k=0), "route: k is 0; must be in 1..E = 1..8"),
        (
            dict(score="tanh"),
            "'tanh'; must be one of 'softmax', 'sigmoid', 'sqrtsoftplus', 'topk_softmax'",
        ),
        (dict(groups=3), "route: groups is 3; must be >= 1 and divide E = 8"),
        (dict(groups=4, top_groups=5), r"route: top_groups is 5; must be in 1..groups = 1..4"),
        (
            dict(groups=4, top_groups=1, k=3),
            "route: 1 of 4 groups leave 2 experts; k = 3 are to be chosen",
        ),
        (
            dict(preset=torch.tensor([[8, 0]] * 4)),
            "route: preset holds 8; must be in -1..E-1 = -1..7",
        ),
        (
            dict(preset=torch.tensor([[-2, 0]] * 4)),
            "route: preset holds -2; must be in -1..E-1 = -1..7",
        ),
        (dict(bias=torch.zeros(7)), "route: bias has E = 7; logits has E = 8"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        route(torch.ones(4, 8), **{"k": 2, "score": "softmax", **arguments})
