"""How calls enter: past torch's dispatcher to their plan, through transom._C and without."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import transom
from transom import dispatch
from transom.abi import extension
from transom.registry import forget_plans


@pytest.fixture(params=["transom._C", "Python"])
def caller(request, norm, monkeypatch):
    """How calls of `norm` enter, by each way; what torch must see answers NotImplemented."""
    if request.param == "Python":
        monkeypatch.setattr(extension, "_found", lambda: (None, "the test asked for Python"))
    elif extension.module() is None:
        pytest.skip(str(extension.why_cffi()))
    monkeypatch.setattr(norm.engine, "_through_torch", lambda *values: NotImplemented)
    forget_plans()
    return norm.engine


@pytest.fixture
def entrance(caller):
    return lambda *values: caller.enter(*values)


def inputs():
    return torch.randn(3, 8), torch.rand(8)


def test_it_gives_what_the_torch_operator_gives(entrance, norm):
    x, w = inputs()
    for got, want in zip(entrance(x, w, None, 1e-6), norm.torch_op(x, w, None, 1e-6), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.requires_grad_(),
        lambda x: x.to("meta"),
        lambda x: x.as_subclass(type("Other", (torch.Tensor,), {})),
        lambda x: None,
        lambda x: "text",
    ],
    ids=["gradient", "meta", "subclass", "nothing", "text"],
)
def test_it_leaves_what_is_no_plain_inference(entrance, change):
    x, w = inputs()
    assert entrance(change(x), w, None, 1e-6) is NotImplemented


def test_a_gradient_is_none_without_grad_mode(entrance):
    x, w = inputs()
    with torch.no_grad():
        assert entrance(x.requires_grad_(), w, None, 1e-6) is not NotImplemented


def test_it_leaves_modes_transforms_and_autocast(entrance):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    x, w = inputs()
    call = partial(entrance, x, w, None, 1e-6)
    for mode in (TorchFunctionMode(), TorchDispatchMode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert call() is NotImplemented
    seen = []
    torch.vmap(lambda row: seen.append(call()) or row)(x)
    torch.jit.trace(lambda row: seen.append(call()) or row + 1, x, check_trace=False)
    assert seen and all(answer is NotImplemented for answer in seen)
    assert call() is not NotImplemented


def test_use_and_record_hold_from_the_next_call_on(entrance, caller):
    x, w = inputs()
    call = partial(entrance, x, w, None, 1e-6)
    call()
    with transom.use("reference"), transom.record() as calls:
        call()
    with transom.record() as after:
        call()
    assert [c.impl for c in (*calls, *after)] == ["reference", "composite"]
    with transom.use("reference"):
        call()
        kept = [plan.impl.name for plan in caller.plans()]
    assert "reference" in kept


def test_new_implementations_take_over(entrance, norm):
    x, w = inputs()
    call = partial(entrance, x, w, None, 1e-6)
    call()

    @norm.impl(tier="tuned")
    def seven(x, weight, bias=None, *, eps=1e-6):
        return torch.full_like(x, 7.0), x.new_ones(x.shape[:-1])

    assert call()[0].eq(7.0).all()


@pytest.mark.parametrize("other", [1e-5, 1, float("nan"), float("inf")])
def test_values_have_plans_of_their_own(entrance, norm, other):
    x, w = inputs()
    for eps in (1e-6, other):
        got = entrance(x, w, None, eps)
        want = norm.impls["composite"].function(x, w, eps=eps)
        assert torch.equal(got[0].nan_to_num(), want[0].nan_to_num())


def test_a_flag_is_no_number(norm):
    x, w = inputs()
    with pytest.raises(TypeError, match="eps is True"):
        norm(x, w, eps=True)


def test_layouts_and_dtypes_have_plans_of_their_own(entrance, caller):
    x, w = inputs()
    wide = torch.randn(3, 16)[:, ::2]
    for each in (x, wide, x.bfloat16(), x[:2], x.unsqueeze(0)):
        entrance(each, w.to(each.dtype), None, 1e-6)
    assert len(caller.plans()) == 5
    assert {plan.facts.layouts["x"] for plan in caller.plans()} == {"contiguous", "strided"}


def test_determinism_is_part_of_a_plan(entrance, caller):
    x, w = inputs()
    try:
        for wanted in (False, True):
            torch.use_deterministic_algorithms(wanted)
            entrance(x, w, None, 1e-6)
    finally:
        torch.use_deterministic_algorithms(False)
    assert {plan.facts.deterministic for plan in caller.plans()} == {False, True}


def test_plans_stay_bounded(entrance, caller):
    x, w = inputs()
    for n in range(dispatch.PLANS + 10):
        entrance(x, w, None, float(n))
    assert 0 < len(caller.plans()) <= dispatch.PLANS


def test_a_quantised_weight_is_read_by_its_parts():
    weight = transom.quantize(torch.randn(2, 8, 64), "int8")
    x, offsets = torch.randn(4, 64), torch.tensor([1, 4])
    with transom.use("composite"):
        transom.grouped_gemm(x, weight, offsets)  # implementations are found
        forget_plans()
        got = transom.grouped_gemm(x, weight, offsets)
        want = transom.grouped_gemm(x, weight.dequantize(), offsets)
    torch.testing.assert_close(got, want)
    assert sorted(str(p.facts.dtypes["weight"]) for p in transom.grouped_gemm.engine.plans()) == [
        "int8",
        "torch.float32",
    ]


def test_a_wrong_value_is_refused_at_every_call():
    x, weight = torch.randn(4, 8), torch.randn(2, 8, 8)
    for _ in range(2):
        transom.grouped_gemm(x, weight, torch.tensor([1, 4]))
        with pytest.raises(ValueError, match="offsets"):
            transom.grouped_gemm(x, weight, torch.tensor([4, 1]))
