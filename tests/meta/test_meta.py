"""Tests of the checks: every deliberately wrong kernel must be caught, and by what should catch it;
a right one passes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given

import transom
from transom.conformance import checks, levels, manners
from transom.conformance.cases import build, cases, edges
from transom.registry import forget_plans
from transom.requires import at_most

sys.path.insert(0, str(Path(__file__).parent))
import wrong_kernels as wrong  # noqa: E402


@pytest.fixture
def register():
    """Adds an implementation to an operator for one test."""
    added = []

    def add(op, function, **options):
        op.impl(**options)(function)
        added.append((op, function.__name__))
        return function.__name__

    yield add
    for op, name in added:
        del op.impls[name]
    forget_plans()


def verdict(check, op, name, **options):
    """The first sentence (or error) that a check gives over the drawn calls, or None."""
    found = []

    def look(case):
        if found:
            return
        try:
            problem = check(op, name, case)
        except Exception as error:  # noqa: BLE001 - a crash of the kernel is a finding
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            found.append(problem)

    for case in edges(op):
        look(case)
    given(case=cases(op, **options))(look)()
    return found[0] if found else None


NUMBERS = {
    wrong.off_by_one_row: "expected",
    wrong.ignores_eps: "expected",
    wrong.ignores_strides: "expected",
    wrong.ignores_storage_offset: "expected",
    wrong.accumulates_in_half: "expected",
    wrong.writes_past_the_end: "memory around it was written",
    wrong.scribbles_on_its_input: "x or the memory around it was written",
    wrong.returns_its_input: "x or the memory around it was written",
    wrong.returns_another_dtype: "expected torch.",
    wrong.returns_a_strided_tensor: "is not contiguous",
    wrong.loses_the_last_column: "expected",
    wrong.fails_on_one_row: "",
    wrong.crashes_on_what_it_accepts: "a device error",
}


@pytest.mark.parametrize("function", NUMBERS, ids=lambda f: f.__name__)
def test_wrong_numbers_are_caught(function, register):
    problem = verdict(checks.numbers, wrong.meta_norm, register(wrong.meta_norm, function))
    assert problem is not None and NUMBERS[function] in problem


@pytest.mark.parametrize(
    "function",
    [
        wrong.multiplies_sentinels_by_zero,
        wrong.counts_sentinels_as_row_zero,
        wrong.takes_the_last_of_ties,
        wrong.sums_in_another_dtype,
    ],
    ids=lambda f: f.__name__,
)
def test_wrong_selections_are_caught(function, register):
    assert (
        verdict(checks.numbers, wrong.meta_gather, register(wrong.meta_gather, function))
        is not None
    )


def test_truncation_is_caught_by_the_bias_and_not_by_the_tolerance(register):
    name = register(wrong.meta_norm, wrong.truncates)
    drawn = [
        build(wrong.meta_norm, wrong.meta_norm.examples[1], torch.bfloat16, s) for s in range(3)
    ]
    assert "units in the last place" in checks.unbiased(wrong.meta_norm, name, drawn)
    assert checks.unbiased(wrong.meta_norm, "composite", drawn) is None


def test_varying_bits_are_caught(register):
    name = register(wrong.meta_norm, wrong.is_not_repeatable)
    assert "differs between two equal calls" in verdict(checks.repeatable, wrong.meta_norm, name)


def test_a_race_between_threads_is_caught(register):
    name = register(wrong.meta_norm, wrong.works_in_one_buffer_for_all)
    case = build(wrong.meta_norm, wrong.meta_norm.examples[0])
    assert "differs when several threads call" in manners.threads(wrong.meta_norm, name, case)
    assert manners.threads(wrong.meta_norm, "composite", case) is None


def test_memory_that_is_kept_is_caught(register):
    name = register(wrong.meta_norm, wrong.keeps_every_result)
    case = build(wrong.meta_norm, wrong.meta_norm.examples[0])
    assert "the process grows by" in manners.memory(wrong.meta_norm, name, case)
    assert manners.memory(wrong.meta_norm, "composite", case) is None


def test_a_limit_that_does_not_hold_is_caught(register):
    function = wrong.refuses_one_row_less_than_it_states
    name = register(wrong.meta_norm, function, requires=[at_most("D", 9)])
    limits = next(c for c in levels.CHECKS if c.name == "limits")
    found = limits.ask(levels.Subject(wrong.meta_norm, name, "cpu"))
    assert found.status == "fail" and "no such tile" in found.text


def test_a_wrong_gradient_is_caught(register):
    register(wrong.meta_norm_backward, wrong.gradient_without_the_mean)
    case = build(wrong.meta_norm, wrong.meta_norm.examples[0])
    assert "the gradient of x along a random direction" in checks.gradients(
        wrong.meta_norm, None, case
    )


def test_a_missing_gradient_is_caught():
    op, right = wrong.meta_norm, wrong.meta_norm.differentiated
    case = build(op, op.examples[0])
    try:
        op.gradient(save="x weight")(lambda saved, dy: {"x": right.function(saved, dy)["x"]})
        assert "weight has no gradient" in checks.gradients(op, None, case)
    finally:
        op.differentiated = right


def test_a_refusal_without_a_sentence_is_caught(register):
    def silent(x, weight, *, eps=0.01):
        return wrong.NORM(x, weight, eps=eps)

    name = register(wrong.meta_norm, silent, requires=[wrong.SILENT])
    assert "a reason is empty" in verdict(checks.requirements, wrong.meta_norm, name)


def test_a_proper_refusal_is_accepted(register):
    def limited(x, weight, *, eps=0.01):
        return wrong.NORM(x, weight, eps=eps)

    name = register(wrong.meta_norm, limited, requires=[wrong.LIMIT])
    assert verdict(checks.requirements, wrong.meta_norm, name) is None


def test_another_implementation_running_is_caught(register, monkeypatch):
    def asked(x, weight, *, eps=0.01):
        return wrong.NORM(x, weight, eps=eps)

    name = register(wrong.meta_norm, asked)
    case = build(wrong.meta_norm, wrong.meta_norm.examples[0])
    monkeypatch.setattr(transom.selection, "_asked_for", lambda op: "composite")
    assert checks.numbers(wrong.meta_norm, name, case) == f"{name} was asked for; ['composite'] ran"


@pytest.mark.parametrize(
    "op", [wrong.meta_norm, wrong.meta_gather, wrong.meta_norm_backward], ids=lambda o: o.name
)
def test_the_right_kernel_passes_every_check(op):
    for check in (checks.requirements, checks.numbers, checks.repeatable):
        assert verdict(check, op, "composite") is None
    if op.differentiated:
        assert checks.gradients(op, "composite", build(op, op.examples[0])) is None
