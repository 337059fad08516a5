"""sinkhorn: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.mhc.sinkhorn import sinkhorn_backward

EPS = 1e-6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def oracle(logits: Tensor, iterations: int, eps: float = EPS) -> Tensor:
    """Contracts 2.1, differentiable by autograd through the loop."""
    m = torch.softmax(logits.double(), -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_float32_meets_the_published_threshold_forward_and_backward(iterations):
    """Contracts 14: 1.3e-6 relative, 1e-5 absolute."""
    logits = normal(33, 4, 4, dtype=torch.float32).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    got, want = transom.sinkhorn(logits, iterations=iterations, eps=EPS), oracle(wide, iterations)
    torch.testing.assert_close(got.double(), want, rtol=1.3e-6, atol=1e-5)
    dy = normal(33, 4, 4, seed=1)
    (a,) = torch.autograd.grad(got, logits, dy.float())
    (b,) = torch.autograd.grad(want, wide, dy)
    torch.testing.assert_close(a.double(), b, rtol=1.3e-6, atol=1e-5)


def test_bfloat16_logits_give_float32():
    logits = normal(5, 4, 4, dtype=torch.bfloat16)
    comb = transom.sinkhorn(logits, iterations=20, eps=EPS)
    assert comb.dtype == torch.float32
    torch.testing.assert_close(comb.double(), oracle(logits, 20), rtol=1e-5, atol=1e-6)


def test_edge_75_one_iteration_is_softmax_and_one_column_step():
    logits = normal(3, 4, 4)
    m = torch.softmax(logits, -1) + EPS
    torch.testing.assert_close(
        transom.sinkhorn(logits, iterations=1, eps=EPS), m / (m.sum(1, keepdim=True) + EPS)
    )


def test_edge_75_one_stream_gives_one():
    comb = transom.sinkhorn(normal(3, 1, 1), iterations=20, eps=EPS)
    torch.testing.assert_close(comb, torch.ones_like(comb), rtol=0, atol=2 * EPS)


def test_edge_69_equal_logits_give_a_quarter():
    comb = transom.sinkhorn(torch.full((2, 4, 4), 7.0), iterations=20, eps=EPS)
    torch.testing.assert_close(comb, torch.full_like(comb, 0.25), rtol=0, atol=2e-6)


def test_edge_69_logits_of_100_give_a_permutation():
    order = [2, 0, 3, 1]
    logits = torch.full((1, 4, 4), -100.0)
    logits[0, range(4), order] = 100.0
    comb = transom.sinkhorn(logits, iterations=20, eps=EPS)
    want = torch.zeros(1, 4, 4)
    want[0, range(4), order] = 1
    torch.testing.assert_close(comb, want, rtol=0, atol=1e-5)
    grad = sinkhorn_backward(torch.ones_like(comb), logits, iterations=20, eps=EPS)
    assert bool(grad.isfinite().all())


def test_edge_69_twenty_steps_have_not_converged_for_extreme_logits():
    """So an implicit, fixed-point gradient would be another one: ours is that of the steps."""
    logits = (30 * normal(6, 4, 4)).requires_grad_()
    comb = transom.sinkhorn(logits, iterations=20, eps=EPS)
    assert float((comb.detach().sum(-1) - 1).abs().max()) > 1e-3
    dy = normal(6, 4, 4, seed=1)
    wide = logits.detach().requires_grad_()
    (got,) = torch.autograd.grad(comb, logits, dy)
    (want,) = torch.autograd.grad(oracle(wide, 20), wide, dy)
    torch.testing.assert_close(got, want)


def test_edge_73_column_sums_are_one():
    comb = transom.sinkhorn(5 * normal(200, 4, 4, dtype=torch.float32), iterations=20, eps=EPS)
    assert float((comb.sum(-2) - 1).abs().max()) < 1e-5


def test_edge_70_no_tokens():
    assert transom.sinkhorn(normal(0, 4, 4), iterations=20, eps=EPS).shape == (0, 4, 4)


@pytest.mark.parametrize("R, iterations", [(1, 1), (2, 3), (4, 20)])
def test_gradients_agree_with_finite_differences(R, iterations):
    logits = normal(2, R, R).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a: transom.sinkhorn(a, iterations=iterations, eps=1e-3), (logits,)
    )


def test_sixty_layers_of_combs_do_not_amplify():
    """Contracts 2.5: the gain of a product of doubly stochastic matrices stays near 1."""
    combs = transom.sinkhorn(normal(60, 4, 4), iterations=20, eps=EPS)
    product = torch.eye(4, dtype=torch.float64)
    for comb in combs:
        product = comb.T @ product
    assert float(product.abs().sum(-1).max()) < 1.6


def test_blocks_leading_dims_and_vmap(monkeypatch):
    logits = normal(12, 4, 4)
    whole = transom.sinkhorn(logits, iterations=5, eps=EPS)
    split = logits.unflatten(0, (3, 4))
    assert torch.equal(transom.sinkhorn(split, iterations=5, eps=EPS).flatten(0, 1), whole)
    each = torch.vmap(lambda a: transom.sinkhorn(a, iterations=5, eps=EPS))(split)
    assert torch.equal(each.flatten(0, 1), whole)
    grad = sinkhorn_backward(whole, logits, iterations=5, eps=EPS)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.002")
    torch.testing.assert_close(transom.sinkhorn(logits, iterations=5, eps=EPS), whole)
    torch.testing.assert_close(sinkhorn_backward(whole, logits, iterations=5, eps=EPS), grad)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(iterations=0), "sinkhorn: iterations is 0; must be >= 1"),
        (dict(eps=-1e-6), "sinkhorn: eps is -1e-06; must be >= 0"),
    ],
)
def test_bad_arguments_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        transom.sinkhorn(normal(2, 4, 4), **{"iterations": 20, "eps": EPS, **change})


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="sinkhorn: logits has R = 3; logits has R = 4"):
        transom.sinkhorn(normal(2, 4, 3), iterations=20, eps=EPS)
