"""Every operator, every implementation: requirements, numbers, manners, torch."""

from __future__ import annotations

import torch
from hypothesis import given, settings

import transom
from transom.conformance import checks
from transom.conformance.cases import build, cases, edges


def drawn(op, device):
    """Runs a check over calls drawn from the declaration, as many as the kit's options say."""
    return lambda check: settings.get_profile("transom")(given(case=cases(op, device))(check))


def small(op, **changes):
    """The operator's first example, which is small, as a call."""
    return build(op, {**op.examples[0], **changes})


def test_level_1_requirements(op, impl, device):
    @drawn(op, device)
    def check(case):
        assert checks.requirements(op, impl, case) is None

    check()


def test_level_2_numbers(op, impl, device):
    """Numbers, guard regions and unchanged inputs; at least one drawn call must have run."""
    ran = []

    @drawn(op, device)
    def check(case):
        if checks.refuses(op, impl, case):
            return
        ran.append(case)
        assert checks.numbers(op, impl, case) is None

    check()
    assert ran, f"{impl} refused every drawn call"


def test_level_2_sizes_of_zero_and_one(op, impl, device):
    for case in edges(op, device):
        if not checks.refuses(op, impl, case):
            assert checks.numbers(op, impl, case) is None, case


def test_level_2_rounding_is_unbiased(op, impl, device):
    drawn = [build(op, op.examples[0], torch.bfloat16, seed, device=device) for seed in range(3)]
    assert checks.unbiased(op, impl, [c for c in drawn if not checks.refuses(op, impl, c)]) is None


def test_level_3_repeatable(op, impl, device):
    if not op.impls[impl].deterministic:
        return

    @drawn(op, device)
    def check(case):
        if not checks.refuses(op, impl, case):
            assert checks.repeatable(op, impl, case) is None

    check()


def test_level_4_opcheck(op):
    checks.opcheck(op, small(op))


def test_level_4_compile(op):
    if not op.mutates:
        assert checks.compiles(op, small(op)) is None


def test_level_4_gradients(op, impl, device):
    """Operators without a gradient must say so (integer outputs, backward operators)."""
    if op._gradient is None:
        return
    for seed in range(3):
        case = build(op, op.examples[0], torch.float32, seed, device=device)
        case = _without_quantised(op, case, seed)
        if not checks.refuses(op, impl, case):
            assert checks.gradients(op, impl, case) is None, case


def _without_quantised(op, case, seed):
    while any(isinstance(v, transom.QuantizedWeight) for v in case.values):
        seed += 1000
        case = build(op, op.examples[0], torch.float32, seed)
    return case
