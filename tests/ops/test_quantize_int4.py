"""int4: asymmetric, a scale and a zero point for each group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import transom
from transom.kernels.quant.int4 import dequantize_int4, quantize_int4

SHAPES = [((3, 5, 70), 32), ((4, 64), 64), ((2, 1, 3, 6), 4), ((0, 8), 4), ((3, 0), 1), ((2, 6), 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape, group", SHAPES)
def test_edge_13_bits_equal_the_reference(rng, shape, group, dtype):
    x = torch.from_numpy(rng.standard_normal(shape) + rng.normal(0, 2, shape[:-1] + (1,))).to(dtype)
    with transom.record() as calls:
        found = quantize_int4(x, group=group)
        back = dequantize_int4(*found, group=group)
    assert [c.impl for c in calls] == ["composite", "composite"]
    with transom.use("reference"):
        expected = quantize_int4(x, group=group)
        expected_back = dequantize_int4(*found, group=group)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(back, expected_back)


@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0])
def test_every_element_is_within_half_a_scale_and_zero_is_exact(rng, offset):
    x = torch.from_numpy(rng.standard_normal((32, 192)) + offset)
    x[:, ::17] = 0
    found = quantize_int4(x, group=64)
    back = dequantize_int4(*found, group=64).double()
    spread = found[1].double().repeat_interleave(64, -1)
    assert ((back - x).abs() <= 0.5 * spread * (1 + 1e-5)).all()
    assert not back[:, ::17].any()


def test_the_even_element_is_the_low_nibble():
    x = torch.tensor([[0.0, 15.0, 1.0, 2.0]])
    values, scales, zeros = quantize_int4(x, group=4)
    assert values.tolist() == [[0xF0, 0x21]]
    assert scales.tolist() == [[1.0]] and zeros.tolist() == [[0]]


def test_a_negative_group_has_its_zero_point_at_the_top():
    x = torch.tensor([[-15.0, -1.0, -14.0, -3.0]])
    values, scales, zeros = quantize_int4(x, group=4)
    assert zeros.tolist() == [[15]]
    assert torch.equal(dequantize_int4(values, scales, zeros, group=4), x)


def test_zero_groups_have_a_positive_scale_and_give_zero():
    found = quantize_int4(torch.zeros(3, 8), group=4)
    assert (found[1] > 0).all() and not found[0].any() and not found[2].any()
    assert not dequantize_int4(*found, group=4).any()


def test_a_group_with_nan_or_inf_is_nan_and_harms_no_other():
    x = torch.ones(3, 12)
    x[0, 1], x[1, 5], x[2, 8], x[2, 9] = torch.tensor([np.nan, -np.inf, np.inf, -np.inf])
    found = quantize_int4(x, group=4)
    nan = torch.isnan(dequantize_int4(*found, group=4))
    assert nan[0, :4].all() and nan[1, 4:8].all() and nan[2, 8:].all() and nan.sum() == 12
    assert torch.equal(torch.isnan(found[1]).repeat_interleave(4, -1), nan)


def test_a_range_wider_than_float32_does_not_overflow():
    x = torch.tensor([[2.5e38, -2.5e38, 0.0, 1e38]])
    found = quantize_int4(x, group=4)
    back = dequantize_int4(*found, group=4)
    assert torch.isfinite(found[1]).all() and back[0, 2] == 0
    # In units of the scale: the range itself exceeds float32.
    error = back.double() / found[1].double() - x.double() / found[1].double()
    assert (error.abs() <= 0.5 + 1e-5).all()


def test_zero_points_of_sixteen_are_legal():
    values = torch.tensor([[0xF0]], dtype=torch.uint8)
    zeros = torch.tensor([[16]], dtype=torch.uint8)
    assert dequantize_int4(values, torch.ones(1, 1), zeros, group=2).tolist() == [[-16.0, -1.0]]


def test_edge_16_strided_weights_give_the_same_bits(rng):
    x = torch.from_numpy(rng.standard_normal((4, 66, 34)).astype(np.float32))
    for view in (x.mT, x[:, ::2, 2:], x[1:3]):
        found, copied = quantize_int4(view, group=16), quantize_int4(view.contiguous(), group=16)
        assert all(torch.equal(a, b) for a, b in zip(found, copied, strict=True))


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="^quantize_int4: group is 0; must be >= 1$"):
        quantize_int4(torch.ones(2, 4), group=0)
    with pytest.raises(ValueError, match="^quantize_int4: K is 5; must be even, two 4-bit"):
        quantize_int4(torch.ones(2, 5), group=4)


def test_tiles_change_no_bit(rng, monkeypatch):
    x = torch.from_numpy(rng.standard_normal((3, 40, 70)).astype(np.float32))
    whole = quantize_int4(x, group=32)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.02")
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize_int4(x, group=32), strict=True))
