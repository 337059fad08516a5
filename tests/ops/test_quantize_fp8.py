"""fp8 E4M3FN: blocks of 128x128, 32x32 and 1x128, float32 and E8M0 scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import transom
from transom.kernels.quant.fp8 import dequantize_fp8, quantize_fp8, quantize_fp8_e8m0
from transom.weights.codes import decode_e8m0

QUANTIZE = {"f32": quantize_fp8, "e8m0": quantize_fp8_e8m0}
CASES = [
    ((2, 40, 70), (32, 32)),
    ((130, 200), (128, 128)),
    ((3, 5, 130), (1, 128)),
    ((2, 1, 3, 7), (2, 3)),
    ((0, 8), (4, 4)),
    ((3, 0), (4, 4)),
    ((5, 6), (9, 9)),
]


@pytest.fixture(params=["f32", "e8m0"])
def scale_format(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape, block", CASES)
def test_edge_13_bits_equal_the_reference(rng, shape, block, dtype, scale_format):
    rows, columns = block
    size = np.exp(rng.normal(0, 2, shape))
    x = torch.from_numpy(rng.standard_normal(shape) * size).to(dtype)
    quantize = QUANTIZE[scale_format]
    with transom.record() as calls:
        found = quantize(x, rows=rows, columns=columns)
        back = dequantize_fp8(*found, rows=rows, columns=columns)
    assert [c.impl for c in calls] == ["composite", "composite"]
    with transom.use("reference"):
        expected = quantize(x, rows=rows, columns=columns)
        expected_back = dequantize_fp8(*found, rows=rows, columns=columns)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(back, expected_back)


def spread(scales: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    scales = decode_e8m0(scales) if scales.dtype == torch.uint8 else scales
    wide = scales.double().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return wide[..., : shape[-2], : shape[-1]]


def test_payload_is_torchs_cast_of_the_quotient(rng, scale_format):
    x = torch.from_numpy(rng.standard_normal((40, 70)).astype(np.float32))
    values, scales = QUANTIZE[scale_format](x, rows=32, columns=32)
    quotient = x / spread(scales, 32, 32, x.shape).float()
    assert torch.equal(values, quotient.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_every_element_is_within_half_a_step(rng, scale_format):
    x = torch.from_numpy(rng.standard_normal((64, 200)) * np.exp(rng.normal(0, 3, (64, 200))))
    values, scales = QUANTIZE[scale_format](x, rows=32, columns=32)
    error = (dequantize_fp8(values, scales, rows=32, columns=32).double() - x).abs()
    step = torch.maximum(x.abs() / 16, spread(scales, 32, 32, x.shape) / 1024)
    assert (error <= step * (1 + 1e-5)).all()


def test_the_largest_magnitude_of_a_block_takes_the_largest_code():
    x = torch.tensor([[448.0, -224.0, 1.0], [0.0, 2.0, -448.0]])
    values, scales = quantize_fp8(x, rows=2, columns=3)
    assert scales.tolist() == [[1.0]]
    assert values.tolist() == [[0x7E, 0xF6, 0x38], [0x00, 0x40, 0xFE]]


@pytest.mark.parametrize("largest, byte", [(448.0, 127), (448.1, 128), (896.0, 128), (1.0, 119)])
def test_an_e8m0_scale_is_rounded_up_and_never_clips(largest, byte):
    values, scales = quantize_fp8_e8m0(torch.tensor([[largest, -largest / 3]]), rows=1, columns=2)
    assert scales.tolist() == [[byte]]
    assert largest / 2.0 ** (byte - 127) <= 448


def test_zero_blocks_have_a_positive_scale_and_zero_values(scale_format):
    values, scales = QUANTIZE[scale_format](torch.zeros(40, 40), rows=32, columns=32)
    assert not values.any()
    assert (spread(scales, 32, 32, values.shape) > 0).all()


def test_the_floor_of_the_largest_magnitude_is_a_ten_thousandth():
    _, scales = quantize_fp8(torch.full((1, 4), 1e-6), rows=1, columns=4)
    assert torch.equal(scales, torch.tensor([[1e-4]]) / torch.tensor(448.0))


def test_a_block_with_nan_or_inf_is_nan_and_harms_no_other(scale_format):
    x = torch.ones(4, 12)
    x[0, 1], x[3, 5] = float("nan"), -float("inf")
    found = QUANTIZE[scale_format](x, rows=2, columns=4)
    nan = torch.isnan(dequantize_fp8(*found, rows=2, columns=4))
    assert nan[:2, :4].all() and nan[2:, 4:8].all() and nan.sum() == 16
    assert not found[0][nan].any()


def test_nan_codes_and_nan_scales_dequantise_to_nan():
    codes = torch.tensor([[0x7F, 0xFF, 0x38, 0x00]], dtype=torch.uint8)
    back = dequantize_fp8(codes, torch.ones(1, 1), rows=1, columns=4)
    assert torch.isnan(back).tolist() == [[True, True, False, False]]
    scale = torch.tensor([[255]], dtype=torch.uint8)
    assert torch.isnan(dequantize_fp8(codes, scale, rows=1, columns=4)).all()


def test_edge_17_uint8_scales_are_exponents_not_integers():
    codes = torch.tensor([[0x38, 0xB8]], dtype=torch.uint8)
    scale = torch.tensor([[130]], dtype=torch.uint8)
    assert dequantize_fp8(codes, scale, rows=1, columns=2).tolist() == [[8.0, -8.0]]
    lowest = torch.tensor([[0]], dtype=torch.uint8)
    assert dequantize_fp8(codes, lowest, rows=1, columns=2).tolist() == [[2.0**-127, -(2.0**-127)]]


def test_edge_17_packed_int32_scales_raise():
    with pytest.raises(TypeError, match="dequantize_fp8: scales is int32; expected float32, uint8"):
        dequantize_fp8(
            torch.zeros(2, 4, dtype=torch.uint8),
            torch.ones(1, 1, dtype=torch.int32),
            rows=2,
            columns=4,
        )


def test_edge_16_strided_weights_give_the_same_bits(rng, scale_format):
    x = torch.from_numpy(rng.standard_normal((4, 66, 33)).astype(np.float32))
    for view in (x.mT, x[:, ::2, 1:], x[1:3]):
        found = QUANTIZE[scale_format](view, rows=8, columns=16)
        copied = QUANTIZE[scale_format](view.contiguous(), rows=8, columns=16)
        assert all(torch.equal(a, b) for a, b in zip(found, copied, strict=True))


def test_bad_blocks_raise(scale_format):
    name = QUANTIZE[scale_format].name
    with pytest.raises(ValueError, match=f"^{name}: block is 0x4; rows and columns must be >= 1$"):
        QUANTIZE[scale_format](torch.ones(2, 4), rows=0, columns=4)


def test_tiles_change_no_bit(rng, monkeypatch, scale_format):
    x = torch.from_numpy(rng.standard_normal((3, 70, 70)).astype(np.float32))
    whole = QUANTIZE[scale_format](x, rows=32, columns=32)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.02")
    tiled = QUANTIZE[scale_format](x, rows=32, columns=32)
    assert all(torch.equal(a, b) for a, b in zip(whole, tiled, strict=True))
