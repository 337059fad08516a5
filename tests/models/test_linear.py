"""Linear layers of 16-bit weights: replaced where torch is slow, equal, undone by unpatch."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import prompt
from torch import nn

import transom
from transom.conformance.models import tiny
from transom.models import linear

pytestmark = pytest.mark.skipif(
    transom.backends()["native"] is not None, reason=str(transom.backends()["native"])
)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU counts as one where torch is slow."""
    monkeypatch.setattr(linear, "slow_here", lambda: True)


def layer(dtype: torch.dtype, inside: int = 40, outside: int = 24) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inside, outside, bias=False, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (0, 40), (5, 0, 40)], ids=str)
def test_a_layer_gives_the_product_rounded_once(dtype, shape) -> None:
    module = layer(dtype)
    x = torch.randn(shape).to(dtype)
    assert len(transom.patch(module)) == 1
    expected = x.double() @ module.weight.double().T
    got = module(x)
    assert got.dtype == dtype and got.shape == expected.shape
    limit = 1e-6 + torch.finfo(dtype).eps * expected.abs()
    assert ((got - expected).abs() <= limit).all()


def test_strided_inputs_and_gradients() -> None:
    module = layer(torch.bfloat16)
    plain = copy.deepcopy(module)
    transom.patch(module)
    x = torch.randn(3, 40, 7).bfloat16().transpose(1, 2).requires_grad_()
    y = x.detach().clone().requires_grad_()
    with transom.record() as calls:
        module(x).sum().backward()
    assert calls[0].op == "grouped_gemm"
    plain(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(module.weight.grad, plain.weight.grad)


def test_a_model_of_16_bits_agrees_and_is_given_back() -> None:
    plain = tiny.tiny_model("deepseek_v4").bfloat16()
    patched = copy.deepcopy(plain)
    report = transom.patch(patched)
    products = {r.path.split(".")[-1] for r in report if r.operators == "grouped_gemm"}
    assert {"q_a_proj", "o_a_proj", "o_b_proj", "gate_proj", "lm_head"} <= products
    assert not report.left_alone and len(transom.patch(patched)) == len(report)
    tokens = prompt(2, 33)
    with torch.no_grad():
        truth = copy.deepcopy(plain).float()(tokens).logits
        errors = [float((m(tokens).logits - truth).abs().median()) for m in (plain, patched)]
    assert errors[1] <= 1.5 * errors[0]
    transom.unpatch(patched)
    kinds = [[type(m) for m in model.modules()] for model in (plain, patched)]
    assert kinds[0] == kinds[1]


def test_layers_that_torch_is_not_slow_at_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    biased = nn.Linear(4, 4, dtype=torch.bfloat16)
    assert len(transom.patch(biased)) == 0 and len(transom.patch(layer(torch.float32))) == 0
    monkeypatch.setattr(linear, "slow_here", lambda: False)
    assert len(transom.patch(layer(torch.bfloat16))) == 0


def test_a_replaced_layer_follows_its_dtype() -> None:
    module = layer(torch.bfloat16)
    transom.patch(module)
    x = torch.randn(2, 40)
    wide = module.float()
    with transom.record() as calls:
        assert torch.equal(wide(x), x @ wide.weight.T)
    assert not calls
