"""The guards around outputs and workspace: what they catch, and that C implementations get them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import transom
from transom.conformance import around, checks
from transom.conformance.cases import build
from transom.registry import forget_plans

sys.path.insert(0, str(Path(__file__).parent))
import wrong_kernels as wrong  # noqa: E402

REASON = transom.backends()["native"]


def result(function):
    """What around.outputs says of an implementation of meta_norm."""
    op = wrong.meta_norm
    op.impl()(function)
    try:
        return around.outputs(op, function.__name__, build(op, op.examples[0]))
    finally:
        del op.impls[function.__name__]
        forget_plans()


def whole(x, weight, *, eps=0.01):
    y = torch.empty(x.shape, dtype=x.dtype)
    return y.copy_(wrong.NORM(x, weight, eps=eps))


def one_behind(x, weight, *, eps=0.01):
    y = torch.empty_like(x).copy_(wrong.NORM(x, weight, eps=eps))
    if y.storage_offset():
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()
    return y


def one_before(x, weight, *, eps=0.01):
    y = torch.empty(x.shape, dtype=x.dtype).copy_(wrong.NORM(x, weight, eps=eps))
    if y.storage_offset():
        y.as_strided((1,), (1,), y.storage_offset() - 1).zero_()
    return y


def a_hole(x, weight, *, eps=0.01):
    y = torch.empty_like(x)
    y[1:] = wrong.NORM(x, weight, eps=eps)[1:]
    return y


def test_an_output_that_is_written_whole_passes():
    assert result(whole) is None


@pytest.mark.parametrize("function", [one_behind, one_before], ids=lambda f: f.__name__)
def test_a_write_beside_an_output_is_caught(function):
    assert result(function) == "memory around an output or the workspace was written"


def test_an_output_with_a_hole_is_caught():
    assert result(a_hole) == "y depends on what its memory or the workspace held before"


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_outputs_of_c_implementations_are_guarded():
    op = transom.grouped_gemm
    (impl,) = checks.implementations(op, "cpu", "native")
    case = build(op, op.examples[0])
    op.invoke(impl.function, *case.values)
    with around.Guarded(0) as guarded:
        op.invoke(impl.function, *case.values)
    assert [dtype for _, dtype in guarded.buffers] == [torch.float32]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_native_implementations_keep_to_their_memory():
    for op, impl in (
        (o, i.name)
        for o in transom.ops().values()
        if o.module.startswith("transom.")
        for i in checks.implementations(o, "cpu", "native")
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for seed in range(3):
                case = build(op, op.examples[0], dtype, seed)
                if not checks.refuses(op, impl, case):
                    assert around.outputs(op, impl, case) is None, case
