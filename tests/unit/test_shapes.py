"""The shape and dtype texts of declarations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transom.dtypes import Rules
from transom.shapes import Expression, Signature


def bind(text, *, arguments=None, **shapes):
    return Signature.parse(text).bind("op", shapes, arguments or {})


def test_symbols_bind_where_they_are_first_seen():
    assert bind("x[*B, D], w[D]", x=(2, 3, 4), w=(4,)) == {"B": (2, 3), "D": 4}


def test_leading_dims_may_stand_in_the_middle():
    assert bind("x[A, *B, D]", x=(1, 2, 3, 4)) == {"A": 1, "B": (2, 3), "D": 4}


def test_expressions_are_checked_whatever_the_order():
    text = "fn[(2+R)*R,R*D], x[T,R,D]"
    assert bind(text, fn=(24, 32), x=(5, 4, 8))["R"] == 4
    with pytest.raises(
        ValueError,
        match=r"op: fn has 23 where \[\(2\+R\)\*R, R\*D\] is declared; expected \(2\+R\)\*R = 24",
    ):
        bind(text, fn=(23, 32), x=(5, 4, 8))


def test_arguments_are_symbols():
    signature = Signature.parse("x[T,E] -> ids[T,k]")
    bound = signature.bind("op", {"x": (3, 8)}, {"k": 2})
    assert signature.outputs["ids"].sizes(bound) == (3, 2)
    with pytest.raises(ValueError, match="op: x has k = 3; the argument has k = 2"):
        bind("x[k]", x=(3,), arguments={"k": 2})


def test_absent_tensors_bind_nothing():
    assert bind("x[T], bias?[E]", x=(3,)) == {"T": 3}


@pytest.mark.parametrize("bad", ["__import__('os')", "x[0]", "lambda: 1", "[1]"])
def test_expressions_are_arithmetic_only(bad):
    with pytest.raises((ValueError, SyntaxError)):
        Expression(bad)({})


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(0, 9))
def test_output_shapes_follow_the_binding(batch, d):
    signature = Signature.parse("x[*B, D] -> y[*B, 2*D], n[*B]")
    bound = signature.bind("op", {"x": (*batch, d)}, {})
    assert signature.outputs["y"].sizes(bound) == (*batch, 2 * d)
    assert signature.outputs["n"].sizes(bound) == tuple(batch)


def test_dtype_rules():
    rules = Rules.parse("x: float; w: x | f32 | quant; i, j: index; y: acc(x)")
    seen = {"x": torch.bfloat16, "w": torch.float32, "i": torch.int32}
    rules.check("op", seen)
    rules.check("op", {**seen, "w": "mxfp4"})
    assert rules.output("y", seen) == torch.float32
    assert rules.output("y", {"x": torch.float64}) == torch.float64
    with pytest.raises(
        TypeError, match="op: w is float16; expected bfloat16, float32 or a QuantizedWeight"
    ):
        rules.check("op", {**seen, "w": torch.float16})
    with pytest.raises(TypeError, match="op: i is float32; expected int32, int64"):
        rules.check("op", {**seen, "i": torch.float32})
