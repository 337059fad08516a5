"""hashed_embedding: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.engram.hashed_embedding import (
    hashed_embedding_backward,
    hashed_embedding_backward_rows,
)

B, S, N, H, D, PAD = 2, 7, 3, 2, 32, 3
MODULI = torch.tensor([[11, 13], [17, 19]])
ROWS = int(MODULI.sum())


def hashed(**change) -> dict:
    ends = MODULI.flatten().cumsum(0)
    call = dict(
        multipliers=torch.tensor([2**61 + 1, 9007199254740993, 77777]),
        moduli=MODULI,
        offsets=ends - MODULI.flatten(),
        pad=PAD,
    )
    return {**call, **change}


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 6, (B, S), generator=torch.Generator().manual_seed(seed))


def table(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(ids: Tensor, **change) -> Tensor:
    return transom.ngram_hash(ids, **hashed(**change)).long()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_is_hash_and_gather(dtype):
    ids, weights = tokens(), table(dtype)
    y = transom.hashed_embedding(ids, weights, **hashed())
    assert y.dtype == dtype
    assert torch.equal(y, weights[rows_of(ids)].flatten(2))


@pytest.mark.parametrize("format, group", [("fp8", (1, 32)), ("int8", None), ("mxfp4", None)])
def test_edge_67_quantised_rows_are_decoded_after_the_gather(format, group):
    ids = tokens()
    weights = transom.quantize(table(), format, **({} if group is None else {"group": group}))
    y = transom.hashed_embedding(ids, weights, **hashed())
    assert y.dtype == torch.float32
    assert torch.equal(y, weights.dequantize()[rows_of(ids)].flatten(2))


def test_edge_55_row_numbers_pass_32_bits():
    """Row * row bytes needs 64 bits in V4.1; here the row number itself does."""
    ids, first = tokens(), 3 * 2**31
    call = hashed(offsets=hashed()["offsets"] + first)
    y = transom.hashed_embedding(ids, table(), **call, shard=(first, ROWS))
    assert torch.equal(y, transom.hashed_embedding(ids, table(), **hashed()))


def test_edge_64_shards_add_up_to_the_whole_table():
    ids, weights = tokens(), table()
    whole = transom.hashed_embedding(ids, weights, **hashed())
    parts = [
        transom.hashed_embedding(ids, weights[a:b], **hashed(), shard=(a, b - a))
        for a, b in ((0, 20), (20, 20), (20, 41), (41, ROWS))
    ]
    assert torch.equal(sum(parts), whole)
    assert not parts[1].any()


def test_edge_64_a_row_of_another_shard_is_not_read():
    ids, weights = tokens(), table()
    weights[:20] = float("nan")
    part = transom.hashed_embedding(ids, weights[20:], **hashed(), shard=(20, ROWS - 20))
    assert bool(part.isfinite().all())


def test_edge_51_no_tokens():
    y = transom.hashed_embedding(tokens()[:, :0], table(), **hashed())
    assert y.shape == (B, 0, MODULI.numel() * D)


@pytest.mark.parametrize("columns", range(N))
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse gradient"])
def test_edge_51_before_a_short_lookback_is_the_start(columns, sparse):
    ids = tokens()
    call = dict(hashed(), lookback=ids[:, :columns])
    own, whole = table().requires_grad_(), table().requires_grad_()
    y = transom.hashed_embedding(ids[:, columns:], own, **call, sparse_gradient=sparse)
    expected = transom.hashed_embedding(ids, whole, **hashed())[:, columns:]
    assert torch.equal(y, expected)
    out = torch.empty_like(y)
    with torch.no_grad():
        transom.hashed_embedding(ids[:, columns:], own, **call, out=out)
    assert torch.equal(out, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(own.grad.to_dense() if sparse else own.grad, whole.grad)
    chosen = transom.explain("hashed_embedding", ids[:, columns:], table(), **call).chosen
    assert chosen == "composite"


def test_edge_51_a_lookback_longer_than_n_minus_1_is_refused():
    text = "hashed_embedding: lookback has 3 columns; expected at most n-1 = 2; pass the newest"
    with pytest.raises(ValueError, match=f"^{text}$"):
        transom.hashed_embedding(tokens(), table(), **hashed(lookback=tokens()[:, :3]))


def test_edge_60_chunks_with_lookback_equal_the_whole():
    ids, weights = tokens(), table()
    blocked = torch.zeros(B, S, dtype=torch.bool)
    blocked[:, 2] = True
    whole = transom.hashed_embedding(ids, weights, **hashed(), blocked=blocked)
    kept = torch.where(blocked, -1, ids)
    for cut in range(N - 1, S):
        y = transom.hashed_embedding(
            ids[:, cut:],
            weights,
            **hashed(),
            blocked=blocked[:, cut:],
            lookback=kept[:, cut + 1 - N : cut],
        )
        assert torch.equal(y, whole[:, cut:])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_out_is_written_and_returned(out_dtype):
    ids, weights = tokens(), table()
    out = torch.full((B, S, MODULI.numel() * D), float("nan"), dtype=out_dtype)
    y = transom.hashed_embedding(ids, weights, **hashed(), out=out)
    assert y is out
    assert torch.equal(out, transom.hashed_embedding(ids, weights, **hashed()).to(out_dtype))


def test_out_has_no_gradient():
    weights = table().requires_grad_()
    out = torch.empty(B, S, MODULI.numel() * D)
    with pytest.raises(ValueError, match="^hashed_embedding: out is given and table requires"):
        transom.hashed_embedding(tokens(), weights, **hashed(), out=out)
    with torch.no_grad():
        transom.hashed_embedding(tokens(), weights, **hashed(), out=out)
    assert torch.equal(out, weights.detach()[rows_of(tokens())].flatten(2))


def test_blocks_of_any_size_give_the_same_result(monkeypatch):
    ids, weights = tokens(), table(torch.bfloat16)
    dy = torch.randn(B, S, MODULI.numel(), D).bfloat16()
    y = transom.hashed_embedding(ids, weights, **hashed())
    grad = hashed_embedding_backward(dy, ids, **hashed(), rows=ROWS)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.0005")
    assert torch.equal(y, transom.hashed_embedding(ids, weights, **hashed()))
    assert torch.equal(grad, hashed_embedding_backward(dy, ids, **hashed(), rows=ROWS))


def test_gradient_is_that_of_indexing():
    ids = tokens()
    weights = table(torch.float64).requires_grad_()
    dy = torch.randn(B, S, MODULI.numel() * D, dtype=torch.float64)
    (got,) = torch.autograd.grad(transom.hashed_embedding(ids, weights, **hashed()), weights, dy)
    (want,) = torch.autograd.grad(weights[rows_of(ids)].flatten(2), weights, dy)
    torch.testing.assert_close(got, want)


def test_gradient_of_a_bfloat16_table_is_summed_in_float32():
    ids = torch.zeros(1, 600, dtype=torch.long)
    weights = table(torch.bfloat16).requires_grad_()
    y = transom.hashed_embedding(ids, weights, **hashed())
    (got,) = torch.autograd.grad(y, weights, torch.ones_like(y))
    # summed in bfloat16 a count stops at 256
    assert float(got.max()) == float(torch.tensor(598.0).bfloat16())


def test_sparse_gradient_equals_the_dense_one():
    ids = tokens()
    weights = table().requires_grad_()
    dy = torch.randn(B, S, MODULI.numel() * D)
    dense, sparse = (
        torch.autograd.grad(
            transom.hashed_embedding(ids, weights, **hashed(), sparse_gradient=flag), weights, dy
        )[0]
        for flag in (False, True)
    )
    assert sparse.is_sparse and sparse.is_coalesced()
    assert sparse.indices().shape[1] == rows_of(ids).unique().numel()
    assert torch.equal(sparse.to_dense(), dense)


def test_sparse_gradient_works_with_sparse_adam():
    ids = tokens()
    weights = torch.nn.Parameter(table())
    before = weights.detach().clone()
    optimizer = torch.optim.SparseAdam([weights], lr=0.1)
    transom.hashed_embedding(ids, weights, **hashed(), sparse_gradient=True).sum().backward()
    optimizer.step()
    moved = (weights.detach() != before).any(1).nonzero().flatten()
    assert torch.equal(moved, rows_of(ids).unique())


def test_row_gradient_is_packed_with_minus_one_behind():
    ids = tokens()
    dy = torch.randn(B, S, MODULI.numel(), D)
    found, gradients = hashed_embedding_backward_rows(dy, ids, **hashed(), rows=ROWS)
    unique = rows_of(ids).unique()
    assert found.shape == (B * S * MODULI.numel(),)
    assert torch.equal(found[: len(unique)], unique)
    assert bool((found[len(unique) :] == -1).all()) and not gradients[len(unique) :].any()


def test_a_gradient_for_another_shard_is_dropped_even_if_it_is_nan():
    ids = tokens()
    dy = torch.randn(B, S, MODULI.numel(), D)
    rows = rows_of(ids)
    dy[rows < 24] = float("nan")
    part = hashed_embedding_backward(dy, ids, **hashed(), rows=ROWS - 24, shard=(24, ROWS - 24))
    whole = hashed_embedding_backward(dy, ids, **hashed(), rows=ROWS)
    assert torch.equal(part, whole[24:]) and bool(part.isfinite().all())


def test_gradients_repeat_bit_for_bit():
    ids = torch.zeros(1, 400, dtype=torch.long)
    dy = torch.randn(1, 400, MODULI.numel(), D)
    first = hashed_embedding_backward(dy, ids, **hashed(), rows=ROWS)
    assert all(
        torch.equal(first, hashed_embedding_backward(dy, ids, **hashed(), rows=ROWS))
        for _ in range(20)
    )


@pytest.mark.parametrize(
    "call, text",
    [
        (hashed(offsets=torch.tensor([0, 11, 24, 42])), "rows up to 60; table has 60 rows"),
        (hashed(moduli=MODULI * 0), "moduli has 0; every entry must be > 0"),
        (hashed(shard=(0, 5)), "shard is (0, 5); table has 60 rows"),
        (hashed(offsets=torch.tensor([0, -1, 24, 41])), "offsets has -1; every entry must be >= 0"),
    ],
)
def test_edge_56_bad_input_is_refused_in_one_line(call, text):
    with pytest.raises(ValueError, match="^hashed_embedding: ") as error:
        transom.hashed_embedding(tokens(), table(), **call)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_the_composite_ran_forward_and_backward():
    weights = table().requires_grad_()
    with transom.record() as calls:
        transom.hashed_embedding(tokens(), weights, **hashed()).sum().backward()
    assert [(c.op, c.impl) for c in calls] == [
        ("hashed_embedding", "composite"),
        ("hashed_embedding_backward", "composite"),
    ]
