"""Native gradients of a table: the composite's bits, duplicates, shards, orders of keys."""

from __future__ import annotations

import pytest
import torch

import transom
from transom.kernels.engram.hashed_embedding import (
    hashed_embedding_backward,
    hashed_embedding_backward_rows,
)

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def run(op, *args, impl="native", **kwargs):
    with transom.use(impl), transom.record() as calls:
        out = op(*args, **kwargs)
    assert [(c.op, c.impl) for c in calls] == [(op.name, impl)]
    return out


def call(rows, B=2, S=70, n=3, h=3, d=20, dtype=torch.float32, vocab=50):
    g = torch.Generator().manual_seed(0)
    ends = torch.linspace(0, rows, (n - 1) * h + 1).long()
    hashed = dict(
        multipliers=torch.randint(1, 2**62, (n,), generator=g),
        moduli=ends.diff().view(n - 1, h),
        offsets=ends[:-1],
        pad=2,
        rows=rows,
    )
    dy = torch.randn(B, S, (n - 1) * h, d, generator=g).to(dtype)
    return dy, torch.randint(-1, vocab, (B, S), generator=g), hashed


def agree(dy, tokens, hashed):
    """Sums in the order of the tokens: the composite's bits."""
    got = run(hashed_embedding_backward, dy, tokens, **hashed)
    want = run(hashed_embedding_backward, dy, tokens, impl="composite", **hashed)
    assert torch.equal(got, want)
    ids, gradients = run(hashed_embedding_backward_rows, dy, tokens, **hashed)
    expected = run(hashed_embedding_backward_rows, dy, tokens, impl="composite", **hashed)
    assert torch.equal(ids, expected[0]) and torch.equal(gradients, expected[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", [1, 8, 33, 64])
@pytest.mark.parametrize("rows", [6, 97, 5000, 10**6])
def test_sums_in_the_order_of_the_tokens(dtype, d, rows):
    agree(*call(rows, d=d, dtype=dtype))


@pytest.mark.parametrize("vocab", [1, 2, 10**6])
@pytest.mark.parametrize("rows", [11, 3000])
def test_many_tokens_that_are_alike_or_all_different(vocab, rows):
    agree(*call(rows, B=1, S=3000, h=4, d=5, vocab=vocab))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_layout_of_the_gradient(dtype):
    dy, tokens, hashed = call(300, dtype=dtype)
    agree(dy.transpose(1, 2).contiguous().transpose(1, 2), tokens, hashed)
    agree(torch.zeros(2, 70, 6, 41, dtype=dtype)[..., 1::2].copy_(dy), tokens, hashed)
    agree(dy[:, :, :1].expand(-1, -1, 6, -1), tokens, hashed)


def test_a_gradient_for_another_shard_is_dropped_even_if_it_is_nan():
    dy, tokens, hashed = call(60)
    rows = transom.ngram_hash(tokens, **{k: v for k, v in hashed.items() if k != "rows"})
    whole = run(hashed_embedding_backward, dy, tokens, **hashed)
    dy[rows < 24] = float("nan")
    part = {**hashed, "rows": 36, "shard": (24, 36)}
    assert torch.equal(run(hashed_embedding_backward, dy, tokens, **part), whole[24:])
    agree(dy, tokens, part)


@pytest.mark.parametrize("S", [0, 1, 900])
def test_the_same_bits_at_any_number_of_threads(S):
    dy, tokens, hashed = call(40_000, S=S, h=8, dtype=torch.bfloat16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(
            (
                run(hashed_embedding_backward, dy, tokens, **hashed),
                *run(hashed_embedding_backward_rows, dy, tokens, **hashed),
            )
        )
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_count_in_bfloat16_is_taken_in_float32():
    dy, _, hashed = call(60, B=1, S=600, dtype=torch.bfloat16)
    got = run(hashed_embedding_backward, torch.ones_like(dy), torch.zeros(1, 600).long(), **hashed)
    assert float(got.max()) == float(torch.tensor(598.0).bfloat16())


def test_the_gradient_of_a_pooled_lookup_comes_from_here():
    _, tokens, hashed = call(300)
    rows = hashed.pop("rows")
    weights = torch.randn(rows, 20, requires_grad=True)
    with transom.record() as calls:
        y = transom.hashed_embedding_pooled(tokens, weights, **hashed, mean=True)
        dy = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, weights, dy)
    assert [(c.op, c.impl) for c in calls] == [
        ("hashed_embedding_pooled", "native"),
        ("hashed_embedding_backward", "native"),
    ]
    side = transom.hashed_embedding(tokens, weights, **hashed).unflatten(-1, (6, 20)).mean(2)
    torch.testing.assert_close(got, torch.autograd.grad(side, weights, dy)[0])
