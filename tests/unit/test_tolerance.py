"""Do two results agree? One model of tolerance, and one place where it stands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import transom
from transom import tolerance
from transom.tolerance import agree, compare, distance, shared

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "got, want, wrong",
    [
        ([1.0, 1.0], [1.0, 1.0 + 1e-6], None),
        ([1.0, 1.0], [1.0, 1.01], "y[1] is 1.0; expected 1.0"),
        ([1.0, 1.0, 1.0], [1.0, 1.0], "y has shape [3]; expected [2]"),
        ([1.0, NAN], [1.0, 1.0], "y[1] is nan; expected 1.0 +- "),
        ([1.0, 1.0], [1.0, NAN], "y[1] is 1.0; expected nan +- 0.001 (1 of 2 differ)"),
        ([NAN], [NAN], None),
        ([INF], [INF], None),
        ([INF], [-INF], "y[0] is inf; expected -inf"),
        ([0.5], [0.0], "y[0] is 0.5; expected 0.0 +- "),
        ([], [], None),
    ],
)
def test_what_counts_as_a_difference(got, want, wrong):
    found = compare("y", torch.tensor(got), torch.tensor(want), exact=False)
    assert (found is None) if wrong is None else found.startswith(wrong)


def test_integers_must_be_equal():
    a = torch.tensor([[1, 2, 3]])
    assert compare("ids", a, a.clone()) is None
    assert compare("ids", a, a + 1) == "ids[0, 0] is 1; expected 2 (3 differ)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_rounding_is_allowed_and_three_are_not(dtype):
    want = torch.linspace(1.0, 2.0, 50, dtype=torch.float64)
    unit = tolerance.UNIT_ROUNDOFF[dtype]
    far = (want * (1 + (3 * unit if unit > 1e-6 else 1e-4))).to(dtype)
    assert compare("y", want.to(dtype), want, spread=0.0, terms=1) is None
    assert compare("y", far, want, spread=0.0, terms=1) is not None


def test_the_condition_widens_what_is_allowed():
    want = torch.ones(3, dtype=torch.float64)
    off = torch.full((3,), 1 + 1e-4)
    assert compare("y", off, want, spread=0.0) is not None
    assert compare("y", off, want, spread=10.0) is None


def test_two_implementations_may_be_twice_as_far_apart_as_each_from_the_truth():
    for exact, factor in ((True, 1), (False, 2)):
        own, rest = tolerance.per_unit(torch.bfloat16, exact=exact)
        assert own == factor * 1.01 * 2**-8 and rest == factor * tolerance.CAP


def test_products_that_torch_may_round_are_allowed_it():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert tolerance.per_unit(torch.float32)[1] == tolerance.CAP + 2 * 2.0**-11
        assert tolerance.per_unit(torch.float64)[1] < 2e-4
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_nearly_overflows_may_have():
    want = torch.tensor([65519.0, -65519.0, 1.0], dtype=torch.float64)
    got = torch.tensor([INF, -INF, 1.0], dtype=torch.float16)
    assert compare("y", got, want) is None
    assert compare("y", -got, want) is not None


def test_strided_results_are_compared_in_pieces(monkeypatch):
    monkeypatch.setattr(tolerance, "PIECE", 7)
    want = torch.randn(5, 6)
    got = want.t().contiguous().t()
    assert compare("y", got, want, exact=False) is None
    got[4, 5] += 1
    assert compare("y", got, want, exact=False).startswith("y[4, 5] is ")
    assert distance(got, want) == pytest.approx(1 / float(want.abs().max()))


def test_distance_is_infinite_where_one_is_no_number():
    assert distance(torch.tensor([1.0, NAN]), torch.ones(2)) == INF
    assert distance(torch.tensor([NAN]), torch.tensor([NAN])) == 0.0


def test_indices_are_shared_whatever_their_order():
    a = torch.arange(100).view(1, 100)
    assert shared(a, a.flip(1)) == 1.0
    assert shared(a, a + 1) == 0.99
    assert shared(a[:, :0], a[:, :0]) == 1.0


def indexer(got, want):
    dims = {"B": 1, "S": 1, "N": 100, "H": 1, "D": 1, "top_k": len(want)}
    as_rows = [(torch.tensor([[v]], dtype=torch.int32),) for v in (got, want)]
    return agree(transom.ops()["lightning_indexer"], *as_rows, dims)


def test_a_near_tie_may_fall_either_way_and_no_more():
    some = list(range(100))
    assert indexer([*some[1:], 100], some) is None
    assert indexer([1, 2, 9], [1, 2, 3]) is None
    assert indexer([1, 8, 9], [1, 2, 3]).startswith("indices shares 33% of its entries with what")


def routed(ids, weights):
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(weights)


def test_weights_are_compared_expert_by_expert():
    """Of two experts that nearly tie either may be named first; a row of others is not compared."""
    op, dims = transom.ops()["route"], {"T": 3, "E": 9, "k": 2, "groups": 1}
    right = routed([[1, 2], [3, 4], [5, 6]], [[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]])
    turned = routed([[2, 1], [3, 4], [5, 6]], [[0.4, 0.6], [0.5, 0.5], [0.7, 0.3]])
    other = routed([[1, 2], [3, 8], [5, 6]], [[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    wrong = routed([[2, 1], [3, 4], [5, 6]], [[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]])
    assert agree(op, turned, right, dims) is None
    assert agree(op, other, right, dims) is None
    assert "weights[0, 0] is " in agree(op, wrong, right, dims)


def test_what_no_score_chooses_must_be_equal():
    op = transom.ops()["ngram_hash"]
    rows = torch.arange(100).view(1, 10, 10)
    other = rows.clone()
    other[0, 0, 0] = 7
    dims = {"B": 1, "S": 10, "n": 2, "h": 10, "pad": 0}
    assert agree(op, (other,), (rows,), dims) == "rows[0, 0, 0] is 7; expected 0 (1 differ)"


# One place --------------------------------------------------------------------------------------

SHIPPED = ("runtime", "kernels", "backends", "bench", "tests/conformance")
NAMES = {"allclose", "isclose", "assert_close", "assert_allclose", "rtol", "atol"}
ELSEWHERE = {"runtime/models/experts.py"}
"""Where numbers are still compared in another way; it only shrinks."""


def comparers(text):
    """Names of functions and arguments that compare numbers in a way of their own."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            found |= {name, *(k.arg for k in node.keywords)} & NAMES
        elif isinstance(node, ast.Assign):
            targets = {t.id for t in node.targets if isinstance(t, ast.Name)}
            found |= {t for t in targets if "TOLERANCE" in t}
    return found


def test_nothing_else_has_a_tolerance_of_its_own():
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in SHIPPED
        for path in sorted((ROOT / folder).rglob("*.py"))
        if comparers(path.read_text())
    }
    assert found == ELSEWHERE


def test_a_tolerance_of_its_own_is_seen():
    assert comparers("TOLERANCE = 1") and comparers("torch.allclose(a, b)")
    assert comparers("f(a, rtol=1)") and not comparers("agree(a, b)")


def test_a_call_is_drawn_from_a_declaration_in_one_place():
    """What asks an operator's sampler makes calls."""
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in (*SHIPPED, "tests/native", "tests/triton", "tests/ascend")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if ".sampler(" in path.read_text()
    }
    assert found == {"tests/conformance/calls.py", "tests/conformance/cases.py"}
