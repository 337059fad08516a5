"""add_rows: sums in index order, the same bits whatever the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from transom.kernels._ordered_sum import add_rows


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_by_one(into: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> np.ndarray:
    out = into.numpy().copy()
    for i, row in zip(index.tolist(), rows.numpy(), strict=True):
        if i >= 0:
            out[i] += row
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("R, D, n", [(3, 1, 4000), (7, 33, 3000), (500, 129, 3000)])
def test_rows_are_added_in_index_order_with_any_number_of_threads(
    R: int, D: int, n: int, dtype: torch.dtype, threads: None
) -> None:
    g = torch.Generator().manual_seed(R)
    index = torch.randint(-1, R, (n,), generator=g)
    # Magnitudes far apart: another order of additions gives other bits.
    rows = torch.randn(n, D, generator=g, dtype=dtype) * torch.randn(n, 1, generator=g).mul(4).exp()
    into = torch.randn(R, D, generator=g, dtype=dtype)
    expected = one_by_one(into, index, rows)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        got = into.clone()
        add_rows(got, index, rows)
        np.testing.assert_array_equal(got.numpy(), expected)


def test_nan_in_a_skipped_row_reaches_nothing() -> None:
    into = torch.zeros(3, 2)
    add_rows(
        into, torch.tensor([-1, 2, -7]), torch.tensor([[torch.nan] * 2, [1.0, 2], [torch.inf] * 2])
    )
    assert into.tolist() == [[0, 0], [0, 0], [1, 2]]


def test_index_may_be_int32_and_into_a_view() -> None:
    whole = torch.zeros(4, 6)
    add_rows(whole[1:3, ::2], torch.tensor([1, 1, 0], dtype=torch.int32), torch.ones(3, 3))
    assert whole.sum(1).tolist() == [0, 3, 6, 0]
    assert whole[:, 1::2].abs().sum() == 0


@pytest.mark.parametrize("R, D, n", [(0, 3, 0), (3, 0, 2), (3, 2, 0)])
def test_empty_inputs_change_nothing(R: int, D: int, n: int) -> None:
    into = torch.ones(R, D)
    add_rows(into, torch.zeros(n, dtype=torch.int64), torch.ones(n, D))
    assert torch.equal(into, torch.ones(R, D))


def test_rows_that_are_all_skipped_need_no_row_to_go_to() -> None:
    into = torch.ones(0, 2)
    add_rows(into, torch.tensor([-1, -1]), torch.ones(2, 2))
    assert into.shape == (0, 2)
