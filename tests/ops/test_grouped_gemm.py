"""grouped_gemm: rows beyond the end, experts without rows, strides, quantised weights, bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import transom
from transom import grouped_gemm
from transom.kernels.moe.grouped_gemm import (
    ROW_TILE,
    grouped_gemm_backward_weight,
    grouped_gemm_backward_x,
)

LIMIT = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def randn(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def by_loop(x: Tensor, weight: Tensor, offsets: list[int]) -> Tensor:
    """Row by row in float64; differentiable."""
    rows, start = [], 0
    for e, end in enumerate(offsets):
        rows += [weight[e].double() @ x[r].double() for r in range(start, end)]
        start = end
    rows += [torch.zeros(weight.shape[1], dtype=torch.float64)] * (x.shape[0] - len(rows))
    return torch.stack(rows) if rows else torch.zeros(0, weight.shape[1], dtype=torch.float64)


def error(got: Tensor, want: Tensor) -> float:
    want = want.detach().double()
    return float((got.detach().double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_equals_the_loop_over_rows(rng, dtype):
    """Contracts 14.2: grouped GEMM = loop; an expert without rows, rows without an expert."""
    x, weight = randn(rng, 29, 40, dtype=dtype), randn(rng, 5, 23, 40, dtype=dtype)
    offsets = [4, 4, 17, 18, 26]
    with transom.record() as calls:
        y = grouped_gemm(x, weight, torch.tensor(offsets))
    assert [(c.op, c.impl) for c in calls] == [("grouped_gemm", "composite")]
    assert y.dtype == dtype
    assert error(y, by_loop(x, weight, offsets)) <= LIMIT[dtype]


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64], ids=str)
def test_edge_01_no_rows(offsets):
    ends = torch.zeros(3, dtype=offsets)
    weight = torch.ones(3, 4, 5, requires_grad=True)
    y = grouped_gemm(torch.ones(0, 5), weight, ends)
    assert y.shape == (0, 4)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4, 5))


def test_edge_02_weight_gradient_of_an_expert_without_rows_is_exactly_zero(rng):
    weight = randn(rng, 4, 6, 8).requires_grad_()
    y = grouped_gemm(randn(rng, 9, 8), weight, torch.tensor([0, 5, 5, 9]))
    y.backward(randn(rng, 9, 6))
    assert torch.equal(weight.grad[[0, 2]], torch.zeros(2, 6, 8))
    assert (weight.grad[[1, 3]] != 0).all()


def test_edge_03_all_rows_to_one_expert(rng):
    x, weight = randn(rng, 70, 16), randn(rng, 6, 12, 16)
    y = grouped_gemm(x, weight, torch.tensor([0, 0, 0, 70, 70, 70]))
    assert error(y, x.double() @ weight[3].double().T) <= 2e-5


def test_edge_07_nan_beyond_the_last_offset_reaches_nothing(rng):
    x, weight = randn(rng, 10, 8), randn(rng, 3, 6, 8).requires_grad_()
    ends = torch.tensor([2, 2, 7])
    x[7:] = float("nan")
    x.requires_grad_()
    y = grouped_gemm(x, weight, ends)
    assert torch.equal(y[7:], torch.zeros(3, 6))
    dy = randn(rng, 10, 6)
    dy[7:] = float("nan")
    y.backward(dy)
    assert torch.equal(x.grad[7:], torch.zeros(3, 8))
    assert torch.isfinite(weight.grad).all()
    assert torch.equal(weight.grad[1], torch.zeros(6, 8))


@pytest.mark.parametrize(("K", "N"), [(96, 45), (2880 // 8, 7), (1, 1), (768 // 8, 2)])
def test_edge_13_sizes_that_no_block_divides(rng, K, N):
    x, weight = randn(rng, 13, K), randn(rng, 3, N, K)
    assert (
        error(grouped_gemm(x, weight, torch.tensor([5, 6, 13])), by_loop(x, weight, [5, 6, 13]))
        <= 2e-5
    )


def test_edge_16_strides_change_nothing(rng):
    x, weight = randn(rng, 12, 10), randn(rng, 3, 8, 10)
    ends = torch.tensor([4, 9, 12])
    want = by_loop(x, weight, [4, 9, 12])
    sliced = torch.cat([x, x], 1)[:, 5:15]
    sliced.copy_(x)
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.full((3, 9, 13), float("nan"))[:, :8, :10]
    padded.copy_(weight)
    for w in (weight, transposed, padded):
        assert error(grouped_gemm(sliced, w, ends), want) <= 2e-5


def test_a_weight_is_never_copied_whole(rng, monkeypatch):
    """Transposed bf16 storage, small workspace: no temporary is larger than a tile."""
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.25")
    weight = randn(rng, 4, 128, 256, dtype=torch.bfloat16).transpose(1, 2)
    seen = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not out._is_view():
                seen.append(out.nbytes)
            return out

    x = randn(rng, 6, 128, dtype=torch.bfloat16)
    with Sizes():
        y = transom.grouped_gemm.impls["composite"].function(x, weight, torch.tensor([2, 3, 5, 6]))
    assert max(seen) <= 128 * 128 * 4
    assert error(y, by_loop(x, weight, [2, 3, 5, 6])) <= 2e-2


def test_the_workspace_changes_no_value(rng, monkeypatch):
    x, weight = (
        randn(rng, 150, 32, dtype=torch.bfloat16),
        randn(rng, 3, 300, 32, dtype=torch.bfloat16),
    )
    ends = torch.tensor([100, 100, 140])
    grads = []
    for size in ("64", "0.02"):
        monkeypatch.setenv("TRANSOM_WORKSPACE_MB", size)
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = grouped_gemm(a, b, ends)
        y.float().square().sum().backward()
        grads.append((y.detach(), a.grad, b.grad))
    for one, other in zip(*grads, strict=True):
        assert error(one, other) <= 1e-2


def test_edge_19_a_row_has_the_same_bits_alone_and_among_many(rng, deterministic):
    x, weight = randn(rng, 200, 96), randn(rng, 2, 70, 96)
    many = grouped_gemm(x, weight, torch.tensor([130, 200]))
    back = grouped_gemm_backward_x(many, weight, torch.tensor([130, 200]))
    for row in (0, 1, ROW_TILE - 1, ROW_TILE, 77, 129, 130, 199):
        ends = torch.tensor([1, 1] if row < 130 else [0, 1])
        alone = grouped_gemm(x[row : row + 1], weight, ends)
        assert torch.equal(alone[0], many[row])
        assert torch.equal(grouped_gemm_backward_x(alone, weight, ends)[0], back[row])


def test_gradients_in_float64(rng):
    x = randn(rng, 7, 5, dtype=torch.float64).requires_grad_()
    weight = randn(rng, 3, 4, 5, dtype=torch.float64).requires_grad_()
    ends = torch.tensor([2, 2, 6])
    assert torch.autograd.gradcheck(lambda a, b: grouped_gemm(a, b, ends), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_autograd_of_the_loop(rng, dtype):
    x, weight = randn(rng, 40, 24, dtype=dtype), randn(rng, 4, 18, 24, dtype=dtype)
    dy = randn(rng, 40, 18, dtype=dtype)
    ends = [11, 11, 30, 38]
    mine = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    with transom.record() as calls:
        grouped_gemm(*mine, torch.tensor(ends)).backward(dy)
    by_loop(*exact, ends).backward(dy.double())
    assert {c.op for c in calls} == {
        "grouped_gemm",
        "grouped_gemm_backward_x",
        "grouped_gemm_backward_weight",
    }
    for a, b in zip(mine, exact, strict=True):
        assert a.grad.dtype == dtype
        assert error(a.grad, b.grad) <= LIMIT[dtype]


def test_a_float32_weight_under_bfloat16_rows_gets_its_gradient_in_float32(rng):
    x, weight = randn(rng, 300, 8, dtype=torch.bfloat16), randn(rng, 1, 4, 8).requires_grad_()
    dy = randn(rng, 300, 4, dtype=torch.bfloat16)
    grouped_gemm(x, weight, torch.tensor([300])).backward(dy)
    assert weight.grad.dtype == torch.float32
    assert error(weight.grad[0], dy.double().T @ x.double()) <= 2e-5


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4"])
def test_a_quantised_weight_is_its_dequantised_self(rng, format):
    weight = transom.quantize(randn(rng, 3, 40, 128), format)
    x = randn(rng, 9, 128).requires_grad_()
    ends = torch.tensor([4, 4, 9])
    y = grouped_gemm(x, weight, ends)
    assert error(y, by_loop(x, weight.dequantize(), [4, 4, 9])) <= 2e-5
    y.backward(randn(rng, 9, 40))
    assert torch.isfinite(x.grad).all() and (x.grad != 0).any()


def test_autocast_lowers_the_rows_only(rng):
    weight = randn(rng, 2, 6, 8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_gemm(randn(rng, 5, 8), weight, torch.tensor([2, 5]))
    y.float().sum().backward()
    assert (y.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_compiles_without_a_graph_break(rng):
    x, weight, ends = randn(rng, 9, 8), randn(rng, 2, 6, 8), torch.tensor([4, 9])
    call = torch.compile(grouped_gemm, backend="aot_eager", fullgraph=True)
    assert torch.equal(call(x, weight, ends), grouped_gemm(x, weight, ends))


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ([3, 2], "grouped_gemm: offsets decreases from 3 to 2 at expert 1; inclusive ends never"),
        ([3, 6], "grouped_gemm: offsets ends with 6; x has M = 5 rows"),
        ([-1, 5], "grouped_gemm: offsets starts with -1; inclusive ends must be >= 0"),
    ],
)
def test_bad_offsets(ends, text):
    with pytest.raises(ValueError, match=text):
        grouped_gemm(torch.ones(5, 4), torch.ones(2, 3, 4), torch.tensor(ends))


def test_bad_shapes_and_dtypes():
    x, weight, ends = torch.ones(5, 4), torch.ones(2, 3, 4), torch.tensor([2, 5])
    with pytest.raises(ValueError, match="grouped_gemm: weight has K = 7; x has K = 4"):
        grouped_gemm(x, torch.ones(2, 3, 7), ends)
    with pytest.raises(ValueError, match="grouped_gemm: offsets has E = 3; weight has E = 2"):
        grouped_gemm(x, weight, torch.tensor([1, 2, 5]))
    with pytest.raises(TypeError, match="grouped_gemm: offsets is float32"):
        grouped_gemm(x, weight, ends.float())


def test_backward_operators_check_offsets_too():
    dy, weight = torch.ones(5, 3), torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="grouped_gemm_backward_x: offsets ends with 6"):
        grouped_gemm_backward_x(dy, weight, torch.tensor([1, 6]))
    with pytest.raises(ValueError, match="grouped_gemm_backward_weight: offsets decreases"):
        grouped_gemm_backward_weight(dy, torch.ones(5, 4), torch.tensor([4, 1]), weight)
