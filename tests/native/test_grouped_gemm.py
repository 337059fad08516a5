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


QUANTISED = [
    ("int8", None, None),
    ("int8", (1, 32), None),
    ("int8", (3, 20), None),
    ("int4", 32, None),
    ("int4", 128, None),
    ("int4", (1, 6), None),
    ("int4", (1, 0), None),
    ("fp8", 128, None),
    ("fp8", 32, "e8m0"),
    ("fp8", (1, 128), None),
    ("fp8", (5, 7), "e8m0"),
    ("mxfp4", None, "e8m0"),
]


def quantised(format, group, scale_format, E, N, K, seed=0):
    """Random codes, every one of them, and scales of every size."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = transom.weights.layout.checked_group(format, group)
    stored = (E, N, K // 2) if format in ("int4", "mxfp4") else (E, N, K)
    values = torch.randint(0, 256, stored, generator=g, dtype=torch.uint8)
    if format == "fp8":
        values[values & 0x7F == 0x7F] = 3
    if format == "int8":
        values = values.view(torch.int8)
    grid = [E, *(transom.weights.layout.grid_size(*p) for p in ((N, rows), (K, columns)))]
    if scale_format == "e8m0" or format == "mxfp4":
        scales = torch.randint(110, 133, grid, generator=g, dtype=torch.uint8)
    else:
        scales = torch.randn(grid, generator=g).exp() * 100
    zeros = torch.randint(0, 16, grid, generator=g, dtype=torch.uint8) if format == "int4" else None
    return transom.QuantizedWeight(format, values, scales, zeros, group=group)


@pytest.mark.parametrize("form", QUANTISED, ids=str)
@pytest.mark.parametrize("N, K", [(130, 320), (35, 70), (5, 18), (300, 256)])
def test_a_quantised_weight_gives_the_bits_of_the_dequantised_one(form, N, K):
    w = quantised(*form, 3, N, K)
    plain = w.dequantize()
    for dtype in HALVES:
        # test_integer_products.py: longer rows of 16 bits are multiplied in fixed point
        if dtype != torch.float32 and K >= 256 and form[0] != "fp8":
            continue
        x = draw(40, 1, K, 1, dtype)[0]
        for ends in ([1, 3, 40], [0, 30, 31]):
            offsets = torch.tensor(ends)
            assert torch.equal(native(x, w, offsets), native(x.float(), plain, offsets).to(dtype))


def test_nan_codes_and_nan_scales_of_a_quantised_weight():
    w = quantised("fp8", 128, None, 1, 40, 256)
    w.values[0, 3, 200], w.values[0, 39, 0] = 0x7F, 0xFF
    e = quantised("mxfp4", None, None, 1, 40, 256)
    e.scales[0, 7, 2], e.scales[0, 8, 0] = 255, 0
    for weight, bad in ((w, [3, 39]), (e, [7])):
        for rows in (1, 20):
            x = draw(rows, 1, 256, 1, torch.float32)[0]
            got = native(x, weight, torch.tensor([rows]))
            want = native(x, weight.dequantize(), torch.tensor([rows]))
            assert torch.equal(got.isnan(), want.isnan())
            assert got.isnan().any(0).nonzero().flatten().tolist() == bad
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-38, 1e30, 3e38])
def test_extreme_scales_of_a_quantised_weight(scale):
    w = quantised("fp8", 128, None, 1, 40, 256)
    w.values[0, :, 1:] = 0
    w.scales.fill_(scale)
    x = draw(3, 1, 256, 1, torch.float32)[0]
    for rows in (1, 3):
        got = native(x[:rows], w, torch.tensor([rows]))
        assert torch.equal(got, native(x[:rows], w.dequantize(), torch.tensor([rows])))
