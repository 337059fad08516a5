"""Deliberately wrong Triton kernels, in the interpreter: the kit must catch each, and pass the one
that is right. Run by test_interpreted.py, in a process where TRITON_INTERPRET is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from triton import jit

from transom.backends.triton._language import narrow
from transom.backends.triton._launch import launch, programs
from transom.conformance import checks, manners
from transom.conformance.cases import build, cases, edges
from transom.registry import forget_plans

sys.path.insert(0, str(Path(__file__).parents[1] / "meta"))
from wrong_kernels import meta_norm  # noqa: E402

assert os.environ.get("TRITON_INTERPRET") == "1"


@jit
def _norm(x, weight, y, T, D, row, column, w_step, eps, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    for t in range(tl.program_id(0), T, tl.num_programs(0)):
        i = tl.arange(0, BLOCK)
        inside = i < D
        at = t
        if WRONG == "previous row":
            at = max(t - 1, 0)
        step = column
        if WRONG == "ignores the stride":
            step = 1
        other = 0.0
        if WRONG == "tail counts":
            other = 1.0
        v = tl.load(x + at * row + i * step, mask=inside, other=other).to(tl.float32)
        total = tl.sum(v * v, 0) / D
        if WRONG == "sums in half":
            total = tl.sum((v * v).to(tl.float16), 0).to(tl.float32) / D
        if WRONG != "ignores eps":
            total += eps
        w = tl.load(weight + i * w_step, mask=inside, other=0.0).to(tl.float32)
        out = v * (1.0 / tl.sqrt(total)) * w
        if WRONG == "cuts bits off":
            if y.dtype.element_ty == tl.bfloat16:
                out = (out.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        mask = inside
        if WRONG == "writes past the end":
            mask = i < D + 1
        tl.store(y + t * D + i, narrow(out, y.dtype.element_ty), mask=mask)
        if WRONG == "writes its input":
            tl.store(x + t * row + i * column, v.to(x.dtype.element_ty), mask=inside & (i == 0))
            tl.store(x + t * row + D * column, 0.0)
        if WRONG == "leaves the last row":
            if t == T - 1:
                tl.store(y + t * D + i, narrow(out * 0.0, y.dtype.element_ty), mask=inside)


def implementation(wrong: str):
    def norm(x, weight, *, eps=0.01):
        (T, D), y = x.shape, torch.empty(x.shape, dtype=x.dtype)
        if y.numel():
            launch(
                _norm,
                programs(x, T),
                x,
                weight,
                y,
                T,
                D,
                *x.stride(),
                weight.stride(0),
                eps,
                WRONG=wrong,
                BLOCK=max(16, 1 << (D - 1).bit_length()),
            )
        return y

    return norm


@pytest.fixture
def norm():
    """Adds a kernel to meta_norm for one test."""
    yield lambda wrong: meta_norm.impl()(implementation(wrong))
    del meta_norm.impls["norm"]
    forget_plans()


def verdict() -> str | None:
    """The first sentence about the numbers of edge cases and drawn calls."""
    found: list[str] = []

    def look(case):
        if not found and (problem := checks.numbers(meta_norm, "norm", case)) is not None:
            found.append(problem)

    for case in edges(meta_norm):
        look(case)
    settings(max_examples=8)(given(case=cases(meta_norm))(look))()
    return found[0] if found else None


def test_the_right_kernel_passes(norm):
    norm("")
    assert verdict() is None
    assert manners.guards(meta_norm, "norm", build(meta_norm, meta_norm.examples[0])) is None


@pytest.mark.parametrize(
    "wrong, seen",
    [
        ("previous row", "expected"),
        ("ignores the stride", "expected"),
        ("tail counts", "expected"),
        ("sums in half", "expected"),
        ("ignores eps", "expected"),
        ("leaves the last row", "expected"),
        ("writes its input", "was written"),
    ],
)
def test_a_wrong_kernel_is_caught(norm, wrong, seen):
    norm(wrong)
    assert seen in str(verdict())


def test_bits_cut_off_are_seen(norm):
    norm("cuts bits off")
    drawn = [build(meta_norm, meta_norm.examples[1], torch.bfloat16, seed) for seed in range(3)]
    assert "units in the last place" in str(checks.unbiased(meta_norm, "norm", drawn))


def test_a_store_past_the_end_is_seen(norm):
    norm("writes past the end")
    assert manners.guards(meta_norm, "norm", build(meta_norm, dict(T=5, D=13))) is not None
