"""What the conformance kit cannot know about lightning_indexer and its KL loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import transom
from transom import lightning_indexer
from transom.kernels.attention import lightning_indexer as file
from transom.kernels.attention.lightning_indexer import (
    lightning_indexer_kl,
    lightning_indexer_kl_backward,
)


def tensors(
    rng: np.random.Generator, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in shapes]


def scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """I[b,s,j] in float64, for all keys at once."""
    dots = torch.einsum("bshd,bnd->bshn", q.double(), k.double()).relu()
    return torch.einsum("bsh,bshn->bsn", weights.double(), dots)


def one_score_per_key(values: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, weights whose scores are `values` (of any sign): two heads, weights 1 and -1."""
    s = torch.tensor(values)
    return torch.eye(2)[None, None], torch.stack([s, -s], 1)[None], torch.tensor([[[1.0, -1.0]]])


def select(values: list[float], top_k: int, visible: int | None = None) -> list[int]:
    q, k, weights = one_score_per_key(values)
    seen = torch.tensor([[len(values) if visible is None else visible]])
    return lightning_indexer(q, k, weights, top_k, visible=seen)[0, 0].tolist()


@pytest.fixture(params=["whole", "tiled"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with everything in one block, once with tiles of a few keys and one query."""
    if request.param == "tiled":
        monkeypatch.setattr(file, "_KEYS", 3)
        monkeypatch.setattr(file.config, "workspace_bytes", lambda: 400)
    return request.param


def test_the_composite_runs(rng: np.random.Generator) -> None:
    q, k, w = tensors(rng, (1, 2, 3, 4), (1, 5, 4), (1, 2, 3))
    with transom.record() as calls:
        lightning_indexer(q, k, w, 2, visible=torch.tensor([[1, 5]]))
    assert [(c.op, c.impl) for c in calls] == [("lightning_indexer", "composite")]


@pytest.mark.parametrize(
    ("dtype", "recall"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float64, 1.0)]
)
def test_best_scores_against_float64(
    rng: np.random.Generator, tiling: str, dtype: torch.dtype, recall: float
) -> None:
    q, k, w = tensors(rng, (2, 7, 4, 16), (2, 33, 16), (2, 7, 4), dtype=dtype)
    visible = torch.from_numpy(rng.integers(0, 34, (2, 7)))
    got = lightning_indexer(q, k, w, 6, visible=visible)
    want = scores(q, k, w)
    assert got.dtype == torch.int32
    for b in range(2):
        for s in range(7):
            n = int(visible[b, s])
            chosen = [j for j in got[b, s].tolist() if j >= 0]
            best = want[b, s, :n].sort(descending=True, stable=True).indices[:6].sort().values
            assert chosen == best.tolist()


def test_order_is_ascending_and_valid_entries_come_first() -> None:
    assert select([1.0, 9.0, 3.0, 8.0], 3) == [1, 2, 3]
    assert select([5.0, 4.0], 4) == [0, 1, -1, -1]


def test_ties_go_to_the_lowest_index(tiling: str) -> None:
    assert select([1.0] * 9, 4) == [0, 1, 2, 3]
    assert select([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 2.0], 3) == [1, 3, 6]
    assert select([2.0, 2.0, 3.0, 2.0, 3.0], 3) == [0, 2, 4]


def test_ties_across_tiles_in_many_random_rows(rng: np.random.Generator, tiling: str) -> None:
    q = torch.ones(1, 40, 1, 1)
    k = torch.from_numpy(rng.integers(0, 4, (1, 50, 1))).float()
    w = torch.from_numpy(rng.integers(-1, 2, (1, 40, 1))).float()
    visible = torch.from_numpy(rng.integers(0, 51, (1, 40)))
    got = lightning_indexer(q, k, w, 12, visible=visible)
    value = scores(q, k, w)
    for s in range(40):
        n = int(visible[0, s])
        order = sorted(range(n), key=lambda j: (-float(value[0, s, j]), j))[:12]
        assert got[0, s].tolist() == sorted(order) + [-1] * (12 - len(order))


def test_negative_scores_are_scores_and_not_masked() -> None:
    # 7.1: weights are unconstrained, so 0 must not stand for "masked"
    assert select([-5.0, -1.0, -3.0, -2.0], 2) == [1, 3]


def test_edge_23_fewer_visible_than_top_k() -> None:
    assert select([1.0, 2.0, 3.0], 3, visible=2) == [0, 1, -1]


def test_edge_23_nothing_visible_selects_nothing() -> None:
    assert select([1.0, 2.0, 3.0], 2, visible=0) == [-1, -1]


def test_no_keys_at_all_select_nothing() -> None:
    got = lightning_indexer(
        torch.ones(2, 3, 1, 4),
        torch.ones(2, 0, 4),
        torch.ones(2, 3, 1),
        5,
        visible=torch.ones(2, 3, dtype=torch.int32),
    )
    assert got.tolist() == [[[-1] * 5] * 3] * 2


def test_no_queries_give_an_empty_selection() -> None:
    got = lightning_indexer(
        torch.ones(2, 0, 1, 4),
        torch.ones(2, 3, 4),
        torch.ones(2, 0, 1),
        5,
        visible=torch.ones(2, 0, dtype=torch.int64),
    )
    assert got.shape == (2, 0, 5)


@pytest.mark.parametrize("top_k", [512, 1024, 2048])
def test_edge_24_both_sizes_of_selection(rng: np.random.Generator, top_k: int) -> None:
    q, k, w = tensors(rng, (1, 2, 2, 4), (1, top_k + 37, 4), (1, 2, 2))
    got = lightning_indexer(q, k, w, top_k, visible=torch.tensor([[top_k + 37, top_k - 1]]))
    dropped = scores(q, k, w)[0, 0].sort(descending=True, stable=True).indices[top_k:]
    assert set(got[0, 0].tolist()) == set(range(top_k + 37)) - set(dropped.tolist())
    assert got[0, 1].tolist() == [*range(top_k - 1), -1]


def test_edge_25_nan_scores_are_never_selected(tiling: str) -> None:
    nan = float("nan")
    assert select([nan, 1.0, nan, 2.0, nan], 3) == [1, 3, -1]
    assert select([nan] * 4, 2) == [-1, -1]


def test_edge_25_infinite_scores() -> None:
    inf = float("inf")
    # one head with weight 1 or -1: relu(inf) * -1 = -inf
    k = torch.tensor([[[inf], [1.0], [2.0]]])
    q, seen = torch.ones(1, 1, 1, 1), torch.tensor([[3]])
    assert lightning_indexer(q, k, torch.ones(1, 1, 1), 2, visible=seen).tolist() == [[[0, 2]]]
    down = -torch.ones(1, 1, 1)
    assert lightning_indexer(q, k, down, 2, visible=seen).tolist() == [[[1, 2]]]
    # -inf of a visible key is a score: it is taken when there is room
    assert lightning_indexer(q, k, down, 3, visible=seen).tolist() == [[[0, 1, 2]]]


def test_edge_26_and_27_keys_beyond_visible_have_no_influence(rng: np.random.Generator) -> None:
    q, k, w = tensors(rng, (1, 3, 2, 4), (1, 8, 4), (1, 3, 2))
    visible = torch.tensor([[1, 3, 5]])
    clean = lightning_indexer(q, k, w, 4, visible=visible)
    k[:, 5:] = float("nan")
    assert torch.equal(lightning_indexer(q, k, w, 4, visible=visible), clean)
    k[:, 5:] = float("inf")
    assert torch.equal(lightning_indexer(q, k, w, 4, visible=visible), clean)


def test_visible_is_taken_into_range() -> None:
    assert select([1.0, 2.0], 3, visible=7) == [0, 1, -1]
    assert select([1.0, 2.0], 3, visible=-4) == [-1, -1, -1]


def test_edge_38_hadamard_on_both_changes_nothing_and_on_one_does(rng: np.random.Generator) -> None:
    q, k, w = tensors(rng, (1, 9, 4, 16), (1, 64, 16), (1, 9, 4), dtype=torch.float64)
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0) / 2**0.5
    seen = torch.full((1, 9), 64)
    plain = lightning_indexer(q, k, w, 8, visible=seen)
    assert torch.equal(lightning_indexer(q @ h, k @ h, w, 8, visible=seen), plain)
    assert not torch.equal(lightning_indexer(q @ h, k, w, 8, visible=seen), plain)


def test_edge_39_heads_are_rectified_before_they_are_summed() -> None:
    # head 0 prefers key 0 (+3, head 1 says -9); without the relu key 1 would win
    q = torch.eye(2)[None, None]
    k = torch.tensor([[[3.0, -9.0], [1.0, 1.0]]])
    got = lightning_indexer(q, k, torch.ones(1, 1, 2), 1, visible=torch.tensor([[2]]))
    assert got.tolist() == [[[0]]]


def test_edge_45_each_row_of_several_new_tokens_sees_one_more(rng: np.random.Generator) -> None:
    q, k, w = tensors(rng, (1, 3, 2, 4), (1, 9, 4), (1, 3, 2))
    visible = torch.tensor([[7, 8, 9]], dtype=torch.int32)
    together = lightning_indexer(q, k, w, 4, visible=visible)
    for r in range(3):
        at = slice(r, r + 1)
        alone = lightning_indexer(q[:, at], k, w[:, at], 4, visible=visible[:, at])
        assert torch.equal(alone, together[:, at])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_both_index_dtypes(index: torch.dtype) -> None:
    q, k, weights = one_score_per_key([1.0, 2.0, 3.0])
    got = lightning_indexer(q, k, weights, 2, visible=torch.tensor([[3]], dtype=index))
    assert got.tolist() == [[[1, 2]]]


def test_edge_32_a_batch_of_321_sequences(rng: np.random.Generator) -> None:
    q, k, w = tensors(rng, (321, 1, 2, 4), (321, 6, 4), (321, 1, 2))
    visible = torch.arange(321)[:, None] % 7
    together = lightning_indexer(q, k, w, 3, visible=visible)
    for b in (0, 6, 320):
        at = slice(b, b + 1)
        alone = lightning_indexer(q[at], k[at], w[at], 3, visible=visible[at])
        assert torch.equal(alone, together[at])


def test_results_repeat_bit_for_bit(rng: np.random.Generator) -> None:
    q, k, w = tensors(rng, (1, 4, 2, 8), (1, 40, 8), (1, 4, 2), dtype=torch.bfloat16)
    seen = torch.full((1, 4), 40)
    first = lightning_indexer(q, k, w, 9, visible=seen)
    assert all(torch.equal(lightning_indexer(q, k, w, 9, visible=seen), first) for _ in range(20))


def test_edge_35_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    # 48 queries x 6000 keys x 4 heads would be 4.6 MB of products
    monkeypatch.setattr(file.config, "workspace_bytes", lambda: 1 << 18)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.nbytes)
            return out

    with Watch():
        lightning_indexer.impls["composite"].function(
            torch.ones(1, 48, 4, 8),
            torch.ones(1, 6000, 8),
            torch.ones(1, 48, 4),
            16,
            visible=torch.full((1, 48), 6000),
        )
    assert largest <= 1 << 18


def test_bad_inputs() -> None:
    q, k, w = torch.ones(1, 2, 3, 4), torch.ones(1, 5, 4), torch.ones(1, 2, 3)
    seen = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"lightning_indexer: top_k is 0; must be at least 1"):
        lightning_indexer(q, k, w, 0, visible=seen)
    with pytest.raises(ValueError, match=r"lightning_indexer: k has D = 3; q has D = 4"):
        lightning_indexer(q, k[..., :3], w, 1, visible=seen)
    with pytest.raises(ValueError, match=r"lightning_indexer: weights has H = 2; q has H = 3"):
        lightning_indexer(q, k, w[..., :2], 1, visible=seen)
    with pytest.raises(TypeError, match=r"lightning_indexer: visible is float32; expected"):
        lightning_indexer(q, k, w, 1, visible=seen.float())
    with pytest.raises(TypeError, match=r"lightning_indexer: k is bfloat16; expected float32"):
        lightning_indexer(q, k.bfloat16(), w, 1, visible=seen)


# The KL loss -----------------------------------------------------------------------------------


def lists(
    rng: np.random.Generator, shape: tuple[int, int, int], keys: int
) -> tuple[Tensor, Tensor]:
    """A target that sums to 1 and lists of distinct keys with tails of -1; one query lists none."""
    indices = torch.full(shape, -1)
    target = torch.from_numpy(rng.random(shape))
    for b in range(shape[0]):
        for s in range(shape[1]):
            n = 0 if s == 1 else int(rng.integers(1, min(shape[2], keys) + 1))
            indices[b, s, :n] = torch.from_numpy(np.sort(rng.choice(keys, n, replace=False)))
            target[b, s, n:] = float("nan")
            target[b, s, :n] /= target[b, s, :n].sum()
    return target, indices


def kl_by_definition(q: Tensor, k: Tensor, w: Tensor, target: Tensor, indices: Tensor) -> Tensor:
    """torch.kl_div of each query by itself, over scores of all keys."""
    every, rows = scores(q, k, w), []
    for b in range(q.shape[0]):
        for s in range(q.shape[1]):
            at = indices[b, s][indices[b, s] >= 0]
            log_p = torch.log_softmax(every[b, s, at], 0)
            goal = target[b, s, : len(at)].double()
            rows.append(torch.nn.functional.kl_div(log_p, goal, reduction="sum"))
    return torch.stack(rows).view(q.shape[:2])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_against_float64_autograd(
    rng: np.random.Generator, dtype: torch.dtype, bound: float
) -> None:
    inputs = tensors(rng, (2, 5, 3, 8), (2, 11, 8), (2, 5, 3), dtype=dtype)
    target, indices = lists(rng, (2, 5, 6), 11)
    target = target.to(dtype)
    mine = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    loss, want = lightning_indexer_kl(*mine, target, indices), None
    want = kl_by_definition(*exact, target, indices)
    assert loss.dtype == torch.float32
    assert (loss - want).abs().max() <= bound * want.abs().max()
    assert loss[:, 1].eq(0).all()
    dloss = torch.from_numpy(rng.standard_normal((2, 5)))
    got = torch.autograd.grad(loss, mine, dloss.float())
    for g, x, name in zip(got, torch.autograd.grad(want, exact, dloss), "qkw", strict=True):
        assert g.dtype == dtype
        assert (g - x).abs().max() <= bound * x.abs().max(), name


def test_gradients_against_finite_differences(rng: np.random.Generator) -> None:
    inputs = tensors(rng, (1, 3, 2, 4), (1, 7, 4), (1, 3, 2), dtype=torch.float64)
    target, indices = lists(rng, (1, 3, 4), 7)
    inputs = [x.requires_grad_() for x in (*inputs, target.nan_to_num())]
    assert torch.autograd.gradcheck(lambda *x: lightning_indexer_kl(*x, indices), inputs)


def test_loss_is_zero_where_the_indexer_agrees(rng: np.random.Generator) -> None:
    q, k, w = tensors(rng, (1, 4, 2, 8), (1, 6, 8), (1, 4, 2))
    indices = torch.arange(6).expand(1, 4, 6)
    target = scores(q, k, w).softmax(-1).float()
    loss = lightning_indexer_kl(q, k, w, target, indices)
    assert loss.abs().max() < 1e-6
    gradients = lightning_indexer_kl_backward(q, k, w, target, indices, torch.ones(1, 4))
    assert all(g.abs().max() < 1e-5 for g in gradients[:3])
    assert torch.allclose(gradients[3], torch.ones(()), atol=1e-5)


def test_edge_28_indices_out_of_range_stand_for_none(rng: np.random.Generator) -> None:
    q, k, w = tensors(rng, (1, 2, 2, 4), (1, 5, 4), (1, 2, 2))
    target = torch.tensor([0.5, 0.3, 9.0, 9.0, 9.0, 9.0]).expand(1, 2, 6)
    bad = [2**31 - 1, -(2**31), 5, -1]
    indices = torch.tensor([1, 4, *bad], dtype=torch.int32).expand(1, 2, 6)
    want = lightning_indexer_kl(q, k, w, target[..., :2], indices[..., :2])
    assert torch.equal(lightning_indexer_kl(q, k, w, target, indices), want)
    dloss = torch.ones(1, 2)
    got = lightning_indexer_kl_backward(q, k, w, target, indices, dloss)
    short = lightning_indexer_kl_backward(q, k, w, target[..., :2], indices[..., :2], dloss)
    for a, b in zip(got[:3], short[:3], strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(got[3][..., :2], short[3], atol=1e-6)
    assert got[3][..., 2:].eq(0).all()


def test_edge_27_unlisted_keys_have_no_influence_on_loss_or_gradient(
    rng: np.random.Generator,
) -> None:
    q, k, w = tensors(rng, (1, 2, 2, 4), (1, 5, 4), (1, 2, 2))
    target, indices = torch.full((1, 2, 3), 0.5), torch.tensor([1, 3, -1]).expand(1, 2, 3)
    k[:, [0, 2, 4]] = float("nan")
    inputs = [x.requires_grad_() for x in (q, k, w)]
    loss = lightning_indexer_kl(*inputs, target, indices)
    assert loss.isfinite().all()
    for g in torch.autograd.grad(loss.sum(), inputs):
        assert g.isfinite().all()


def test_a_target_of_zero_adds_nothing_even_where_the_score_is_minus_infinity() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([[[float("inf")], [1.0]]])
    w, indices = -torch.ones(1, 1, 1), torch.tensor([[[0, 1]]])
    loss = lightning_indexer_kl(q, k, w, torch.tensor([[[0.0, 1.0]]]), indices)
    assert loss.tolist() == [[0.0]]


def test_no_keys_and_empty_lists_give_zero() -> None:
    q, w, indices = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1), torch.full((1, 2, 3), -1)
    target = torch.ones(1, 2, 3)
    k = torch.ones(1, 0, 4, requires_grad=True)
    loss = lightning_indexer_kl(q, k, w, target, indices)
    assert loss.tolist() == [[0.0, 0.0]]
    loss.sum().backward()
    assert k.grad is not None
    none = lightning_indexer_kl(q, torch.ones(1, 5, 4), w, target[..., :0], indices[..., :0])
    assert none.tolist() == [[0.0, 0.0]]


def test_gradients_repeat_bit_for_bit_and_do_not_depend_on_blocks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, w = tensors(rng, (2, 9, 3, 8), (2, 6, 8), (2, 9, 3))
    target, indices = lists(rng, (2, 9, 6), 6)
    args = (q, k, w, target.float(), indices, torch.ones(2, 9))
    first = lightning_indexer_kl_backward(*args)
    again = lightning_indexer_kl_backward(*args)
    monkeypatch.setattr(file.config, "workspace_bytes", lambda: 1)
    by_one = lightning_indexer_kl_backward(*args)
    for a, b, c in zip(first, again, by_one, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, rtol=1e-5, atol=1e-6)
