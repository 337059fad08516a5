"""The gate of bench/overhead.py: what it holds against its limits. What is timed is not checked."""

from __future__ import annotations

import pytest

from transom.bench import overhead

UNIT = "torch.add = 1"


def found(direct=1.0, cffi=1.0, extension=1.0, road="transom._C"):
    """Figures as measure() gives them, on a machine so slow that every time is a second."""

    def row(ratio):
        return {"us": 1e6, UNIT: ratio}

    above = {"cffi": row(cffi), "transom._C": row(extension), "operator": row(99.0)}
    calls = {"sinkhorn": {"direct": row(direct), "torch operator": row(99.0)}}
    return {
        "torch_add_us": 1e6,
        overhead.ROAD: road,
        "calls": calls,
        "plugin": {"C function": row(0.1), "torch.empty_like": row(0.5), "above C function": above},
        "import": {"transom_ms": 1e6, "torch_ms": 1e6},
    }


def test_ratios_within_their_limits_pass_whatever_the_times():
    assert overhead.beyond(found(**dict.fromkeys(("direct", "cffi", "extension"), 1.5))) == []


@pytest.mark.parametrize(
    "figures, text",
    [
        (dict(direct=3.01), "a call of sinkhorn costs 3.01 x torch.add; at most 3.0"),
        (
            dict(direct=20.1, road="cffi"),
            "a call of sinkhorn costs 20.10 x torch.add; at most 20.0",
        ),
        (dict(extension=1.51), "a call through transom._C costs 1.51 x torch.add; at most 1.5"),
    ],
)
def test_a_ratio_above_its_limit_is_said(figures, text):
    assert overhead.beyond(found(**figures)) == [text]


def test_without_a_compiler_the_rest_is_held():
    figures = found(direct=4.0)
    figures["plugin"] = {"not measured": "no cc"}
    assert len(overhead.beyond(figures)) == 1
    assert "a plugin in C: no cc" in overhead.lines(figures)


def test_an_idle_implementation_answers_with_what_the_composite_gave(norm):
    import torch

    import transom

    x, weight = torch.randn(2, 8), torch.rand(8)
    with transom.use(scaled_norm=overhead.idle(norm, (x, weight, None, 1e-6))):
        assert norm(x, weight)[0] is norm(x, weight)[0]
        torch.testing.assert_close(
            norm(x, weight)[0], norm.impls["composite"].function(x, weight)[0]
        )


def test_what_is_timed_is_compared_round_by_round():
    row = overhead.cost([2.0, 30.0, 2.0], [1.0, 10.0, 2.0])
    assert row == {"us": 2.0, UNIT: 2.0}
