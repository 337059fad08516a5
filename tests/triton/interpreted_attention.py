"""What the kit's calls do not reach in the attention kernels: keys shared out among programs, and
workspaces that hold few queries. Run by test_interpreted.py, in a process where TRITON_INTERPRET is
set."""

from __future__ import annotations

import pytest
import torch

import transom
from transom.kernels.attention.lightning_indexer import lightning_indexer, lightning_indexer_kl
from transom.kernels.attention.sparse_attention import sparse_attention, sparse_attention_backward

RANDN = torch.Generator().manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=RANDN).to(dtype)


def both(op, *args, **kwargs):
    """The outputs of the kernels, and of the composite in float64 where they are floats."""

    def wide(x):
        floats = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.double() if floats else x

    with transom.use(**{op.name: "triton"}):
        got = op.call(*args, **kwargs)
    with transom.use(**{op.name: "composite"}):
        want = op.call(*map(wide, args), **{name: wide(x) for name, x in kwargs.items()})
    return (got, want) if isinstance(got, tuple) else ((got,), (want,))


def assert_near(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-5)


def attention(S, N, L, M, window):
    indices = torch.randint(-1, N, (1, S, L), generator=RANDN)
    return (randn(1, S, 3, 24), randn(1, N, 24), indices), dict(
        visible=torch.full((1, S), N - 5),
        local_kv=randn(1, M, 24),
        window=window,
        sink=randn(3),
        local_valid=None,
        scale=0.3,
        v_dim=10,
    )


@pytest.fixture
def little(monkeypatch):
    """A workspace of a few queries' rows."""
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.0015")


@pytest.mark.parametrize("deterministic", (False, True))
def test_the_keys_of_one_query_are_shared_out_and_merged(deterministic, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    args, more = attention(1, 300, 270, 150, 140)
    assert_near(*both(sparse_attention, *args, **more))


def test_gradients_are_summed_over_several_passes(little):
    (q, kv, indices), more = attention(3, 9, 5, 4, 2)
    o, lse = sparse_attention.call(q, kv, indices, **more)
    args = (
        randn(*o.shape),
        randn(*lse.shape),
        q,
        kv,
        indices,
        more["visible"],
        more["local_kv"],
        more["sink"],
        None,
        o,
        lse,
    )
    assert_near(*both(sparse_attention_backward, *args, window=2, scale=0.3))


def test_the_indexer_keeps_the_first_of_equal_scores(little):
    q, k = (torch.randint(-1, 2, s, generator=RANDN).float() for s in ((2, 3, 2, 4), (2, 150, 4)))
    visible = torch.tensor([[150, 70, 1], [0, 149, 33]])
    got, want = both(lightning_indexer, q, k, torch.ones(2, 3, 2), 40, visible=visible)
    assert torch.equal(got[0], want[0])


def test_nan_is_never_selected_and_infinity_is():
    k = torch.tensor([torch.nan, 1.0, torch.inf, 0.0, -1.0])
    got, _ = both(
        lightning_indexer,
        torch.ones(1, 1, 1, 1),
        k.view(1, 5, 1),
        -torch.ones(1, 1, 1),
        4,
        visible=torch.tensor([[5]]),
    )
    assert got[0].tolist() == [[[1, 2, 3, 4]]]


def test_the_loss_lists_a_key_twice():
    indices = torch.tensor([[[0, 2, 2, -1, 9]]])
    args = (randn(1, 1, 3, 8), randn(1, 4, 8), randn(1, 1, 3), torch.rand(1, 1, 5), indices)
    assert_near(*both(lightning_indexer_kl, *args))
