"""Rows of 16 bits times int8, int4 and mxfp4 weights: in fixed point where the level has it."""

from __future__ import annotations

import pytest
import torch

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FORMS = [
    ("int8", None),
    ("int8", (1, 128)),
    ("int8", (4, 32)),
    ("int8", (1, 96)),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
    ("int4", (3, 256)),
    ("int4", (1, 0)),
    ("mxfp4", None),
]
HALVES = [torch.bfloat16, torch.float16]


def native(x, w, offsets):
    with transom.use("native"):
        return transom.grouped_gemm(x, w, offsets)


def alone(x, w):
    return native(x, w, torch.tensor([len(x)]))


def quantised(format, group, E, N, K, seed=0):
    """Random codes and zero points, every one of them, and scales within a factor of 16."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = transom.weights.layout.checked_group(format, group)
    stored = (E, N, K if format == "int8" else K // 2)
    values = torch.randint(0, 256, stored, generator=g, dtype=torch.uint8)
    grid = [E, *(transom.weights.layout.grid_size(*p) for p in ((N, rows), (K, columns)))]
    scales = torch.randint(118, 123, grid, generator=g, dtype=torch.uint8)
    if format != "mxfp4":
        scales = torch.rand(grid, generator=g) * 0.03 + 0.002
    zeros = torch.randint(0, 16, grid, generator=g, dtype=torch.uint8) if format == "int4" else None
    values = values.view(torch.int8) if format == "int8" else values
    return transom.QuantizedWeight(format, values, scales, zeros, group=group)


def draw(M, K, dtype, seed=0):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x, w):
    return x.double() @ w.dequantize()[0].double().T


def close(got, want):
    limit = 2e-5 * want.abs().max() + 0.51 * torch.finfo(got.dtype).eps * want.abs()
    return ((got.double() - want).abs() <= limit).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("N, K", [(130, 320), (35, 704), (5, 256), (17, 4224), (40, 300)])
def test_products_agree_and_a_row_has_the_same_bits_beside_any_others(form, dtype, N, K):
    w, x = quantised(*form, 1, N, K), draw(131, K, dtype)
    together = alone(x, w)
    assert close(together, exact(x, w))
    for rows in (*range(1, 14), 127, 130):
        assert torch.equal(alone(x[:rows], w), together[:rows])
    assert torch.equal(alone(x[130:], w), together[130:])
    assert torch.equal(native(x, w, torch.tensor([90]))[:90], together[:90])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_largest_sums_do_not_overflow(form):
    w = quantised(*form, 1, 24, 1024)
    for code, x in ((0xFF, 1.9921875), (0x80, -1.9921875), (0x77, 1.984375), (0x00, 65280.0)):
        w.values.view(torch.uint8).fill_(code)
        if w.zeros is not None:
            w.zeros.fill_(15 if code in (0x00, 0x80) else 0)
        rows = torch.full((9, 1024), x, dtype=torch.bfloat16)
        want = exact(rows, w)
        assert close(alone(rows, w), want)
        assert close(alone(rows[:1], w), want[:1])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_without_fixed_point_stay_exact_and_harm_no_others(form):
    w, x = quantised(*form, 1, 43, 512), draw(30, 512, torch.bfloat16)
    want = alone(x, w)
    odd = {3: float("nan"), 4: float("inf"), 9: 3e38, 29: 1e-37}
    for row, value in odd.items():
        x[row, 77] = value
        x[row, 128:256] = 0 if value != 1e-37 else 1e-37
    x[17, 64:320] = 0
    got = alone(x, w)
    rest = [i for i in range(30) if i not in odd and i != 17]
    assert torch.equal(got[rest], want[rest])
    assert close(got[17:18], exact(x[17:18], w))
    with transom.use("native"):
        plain = transom.grouped_gemm(x.float(), w.dequantize(), torch.tensor([30])).bfloat16()
    for row in odd:
        assert torch.equal(got[row].isnan(), plain[row].isnan())
        torch.testing.assert_close(got[row], plain[row], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(alone(x[row : row + 1], w)[0].isnan(), got[row].isnan())


def test_extreme_scales():
    w, x = quantised("mxfp4", None, 1, 40, 256), draw(20, 256, torch.bfloat16)
    w.scales[0, 7, 2], w.scales[0, 8, :], w.scales[0, 9, :] = 255, 0, 254
    w.values[0, 9] = 0
    for rows in (1, 20):
        got = alone(x[:rows], w)
        assert got.isnan().any(0).nonzero().flatten().tolist() == [7]
        assert (got[:, 9] == 0).all()
        assert (got[:, 8].abs() < 1e-34).all()
        keep = [i for i in range(40) if i != 7]
        assert close(got[:, keep], exact(x[:rows], w)[:, keep])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", [("int8", None), ("int4", 32), ("int4", 128), ("mxfp4", None)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_experts_agree_and_a_token_has_the_same_bits_beside_any_others(form, dtype, interleaved):
    T, D, width, E, K = 150, 320, 256, 3, 2
    g = torch.Generator().manual_seed(5)
    gate_up, down = quantised(*form, E, 2 * width, D), quantised(*form, E, D, width, 1)
    x = draw(T, D, dtype) / 16
    ids, weights = torch.randint(-1, E, (T, K), generator=g), torch.rand(T, K, generator=g)
    kept = dict(interleaved=interleaved)

    def run(some, impl="native"):
        with transom.use(impl):
            return transom.moe_experts(x[some], ids[some], weights[some], gate_up, down, **kept)

    together = run(slice(None))
    want = run(slice(None), "reference").double()
    assert (
        (together.double() - want).abs()
        <= 2e-4 * want.abs().max() + torch.finfo(dtype).eps * want.abs()
    ).all()
    for first, tokens in ((3, 1), (7, 2), (0, 9), (11, 130)):
        some = slice(first, first + tokens)
        assert torch.equal(run(some), together[some])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(run(slice(None)), together)
    finally:
        torch.set_num_threads(threads)
