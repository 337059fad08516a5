"""Packed weights of the native kernels: the same bits, the budget, and what is not packed."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

import transom
from transom import config
from transom.abi.plugin import CFunction
from transom.abi.weight_forms import Budget
from transom.bench import measure

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BLOCKS = {
    "fp8": {},
    "fp8 of 32": {"group": 32},
    "fp8 by row": {"group": (1, 128)},
    "fp8 of one scale": {"group": (0, 0)},
    "fp8, e8m0": {"scale_format": "e8m0"},
}
FORMATS = [torch.bfloat16, torch.float16, *BLOCKS]


@pytest.fixture
def native():
    """(operator, bytes for packed forms) -> its native implementation, with a budget of its own."""
    from transom.backends.native import library

    def make(op, limit=1 << 30):
        entry = next(entry for entry in library().entries if entry.op == op)
        return CFunction(transom.ops()[op], entry, library(), Budget(limit))

    return make


def weight(*shape, format, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5
    if isinstance(format, torch.dtype):
        return values.to(format)
    return transom.quantize(values, format.split()[0].strip(","), **BLOCKS.get(format, {}))


def forms(function):
    """Bytes of the packed forms that it keeps."""
    return [seen.form.numel() for seen in function.packed._seen.values() if seen.form is not None]


def bits(y):
    return y.view({4: torch.int32, 2: torch.int16}[y.element_size()])


def third(function, *args, **kwargs):
    """The first call's result, after which the weights are packed, and the third one's."""
    with torch.no_grad():
        first, _, again = (function(*args, **kwargs) for _ in range(3))
    return first, again


def kind(format):
    return format if isinstance(format, torch.dtype) else torch.bfloat16


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("K, N", [(128, 64), (384, 103), (1, 1), (255, 37), (515, 130)])
def test_any_number_of_rows_has_the_same_bits_packed(native, format, K, N):
    w = weight(2, N, K, format=format)
    function = native("grouped_gemm")
    for rows in (*range(1, 15), 40):
        x = torch.randn(rows + 3, K, generator=torch.Generator().manual_seed(rows)).to(kind(format))
        offsets = torch.tensor([rows, rows + 3])
        stored, packed = third(function, x, w, offsets)
        assert torch.equal(stored, packed)
    assert len(forms(function)) == 1 and forms(function)[0] > 0


@pytest.mark.parametrize("format", FORMATS[:3], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("D, width", [(128, 96), (160, 35), (289, 130)])
def test_experts_have_the_same_bits_packed(native, format, interleaved, T, D, width):
    """With halves of gate and up that no panel divides, a panel ends among the numbers of up."""
    g = torch.Generator().manual_seed(1)
    x, ids = torch.randn(T, D, generator=g), torch.randint(-1, 3, (T, 2), generator=g)
    args = (x.to(kind(format)), ids, torch.rand(T, 2, generator=g))
    weights = weight(3, 2 * width, D, format=format), weight(3, D, width, format=format)
    function = native("moe_experts")
    stored, packed = third(function, *args, *weights, interleaved=interleaved)
    assert torch.equal(stored, packed)
    assert len(forms(function)) == 2 and min(forms(function)) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_float32_and_weights_of_any_strides_have_the_same_bits_packed(native, dtype):
    base = weight(3, 70, 2 * 90, format=dtype)
    x, offsets = torch.randn(9, 90), torch.tensor([1, 1, 9])
    function = native("grouped_gemm")
    turned = weight(3, 90, 70, format=dtype).transpose(1, 2)
    for w in (base[:, :, ::2], base[:, :, 7:97], turned):
        stored, packed = third(function, x, w, offsets)
        assert torch.equal(stored, packed)
        assert torch.equal(stored, third(native("grouped_gemm", 0), x, w.clone(), offsets)[0])
    assert len(forms(function)) == 1  # of the one that lives


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.values[1, 3].fill_(0x7F),
        lambda w: w.values[1, 3].fill_(0xFF),
        lambda w: w.scales[1].fill_(1e31),
        lambda w: w.scales[1].fill_(float("nan")),
    ],
    ids=["nan", "minus nan", "large scale", "nan scale"],
)
@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_no_number_has_the_same_bits_packed(native, change, rows):
    w = weight(2, 48, 256, format="fp8")
    change(w)
    x, offsets = torch.randn(2 * rows, 256), torch.tensor([rows, 2 * rows])
    function = native("grouped_gemm")
    stored, packed = third(function, x, w, offsets)
    assert torch.equal(bits(stored), bits(packed))
    assert stored[:rows].isfinite().all()
    assert forms(function)[0] > 0


@pytest.mark.parametrize("format", [torch.bfloat16, "fp8"], ids=str)
def test_a_weight_that_is_written_is_packed_again(native, format):
    w = weight(1, 40, 128, format=format)
    x, offsets = torch.randn(2, 128).bfloat16(), torch.tensor([2])
    function = native("grouped_gemm")
    before, _ = third(function, x, w, offsets)
    with torch.no_grad():
        (w if isinstance(w, torch.Tensor) else w.scales).mul_(2)
    first, again = third(function, x, w, offsets)
    assert torch.equal(first, again)
    assert torch.equal(first, before * 2)
    assert len(forms(function)) == 1


@pytest.mark.parametrize("format", [torch.float32, "int8", "int4", "mxfp4"], ids=str)
def test_other_weights_are_used_as_they_are(native, format):
    function = native("grouped_gemm")
    x, offsets = torch.randn(2, 128).to(kind(format)), torch.tensor([2])
    third(function, x, weight(1, 40, 128, format=format), offsets)
    assert sum(forms(function)) == 0


def test_packed_forms_keep_within_the_budget(native):
    first, second, third_ = (weight(1, 64, 256, format=torch.bfloat16, seed=i) for i in range(3))
    one = first.nbytes + 64
    function = native("grouped_gemm", 2 * one - 1)
    x, offsets = torch.randn(2, 256).bfloat16(), torch.tensor([2])
    for w in (first, second):
        stored, again = third(function, x, w, offsets)
        assert torch.equal(stored, again)
    assert forms(function) == [one, 0]
    del first, w
    gc.collect()
    third(function, x, third_, offsets)
    assert forms(function) == [0, one]


def test_operators_share_the_budget(native):
    from transom.backends.native import library

    entries, budget = {e.op: e for e in library().entries}, Budget(40_000)
    gemm, experts = (
        CFunction(transom.ops()[op], entries[op], library(), budget)
        for op in ("grouped_gemm", "moe_experts")
    )
    w = weight(1, 64, 256, format=torch.bfloat16)
    x = torch.randn(2, 256).bfloat16()
    third(gemm, x, w, torch.tensor([2]))
    down = weight(1, 256, 32, format=torch.bfloat16)
    third(experts, x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), w, down)
    assert [forms(gemm), sorted(forms(experts))] == [[w.nbytes + 64], [0, 0]]


def test_nothing_is_packed_unless_it_is_asked_for(native):
    assert float(config.PACKED.default) == 0
    assert native("grouped_gemm", 0).packed is None


@pytest.mark.parametrize("text", ["-1", "much", "inf", "nan"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("TRANSOM_PACKED_MB", text)
    with pytest.raises(ValueError, match="TRANSOM_PACKED_MB: value is .*; expected MiB >= 0"):
        config.at_most(config.PACKED)


def test_the_setting_is_the_librarys_budget(monkeypatch):
    from transom.backends.native import _budget

    monkeypatch.setenv("TRANSOM_PACKED_MB", "1.5")
    assert _budget.__wrapped__().limit == 3 << 19


def test_the_bench_says_how_much_may_be_packed(native):
    op = transom.ops()["grouped_gemm"]
    impls = {
        "native": SimpleNamespace(function=native(op.name, 3 << 20)),
        "other": SimpleNamespace(function=len),
    }
    stub = SimpleNamespace(impls=impls, parameters=op.parameters)
    notes = [measure._note(stub, name) for name in ("native", "other")]
    assert notes == ["up to 3 MiB of weights packed", ""]


def test_the_bench_draws_weights_that_can_be_packed():
    class Drawn(Exception):
        pass

    def make(draw):
        assert not torch.is_inference_mode_enabled()
        raise Drawn

    with torch.inference_mode(), pytest.raises(Drawn):
        measure.measure(SimpleNamespace(make=make, dtype="float32"), None, None, None)
