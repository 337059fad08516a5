"""Native grouped_gemm: strides, the borders of tiles and panels, one row among many."""

from __future__ import annotations

import pytest
import torch

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HALVES = [torch.float32, torch.bfloat16, torch.float16]


def native(x, w, offsets):
    with transom.use("native"):
        return transom.grouped_gemm(x, w, offsets)


def exact(x, w, offsets):
    with transom.use("reference"):
        return transom.grouped_gemm(x, w, offsets)


def close(got, want, k):
    limit = 1e-6 * k**0.5 + 2 * torch.finfo(got.dtype).eps * want.double().abs()
    return ((got.double() - want.double()).abs() <= limit).all()


def stored(w, how):
    """The same weight [E,N,K] in another order in memory."""
    if how == "rows":
        return w.contiguous()
    if how == "transposed":
        return w.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "apart":
        return torch.full((*w.shape[:2], w.shape[2] + 5), 9.0, dtype=w.dtype)[..., 3:-2].copy_(w)
    return torch.zeros(*w.shape[:2], 2 * w.shape[2], dtype=w.dtype)[..., ::2].copy_(w)


def draw(M, N, K, E, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=g).to(dtype)
    return x, (torch.randn(E, N, K, generator=g) / K**0.5).to(dtype)


@pytest.mark.parametrize("how", ["rows", "transposed", "apart", "strided"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("N, K", [(31, 17), (33, 255), (97, 257), (16, 1), (1, 40), (530, 64)])
def test_any_strides_at_the_borders_of_tiles(how, dtype, N, K):
    x, w = draw(50, N, K, 4, dtype)
    offsets = torch.tensor([1, 9, 9, 49])
    assert close(native(x, stored(w, how), offsets), exact(x, w, offsets), K)


@pytest.mark.parametrize("how", ["rows", "transposed"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_row_has_the_same_bits_beside_any_number_of_rows(how, dtype):
    x, w = draw(300, 70, 600, 1, dtype)
    w = stored(w, how)
    together = native(x, w, torch.tensor([300]))
    for rows in (*range(1, 27), 127, 128, 129, 255):
        assert torch.equal(native(x[:rows], w, torch.tensor([rows])), together[:rows])
    assert torch.equal(native(x[299:], w, torch.tensor([1]))[0], together[299])


def test_both_orders_of_storage_give_the_same_bits():
    x, w = draw(40, 130, 700, 2, torch.float32)
    for offsets in ([3, 40], [40, 40], [1, 2]):
        ends = torch.tensor(offsets)
        assert torch.equal(native(x, w, ends), native(x, stored(w, "transposed"), ends))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_infinities_and_nan_of_a_weight_stay_in_their_columns(dtype):
    x, w = draw(20, 40, 300, 2, dtype)
    w[0, 7, 299], w[1, 33, 0], w[1, 5, 150] = float("inf"), float("nan"), -float("inf")
    for ends in ([1, 3], [10, 20]):
        offsets = torch.tensor(ends)
        got, want = native(x, w, offsets), exact(x, w, offsets)
        same = torch.isfinite(want)
        assert torch.equal(torch.isfinite(got), same)
        assert close(got[same], want[same], 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K, N", [(2048, 96), (2880, 64)])
def test_sums_of_real_length_are_accurate(dtype, K, N):
    x, w = draw(130, N, K, 2, dtype)
    offsets = torch.tensor([1, 130])
    want = torch.cat([x[:1].double() @ w[0].double().T, x[1:].double() @ w[1].double().T])
    error = (native(x, w, offsets).double() - want).abs().max() / want.abs().max()
    assert error < (2e-6 if dtype == torch.float32 else 4e-3)
