"""mxfp4: E2M1 elements, an E8M0 scale for each 32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import transom
from transom.kernels.quant.fp8 import dequantize_fp8, quantize_fp8_e8m0
from transom.kernels.quant.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from transom.weights.codes import decode_e8m0

SHAPES = [(3, 5, 70), (4, 64), (2, 1, 3, 6), (0, 8), (3, 0), (2, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_edge_13_bits_equal_the_reference(rng, shape, dtype):
    size = np.exp(rng.normal(0, 3, shape[:-1] + (1,)))
    x = torch.from_numpy(rng.standard_normal(shape) * size).to(dtype)
    with transom.record() as calls:
        found = quantize_mxfp4(x)
        back = dequantize_mxfp4(*found)
    assert [c.impl for c in calls] == ["composite", "composite"]
    with transom.use("reference"):
        expected = quantize_mxfp4(x)
        expected_back = dequantize_mxfp4(*found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(back, expected_back)


def test_ties_go_to_the_even_code():
    """Contracts 6: midpoints 0.75, 1.75 and 3.5 are where two published rules disagree."""
    x = torch.zeros(1, 32)
    x[0, :9] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -3.5])
    values, scales = quantize_mxfp4(x)
    assert scales.tolist() == [[127]]
    back = dequantize_mxfp4(values, scales)
    assert back[0, :9].tolist() == [6, 0, 1, 1, 2, 2, 4, 4, -4]


def test_the_even_element_is_the_low_nibble():
    values, _ = quantize_mxfp4(torch.tensor([[6.0, -1.0, 0.5, -0.0]]))
    assert values.tolist() == [[0xA7, 0x81]]


@pytest.mark.parametrize(
    "largest, byte", [(6.0, 127), (6.1, 128), (12.0, 128), (4.0, 127), (3.0, 126)]
)
def test_a_scale_is_rounded_up_and_never_clips(largest, byte):
    _, scales = quantize_mxfp4(torch.tensor([[largest, -largest / 5]]))
    assert scales.tolist() == [[byte]]


def test_every_element_is_within_half_a_step(rng):
    x = torch.from_numpy(rng.standard_normal((64, 192)) * np.exp(rng.normal(0, 1, (64, 192))))
    values, scales = quantize_mxfp4(x)
    error = (dequantize_mxfp4(values, scales).double() - x).abs()
    spread = decode_e8m0(scales).double().repeat_interleave(32, -1)
    assert (error <= torch.maximum(x.abs() / 4, spread / 4) * (1 + 1e-5)).all()


def test_zero_blocks_have_the_least_normal_scale_and_zero_values():
    values, scales = quantize_mxfp4(torch.zeros(3, 64))
    assert not values.any() and scales.unique().tolist() == [1]
    assert not dequantize_mxfp4(values, scales).any()


def test_a_block_with_nan_or_inf_is_nan_and_harms_no_other():
    x = torch.ones(2, 96)
    x[0, 1], x[1, 40] = float("nan"), float("inf")
    values, scales = quantize_mxfp4(x)
    nan = torch.isnan(dequantize_mxfp4(values, scales))
    assert nan[0, :32].all() and nan[1, 32:64].all() and nan.sum() == 64
    assert scales.tolist() == [[255, 125, 125], [125, 255, 125]]


def test_numbers_at_the_ends_of_float32():
    x = torch.zeros(2, 32)
    x[0, :2], x[1, :2] = torch.tensor([2e38, -2e38]), torch.tensor([1e-40, 1e-37])
    back = dequantize_mxfp4(*quantize_mxfp4(x))
    assert torch.isfinite(back).all()
    assert ((back[:, :2] - x[:, :2]).abs() <= x[:, :2].abs() / 4 + 2.0**-128).all()


@pytest.mark.parametrize("largest", [torch.finfo(torch.float32).max, 3.5 * 2.0**126, 3e38, 2.9e38])
def test_finite_weights_near_the_end_of_float32_stay_finite(largest):
    x = torch.linspace(-1, 1, 64).reshape(2, 32) * largest
    found = quantize_mxfp4(x)
    back = dequantize_mxfp4(*found)
    assert back.abs().max() == 3 * 2.0**126
    assert found[1].tolist() == [[253], [253]]
    with transom.use("reference"):
        assert all(torch.equal(a, b) for a, b in zip(found, quantize_mxfp4(x), strict=True))
    assert torch.equal(dequantize_mxfp4(*quantize_mxfp4(back)), back)


def test_quantising_what_was_dequantised_is_lossless(rng):
    x = torch.from_numpy(rng.standard_normal((16, 96)).astype(np.float32))
    once = dequantize_mxfp4(*quantize_mxfp4(x))
    assert torch.equal(dequantize_mxfp4(*quantize_mxfp4(once)), once)


def test_fp4_goes_through_fp8_without_loss_when_scales_lie_near(rng):
    """Contracts 6: lossless while the scales of a 128x128 tile differ by at most 2^9."""
    values = torch.from_numpy(rng.integers(0, 256, (128, 64)).astype(np.uint8))
    scales = torch.from_numpy(rng.integers(118, 128, (128, 4)).astype(np.uint8))
    weight = dequantize_mxfp4(values, scales)
    codes, scale = quantize_fp8_e8m0(weight, rows=128, columns=128)
    assert torch.equal(dequantize_fp8(codes, scale, rows=128, columns=128), weight)


def test_edge_16_strided_weights_give_the_same_bits(rng):
    x = torch.from_numpy(rng.standard_normal((4, 66, 34)).astype(np.float32))
    for view in (x.mT, x[:, ::2, 2:], x[1:3]):
        found, copied = quantize_mxfp4(view), quantize_mxfp4(view.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, copied, strict=True))


def test_edge_17_float_scales_raise():
    values = torch.zeros(2, 16, dtype=torch.uint8)
    with pytest.raises(TypeError, match="dequantize_mxfp4: scales is float32; expected uint8"):
        dequantize_mxfp4(values, torch.ones(2, 1))


def test_odd_rows_raise():
    with pytest.raises(ValueError, match="^quantize_mxfp4: K is 5; must be even, two 4-bit"):
        quantize_mxfp4(torch.ones(2, 5))


def test_tiles_change_no_bit(rng, monkeypatch):
    x = torch.from_numpy(rng.standard_normal((3, 40, 70)).astype(np.float32))
    whole = quantize_mxfp4(x)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.02")
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_mxfp4(x), strict=True))
