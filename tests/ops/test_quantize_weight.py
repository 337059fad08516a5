"""transom.quantize, and quantised weights inside other operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import transom
from transom import QuantizedWeight, quantize

CASES = {
    "int8": dict(),
    "int8:1x16": dict(group=16),
    "int4": dict(),
    "int4:1x32": dict(group=32),
    "fp8": dict(),
    "fp8:32x32": dict(group=(32, 32), scale_format="e8m0"),
    "fp8:1x128": dict(group=(1, 128)),
    "fp8:16x16": dict(group=16),
    "fp8:0x0": dict(group=(0, 0)),
    "mxfp4": dict(),
}
# Largest |error| over the largest |weight| of normal numbers: half of the coarsest step.
BOUND = {"int8": 0.5 / 127, "int4": 1 / 15, "fp8": 2.0**-4, "mxfp4": 2.0**-2}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(2, 37, 70), (0, 8, 64), (3, 0, 64), (3, 4, 0)])
def test_the_format_the_group_and_the_error(rng, case, shape):
    format = case.partition(":")[0]
    weight = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    q = quantize(weight, format, **CASES[case])
    assert isinstance(q, QuantizedWeight) and q.format == format and q.shape == shape
    assert ":" not in case or q.spec == case
    error = (q.dequantize() - weight).abs()
    assert weight.numel() == 0 or error.max() <= BOUND[format] * weight.abs().max() * 1.001


def test_bytes_are_those_of_the_format():
    weight = torch.ones(128, 256)
    expected = {
        "int8": 128 * 256 + 128 * 4,
        "int4": 128 * 128 + 128 * 2 * 5,
        "fp8": 128 * 256 + 2 * 4,
        "mxfp4": 128 * 128 + 128 * 8,
    }
    assert {f: quantize(weight, f).nbytes for f in expected} == expected


@pytest.mark.parametrize(
    "error, text, call",
    [
        (ValueError, "format is 'nf4'; expected one of int8, int4, fp8, mxfp4", ("nf4", {})),
        (ValueError, "group is 1x64; mxfp4 has one scale for each 1x32", ("mxfp4", {"group": 64})),
        (ValueError, "group is 2x64; int4 has groups of 1xcolumns", ("int4", {"group": (2, 64)})),
        (ValueError, "scale_format is 'e8m0'; int8 has f32", ("int8", {"scale_format": "e8m0"})),
        (ValueError, "scale_format is 'e5'; fp8 has f32 or e8m0", ("fp8", {"scale_format": "e5"})),
    ],
)
def test_bad_arguments_raise_one_line(error, text, call):
    with pytest.raises(error, match=f"^quantize: {text}"):
        quantize(torch.ones(4, 64), call[0], **call[1])


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("group", [0.5, "x", (128,), (1, 2, 3), (1, 0.5), True])
def test_groups_of_another_kind_raise_one_line(format, group):
    with pytest.raises(TypeError) as error:
        quantize(torch.ones(4, 64), format, group=group)
    assert str(error.value) == f"quantize: group is {group!r}; expected an int or (rows, columns)"


@pytest.mark.parametrize("group", [-2, (-2, 4), (4, -9)])
def test_negative_groups_raise_one_line(group):
    with pytest.raises(
        ValueError, match=r"^quantize: group is .*; expected sizes >= 1, or 0 or -1"
    ):
        quantize(torch.ones(4, 64), "fp8", group=group)


@pytest.mark.parametrize("one, other", [(-1, 0), ((-1, 4), (0, 4)), ((4, -1), (4, 0))])
def test_a_group_of_minus_one_is_the_whole_extent(one, other):
    w = torch.arange(256.0).view(4, 64)
    assert quantize(w, "fp8", group=one).spec == quantize(w, "fp8", group=other).spec


def test_bad_weights_raise_one_line():
    with pytest.raises(TypeError, match="^quantize: weight is int8; expected a floating-point"):
        quantize(torch.ones(4, 64, dtype=torch.int8), "int8")
    with pytest.raises(TypeError, match="^quantize: weight is QuantizedWeight; expected a float"):
        quantize(quantize(torch.ones(4, 64), "int8"), "int8")
    with pytest.raises(ValueError, match=r"^quantize: weight has shape \[64\]; expected \[..., N"):
        quantize(torch.ones(64), "int8")


def test_a_parameter_is_quantised_without_its_gradient():
    q = quantize(torch.nn.Parameter(torch.ones(4, 64)), "fp8")
    assert not any(t.requires_grad for t in q.buffers())


@pytest.mark.parametrize("case", CASES)
def test_an_operator_computes_what_it_computes_with_the_dequantised_weight(rng, case):
    weight = torch.from_numpy(rng.standard_normal((3, 24, 64)).astype(np.float32))
    q = quantize(weight, case.partition(":")[0], **CASES[case])
    x = torch.from_numpy(rng.standard_normal((9, 64)).astype(np.float32)).requires_grad_()
    offsets = torch.tensor([4, 4, 9])
    y = transom.grouped_gemm(x, q, offsets)
    expected = transom.grouped_gemm(x, q.dequantize(), offsets)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.ones_like(y)
    mine, theirs = (torch.autograd.grad(out, x, dy)[0] for out in (y, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


class Experts(torch.nn.Module):
    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return transom.grouped_gemm(x, self.weight, offsets)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4"])
def test_fullgraph_compile_takes_a_quantised_weight(rng, format):
    weight = torch.from_numpy(rng.standard_normal((3, 24, 64)).astype(np.float32))
    x = torch.from_numpy(rng.standard_normal((9, 64)).astype(np.float32))
    module, offsets = Experts(quantize(weight, format)), torch.tensor([4, 4, 9])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, offsets), module(x, offsets))


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "fp8_e8m0", "mxfp4"])
def test_opcheck(name):
    import importlib

    module = importlib.import_module(f"transom.kernels.quant.{name.partition('_')[0]}")
    blocks = {"int8": (32,), "int4": (32,), "mxfp4": ()}.get(name, (4, 32))
    quantise = getattr(module, f"quantize_{name}").torch_op
    weight = torch.linspace(-2, 3, 3 * 70).reshape(3, 70)
    torch.library.opcheck(quantise, (weight, *blocks))
    dequantise = getattr(module, f"dequantize_{name.partition('_')[0]}").torch_op
    torch.library.opcheck(dequantise, (*quantise(weight, *blocks), *blocks))
