"""hashed_embedding_pooled: what the generic kit cannot know."""

from __future__ import annotations

import pytest
import torch

import transom

B, S, D = 2, 7, 32
MODULI = torch.tensor([[11, 13], [17, 19]])
ROWS, COLUMNS = int(MODULI.sum()), MODULI.numel()
ENDS = MODULI.flatten().cumsum(0)
HASHED = dict(
    multipliers=torch.tensor([2**61 + 1, 9007199254740993, 77777]),
    moduli=MODULI,
    offsets=ENDS - MODULI.flatten(),
    pad=3,
)


def tokens(seed=0):
    return torch.randint(0, 6, (B, S), generator=torch.Generator().manual_seed(seed))


def table(dtype=torch.float32, seed=0):
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def side_by_side(ids, weights, **change):
    y = transom.hashed_embedding(ids, weights, **{**HASHED, **change})
    return y.unflatten(-1, (COLUMNS, D))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mean", [False, True])
def test_is_the_sum_or_mean_of_the_rows_side_by_side(dtype, mean):
    ids, weights = tokens(), table(dtype)
    y = transom.hashed_embedding_pooled(ids, weights, **HASHED, mean=mean)
    rows = side_by_side(ids, weights)
    torch.testing.assert_close(y, rows.mean(2) if mean else rows.sum(2))


def test_is_an_embedding_bag_over_the_hashed_rows():
    ids, weights = tokens(), table()
    bags = transom.ngram_hash(ids, **HASHED).flatten(0, 1).long()
    want = torch.nn.functional.embedding_bag(bags, weights, mode="sum").view(B, S, D)
    torch.testing.assert_close(transom.hashed_embedding_pooled(ids, weights, **HASHED), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32_and_rounded_once(dtype):
    ids, weights = tokens(), table(dtype)
    y = transom.hashed_embedding_pooled(ids, weights, **HASHED)
    rows = side_by_side(ids, weights).float()
    want = rows[:, :, 0] + rows[:, :, 1] + rows[:, :, 2] + rows[:, :, 3]
    assert y.dtype == dtype and torch.equal(y, want.to(dtype))


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4"])
def test_quantised_rows_are_decoded_before_they_are_added(format):
    ids, weights = tokens(), transom.quantize(table(), format, group=None)
    y = transom.hashed_embedding_pooled(ids, weights, **HASHED)
    torch.testing.assert_close(y, side_by_side(ids, weights).sum(2))


@pytest.mark.parametrize("mean", [False, True])
def test_edge_64_shards_add_up_to_the_whole_table(mean):
    ids, weights = tokens(), table().round()
    whole = transom.hashed_embedding_pooled(ids, weights, **HASHED, mean=mean)
    parts = [
        transom.hashed_embedding_pooled(ids, weights[a:b], **HASHED, mean=mean, shard=(a, b - a))
        for a, b in ((0, 20), (20, 20), (20, ROWS))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("mean", [False, True])
def test_gradient_is_that_of_the_rows_side_by_side(mean):
    ids, weights = tokens(), table(torch.float64).requires_grad_()
    dy = torch.randn(B, S, D, dtype=torch.float64)
    y = transom.hashed_embedding_pooled(ids, weights, **HASHED, mean=mean)
    (got,) = torch.autograd.grad(y, weights, dy)
    rows = side_by_side(ids, weights)
    (want,) = torch.autograd.grad(rows.mean(2) if mean else rows.sum(2), weights, dy)
    torch.testing.assert_close(got, want)


def test_blocks_of_any_size_give_the_same_result(monkeypatch):
    ids, weights = tokens(), table(torch.bfloat16).requires_grad_()
    found = []
    for mib in ("64", "0.0005"):
        monkeypatch.setenv("TRANSOM_WORKSPACE_MB", mib)
        y = transom.hashed_embedding_pooled(ids, weights, **HASHED)
        found.append((y, *torch.autograd.grad(y, weights, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bad_input_is_refused_under_its_own_name():
    with pytest.raises(ValueError, match=r"^hashed_embedding_pooled: shard is \(0, 5\); table has"):
        transom.hashed_embedding_pooled(tokens(), table(), **HASHED, shard=(0, 5))
    with pytest.raises(ValueError, match="^hashed_embedding_pooled: lookback has 3 columns"):
        transom.hashed_embedding_pooled(tokens(), table(), **HASHED, lookback=tokens()[:, :3])
