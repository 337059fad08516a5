"""What transom run's figures mean: agreement, rows of operators, peak memory, charts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transom.cli import charts, memory, operators
from transom.device import Peaks
from transom.models import agreement
from transom.record import Call

PEAKS = Peaks("cpu", 100.0, 10.0, 1)

# Agreement ------------------------------------------------------------------------------------

EXACT = ("exact", 1e-4)


def compared(a: Tensor, b: Tensor, tokens=(1, 2), others=(1, 2), rule=EXACT):
    return agreement.compare(a, b, len(a) - len(tokens) + 1, tokens, others, rule)


def logits(*rows: float) -> Tensor:
    """One row a position: these values beside 0 and 10, so that the range is 10."""
    return torch.tensor([[0.0, r, 10.0] for r in rows])


def test_equal_logits_and_tokens_agree():
    found = compared(logits(1, 2, 3), logits(1, 2, 3))
    assert found.agrees and found.largest == 0 and found.range == 10 and found.same_choice == 1


def test_the_largest_difference_of_any_position_decides():
    assert compared(logits(1, 2, 3), logits(1, 2, 3.0009)).agrees
    found = compared(logits(1, 2, 3), logits(1, 2.002, 3))
    assert not found.agrees
    assert found.worst == pytest.approx(2e-4, rel=1e-3)
    assert found.relative[1] == found.worst


def test_another_token_disagrees_and_the_margin_is_told():
    found = compared(logits(1, 9.99, 3), logits(1, 9.99, 3), (1, 2), (1, 0))
    assert found.first_difference == 1 and not found.agrees
    assert found.margin == pytest.approx(0.7)  # of the row that chose it: 10 and 3
    assert "the tokens differ from number 2 on" in found.verdict


@pytest.mark.parametrize("rule", [EXACT, ("rounding", 0.1)])
def test_nan_never_agrees(rule):
    assert not compared(logits(1, 2, 3), logits(1, math.nan, 3), rule=rule).agrees
    assert not compared(logits(1, 2, math.nan), logits(1, 2, 3), rule=rule).agrees


def test_infinities_at_the_same_place_are_equal():
    found = compared(logits(1, 2, -math.inf), logits(1, 2, -math.inf))
    assert found.agrees and found.range == 10


def test_constant_logits_agree_only_with_themselves():
    same = torch.zeros(3, 4)
    assert compared(same, same).agrees
    assert not compared(same, same + 1).agrees


def test_in_low_precision_one_tipped_position_does_not_decide_but_the_median_does():
    rule = agreement.limit(torch.bfloat16, 4)
    assert rule == ("rounding", 4 * 2**-8 * 2)
    tipped = logits(1, 2, 3, 4, 5)
    tipped[2, 1] += 4
    assert compared(logits(1, 2, 3, 4, 5), tipped, rule=rule, others=(1, 0)).agrees
    assert not compared(logits(1, 2, 3, 4, 5), logits(2, 3, 4, 5, 6), rule=rule).agrees


def test_float32_has_the_exact_rule_at_any_depth():
    assert agreement.limit(torch.float32, 60) == EXACT


# Rows, memory, charts ---------------------------------------------------------------------------


def a_call(op: str, seconds: float, flops: float, bytes_: float, impl: str = "composite") -> Call:
    return Call(op, impl, "cpu", None, seconds, flops, bytes_)


def test_a_row_holds_rates_and_what_of_the_peaks_was_attained():
    calls = [a_call("a", 0.5, 10e9, 1e9), a_call("a", 0.5, 10e9, 1e9), a_call("b", 0.25, 0, 1e9)]
    phase = operators.phase("prefill", 1, 2.0, calls, PEAKS)
    a, b = phase.rows
    assert (a.op, a.calls, a.seconds, a.share) == ("a", 2, 1.0, 0.5)
    assert (a.gflops, a.gbytes) == (20.0, 2.0)
    assert a.attained == pytest.approx(0.2)  # 0.1 s of arithmetic each at 100 GFLOP/s, in 0.5 s
    assert a.bound == "arithmetic" and b.bound == "memory"
    assert b.attained == pytest.approx(0.4)
    assert phase.outside == 0.75


def test_one_operator_by_two_implementations_is_two_rows():
    calls = [a_call("a", 1, 1, 1), a_call("a", 2, 1, 1, "tuned")]
    phase = operators.phase("decode", 1, 4.0, calls, PEAKS)
    assert [(r.op, r.impl) for r in phase.rows] == [("a", "tuned"), ("a", "composite")]


@pytest.mark.parametrize("method", ["kernel", "sampled"])
def test_peak_memory_sees_what_was_freed_again(monkeypatch, method):
    if method == "sampled":
        monkeypatch.setattr(memory, "_reset_mark", lambda resident: False)
    with memory.PeakMemory(torch.device("cpu")) as peak:
        for _ in range(8 if method == "sampled" else 1):
            torch.ones(16 << 20).sum()
    if peak.bytes is None:
        pytest.skip("this system has no /proc")
    assert peak.method in ("kernel", "sampled")
    assert 48 << 20 < peak.bytes < 160 << 20


def test_peak_memory_is_none_without_proc(monkeypatch):
    monkeypatch.setattr(memory, "_status", lambda field: None)
    with memory.PeakMemory(torch.device("cpu")) as peak:
        pass
    assert (peak.bytes, peak.method) == (None, "none")


def test_charts_take_what_a_run_can_give():
    nothing = operators.phase("prefill", 1, 0.0, [], PEAKS)
    assert charts.roofline([nothing], 100, 10, {}) == ""
    assert "<svg" in charts.shares(nothing, {})
    assert "<svg" in charts.differences([0.0, math.nan, math.inf], 3, 1e-4, "limit")
    assert "<svg" in charts.pair([("a", None, "-", "original"), ("b", 0.0, "0", "patched")])


def test_text_in_charts_is_escaped():
    chart = charts.pair([("<b>", 1.0, "&", "original")])
    assert "&lt;b&gt;" in chart and "&amp;" in chart and "<b>" not in chart


def test_memory_that_caches_hold_can_be_taken(tmp_path):
    """With few free pages beside a full file cache `transom bench` cut its models to nothing."""
    told = tmp_path / "meminfo"
    told.write_text("MemFree: 1000 kB\nMemAvailable: 20000 kB\n")
    assert memory.available_bytes(told) == 20000 * 1024


def test_memory_is_told_without_the_file_too(tmp_path):
    assert memory.available_bytes(tmp_path / "none") > 1e6
