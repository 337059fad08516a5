"""Ranges ahead of a rule on values: what they let pass, what they leave to the rule, and that they
never let pass what the rule refuses."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from transom import dispatch, ranges
from transom.abi import extension
from transom.conformance.cases import build
from transom.op import Rule
from transom.registry import OPS

needs_extension = pytest.mark.skipif(extension.module() is None, reason=str(extension.why_cffi()))


def checked(operator, values, bounds, check):
    """A call with these arguments and this check of their values behind these bounds."""
    module = extension.module()
    plan = module.Plan(None)
    plan.set_check(bounds, check)
    plan.set_run(lambda *values: None)
    caller = module.Caller(operator, 1, lambda *_: (plan, True), None, lambda v, _: check(*v))
    caller.run(tuple(values), False)


def asks(text, tensors, **bound):
    """Whether a rule satisfied by `text` is asked about these tensors."""
    op = mock.Mock(position={name: i for i, name in enumerate(tensors)})
    op.rule_on_values = Rule.of(ranges.satisfied_by(text)(lambda: None))
    rule = mock.Mock(return_value=None)
    kinds = [(name, extension.module().TENSOR, True) for name in tensors]
    made = extension.module().Operator("toy", [*kinds, ("n", 2, False)], [])
    checked(made, [*tensors.values(), 0], ranges.bounds(op, bound), lambda *v: rule(*v[:-1]))
    if rule.called:
        rule.assert_called_once_with(*tensors.values())
    return rule.called


@needs_extension
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "numbers, asked",
    [
        ([], False),
        ([-1, 7, 3], False),
        ([7] * 100, False),
        ([8], True),
        ([-2], True),
        ([3] * 99 + [8], True),
        ([3] * 50 + [-2] + [3] * 50, True),
    ],
)
def test_each_number_is_held_against_both_bounds(dtype, numbers, asked):
    assert asks("-1 <= ids <= E - 1", {"ids": torch.tensor(numbers, dtype=dtype)}, E=8) is asked


@needs_extension
@pytest.mark.parametrize(
    "ends, asked", [([0, 0, 3, 5], False), ([0, 4, 3, 5], True), ([1, 2, 6], True), ([-1, 2], True)]
)
def test_a_rising_one_never_falls(ends, asked):
    assert asks("0 <= rising ends <= M", {"ends": torch.tensor(ends)}, M=5) is asked


@needs_extension
@pytest.mark.parametrize("types", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
@pytest.mark.parametrize(
    "sizes, starts, asked",
    [
        ([[3, 2], [4, 1]], [0, 3, 5, 9], False),
        ([[3, 2], [4, 2]], [0, 3, 5, 9], True),
        ([[3, 2], [4, 1]], None, False),
        ([[3, 2], [11, 1]], None, True),
        ([[3, 2], [4, 1]], [0, 3, 5], True),
    ],
)
def test_a_sum_is_taken_element_by_element(types, sizes, starts, asked):
    given = {
        "sizes": torch.tensor(sizes, dtype=types[0]),
        "starts": None if starts is None else torch.tensor(starts, dtype=types[1]),
    }
    assert asks("1 <= sizes + starts <= V", given, V=10) is asked


@needs_extension
def test_a_sum_beyond_64_bits_does_not_wrap():
    most = torch.tensor([2**63 - 1])
    assert asks("1 <= sizes + starts <= V", {"sizes": most, "starts": most}, V=10)
    assert asks("-9 <= sizes + starts", {"sizes": most, "starts": most})


@needs_extension
@pytest.mark.parametrize("number", [-(2**63), 2**63 - 1])
def test_the_largest_numbers_pass_where_nothing_bounds_them(number):
    assert not asks(f"{ranges.LEAST} <= ids", {"ids": torch.tensor([number])})
    assert asks("0 <= ids <= 5", {"ids": torch.tensor([number])})


@needs_extension
def test_a_bound_beyond_64_bits_is_one_of_64():
    assert not asks("-2**70 <= ids <= 2**70", {"ids": torch.tensor([2**63 - 1, -(2**63)])})


@needs_extension
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6)[::2],
        torch.arange(6).view(2, 3).t(),
        torch.zeros(3),
        torch.zeros(10_000, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int16),
        torch.zeros(3, dtype=torch.int64, device="meta"),
    ],
    ids=["stepped", "transposed", "float", "many", "int16", "meta"],
)
def test_what_cannot_be_read_is_left_to_the_rule(tensor):
    assert asks("0 <= ids <= 9", {"ids": tensor})


@needs_extension
def test_one_that_is_not_given_is_in_every_range():
    assert not asks("0 <= ids <= 9", {"ids": None, "other": torch.zeros(1)})


@pytest.mark.parametrize("text", ["ids", "ids <= 9", "0 < ids", "0 <= a + b + c", "0 <= ids <="])
def test_another_text_is_refused_at_the_declaration(text):
    with pytest.raises(ValueError, match="expected low <="):
        ranges.satisfied_by(text)


def ranges_of(op):
    return ranges.ranges_of(op.rule_on_values.function) if op.rule_on_values else ()


RANGED = [op for op in OPS.values() if ranges_of(op)]


def case_of(op, seed=0):
    """Arguments that the operator accepts, their facts, and what bounds are expressions over."""
    values = build(op, op.examples[0], seed=seed).values
    facts = dispatch.facts_of(op, values)
    return values, facts, {**facts.arguments, **facts.dims}


def check(op, values, facts):
    """Whether the rule was asked of the values of a call."""
    seen = mock.Mock(side_effect=dispatch.value_check(op, facts))
    bounds = ranges.bounds(op, {**facts.arguments, **facts.dims})
    if extension.module() is None:
        seen(*values)
    else:
        checked(extension.operator(op), values, bounds, seen)
    return seen.called


def at_a_bound(op, values, bound, rng):
    """The same arguments with a number at, or next to, a bound of each range or of some."""
    given = list(values)
    for r in ranges_of(op):
        name = r.tensors[rng.integers(len(r.tensors))]
        tensor = given[op.position[name]]
        if tensor is None or rng.random() < 0.5:
            continue
        at = int(rng.integers(tensor.numel()))
        edge = int((r.low, r.high)[rng.integers(2)](bound)) + int(rng.integers(-1, 2))
        edge -= sum(
            int(given[op.position[other]].flatten()[at]) for other in r.tensors if other != name
        )
        limits = torch.iinfo(tensor.dtype)
        given[op.position[name]] = tensor = tensor.clone()
        tensor.view(-1)[at] = min(max(edge, limits.min), limits.max)
    return given


def test_the_operators_that_are_called_often_have_ranges():
    assert {op.name for op in RANGED} >= {
        "grouped_gemm",
        "hashed_embedding",
        "hashed_embedding_out",
        "hashed_embedding_pooled",
        "moe_experts",
        "ngram_hash",
        "route",
    }


@pytest.mark.parametrize("op", RANGED, ids=lambda op: op.name)
def test_a_call_is_refused_as_the_rule_alone_refuses_it(op, rng):
    outcomes = set()
    for seed in range(200):
        values, facts, bound = case_of(op, seed % 5)
        values = at_a_bound(op, values, bound, rng)
        scope = {**bound, **dict(zip(op.position, values, strict=True))}
        text = op.rule_on_values.function(*(scope[n] for n in op.rule_on_values.asks))
        outcomes.add(text is None)
        try:
            check(op, values, facts)
        except ValueError as error:
            assert str(error) == f"{op.name}: {text}"
        else:
            assert text is None
    assert outcomes == {True, False}


@needs_extension
@pytest.mark.parametrize("op", RANGED, ids=lambda op: op.name)
def test_the_rule_is_not_asked_about_a_call_within(op):
    values, facts, _ = case_of(op)
    assert not check(op, values, facts)


@needs_extension
def test_the_rows_of_a_shard_are_not_those_of_the_whole_table():
    op = OPS["hashed_embedding"]
    values = list(case_of(op)[0])
    rows = values[op.position["table"]].shape[0]
    values[op.position["shard"]] = (3, rows)
    values[op.position["offsets"]] = values[op.position["offsets"]] + rows
    assert not check(op, values, dispatch.facts_of(op, values))


def test_a_table_of_many_columns_cannot_wrap_past_its_rows():
    op = OPS["hashed_embedding"]
    columns = 80
    moduli = torch.full((2, columns // 2), 2**62)
    offsets = torch.full((columns,), 2**62)
    text = op.rule_on_values.function(moduli, offsets, 100, ())
    assert text == f"offsets + moduli give rows up to {2**63 - 1}; table has 100 rows"
