"""int8: symmetric, one scale a row or a group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import transom
from transom.kernels.quant.int8 import dequantize_int8, quantize_int8

SHAPES = [((3, 5, 70), 32), ((4, 64), 64), ((2, 1, 3, 7), 3), ((0, 8), 4), ((3, 0), 1), ((2, 5), 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape, group", SHAPES)
def test_edge_13_bits_equal_the_reference(rng, shape, group, dtype):
    x = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    with transom.record() as calls:
        values, scales = quantize_int8(x, group=group)
        back = dequantize_int8(values, scales, group=group)
    assert [c.impl for c in calls] == ["composite", "composite"]
    with transom.use("reference"):
        expected_values, expected_scales = quantize_int8(x, group=group)
        expected_back = dequantize_int8(values, scales, group=group)
    assert torch.equal(values, expected_values) and torch.equal(scales, expected_scales)
    assert torch.equal(back, expected_back)


def test_every_element_is_within_half_a_scale(rng):
    x = torch.from_numpy(rng.standard_normal((16, 200)) * np.exp(rng.normal(0, 3, (16, 1))))
    values, scales = quantize_int8(x, group=64)
    error = (dequantize_int8(values, scales, group=64).double() - x).abs()
    spread = scales.double().repeat_interleave(64, -1)[:, :200]
    assert (error <= 0.5 * spread * (1 + 1e-5)).all()
    assert values.min() >= -127


def test_a_scale_is_the_largest_magnitude_over_127():
    x = torch.tensor([[-254.0, 1.0, 0.0, 3.0], [0.5, -0.25, 0.125, 0.0]])
    values, scales = quantize_int8(x, group=4)
    assert torch.equal(scales, torch.tensor([[2.0], [0.5 / 127]]))
    # 0.5 and 1.5 go to the even neighbour
    assert values[0].tolist() == [-127, 0, 0, 2]


def test_zero_rows_have_a_positive_scale_and_zero_values():
    values, scales = quantize_int8(torch.zeros(3, 8), group=8)
    assert not values.any()
    assert torch.equal(scales, torch.full((3, 1), 1e-10) / torch.tensor(127.0))


def test_a_group_with_nan_or_inf_is_nan_and_harms_no_other():
    x = torch.ones(2, 12)
    x[0, 1], x[1, 5] = float("nan"), -float("inf")
    values, scales = quantize_int8(x, group=4)
    back = dequantize_int8(values, scales, group=4)
    nan = torch.isnan(back)
    assert nan[0, :4].all() and nan[1, 4:8].all() and nan.sum() == 8
    assert torch.equal(back[~nan], torch.ones(16))


def test_numbers_at_the_ends_of_float32():
    x = torch.tensor([[3.4e38, -3.4e38, 1e30, 0.0], [1e-40, -1e-38, 0.0, 0.0]])
    values, scales = quantize_int8(x, group=4)
    assert values.tolist() == [[127, -127, 0, 0], [0, 0, 0, 0]]
    assert torch.isfinite(dequantize_int8(values, scales, group=4)).all()


def test_edge_16_strided_weights_give_the_same_bits(rng):
    x = torch.from_numpy(rng.standard_normal((4, 66, 33)).astype(np.float32))
    for view in (x.mT, x[:, ::2, 1:], x[1:3]):
        for mine, copied in zip(
            quantize_int8(view, group=16), quantize_int8(view.contiguous(), group=16), strict=True
        ):
            assert torch.equal(mine, copied) and mine.is_contiguous()


def test_bad_groups_raise():
    with pytest.raises(ValueError, match="^quantize_int8: group is 0; must be >= 1$"):
        quantize_int8(torch.ones(2, 4), group=0)
    with pytest.raises(ValueError, match="dequantize_int8: "):
        dequantize_int8(torch.ones(2, 4).to(torch.int8), torch.ones(2, 3), group=2)
    with pytest.raises(TypeError, match="quantize_int8: weight is int32"):
        quantize_int8(torch.ones(2, 4, dtype=torch.int32), group=2)


def test_tiles_change_no_bit(rng, monkeypatch):
    x = torch.from_numpy(rng.standard_normal((3, 40, 70)).astype(np.float32))
    whole = quantize_int8(x, group=32)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.02")
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_int8(x, group=32), strict=True))
