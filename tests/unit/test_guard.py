"""TRANSOM_GUARD: every Nth call beside the composite, quarantine, and the way out of it."""

from __future__ import annotations

import warnings

import pytest
import torch

import transom
from transom import guard
from transom.registry import forget_plans
from transom.requires import device


@pytest.fixture
def wrong(monkeypatch, tmp_path):
    """An implementation of sinkhorn that is wrong from its third call on; (calls, outputs)."""
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    guard.entries()
    calls = []

    @transom.sinkhorn.impl(requires=[device("cpu")], tier="tuned", version="7")
    def aaa_drifts(logits: torch.Tensor, *, iterations: int, eps: float) -> torch.Tensor:
        calls.append(1)
        right = transom.sinkhorn.impls["composite"].function(logits, iterations=iterations, eps=eps)
        return right if len(calls) < 3 else right + 0.25

    yield calls
    del transom.sinkhorn.impls["aaa_drifts"]
    forget_plans()
    guard._known.clear()
    guard._read.clear()


def call():
    g = torch.Generator().manual_seed(0)
    with transom.record() as calls:
        out = transom.sinkhorn(torch.randn(5, 4, 4, generator=g), iterations=3, eps=1e-6)
    return out, calls[0].impl


def test_nothing_is_compared_unless_asked_for(wrong):
    for _ in range(5):
        _, ran = call()
        assert ran == "aaa_drifts"
    assert guard.entries() == []


def test_a_wrong_call_is_named_set_aside_and_answered_rightly(wrong, monkeypatch):
    monkeypatch.setenv("TRANSOM_GUARD", "1")
    right, _ = call()
    call()
    with pytest.warns(guard.Quarantined) as told:
        out, _ = call()
    assert torch.equal(out, right)
    (text,) = (str(w.message) for w in told)
    assert text.startswith("sinkhorn: aaa_drifts disagrees with the composite: comb[0, 0, 0] is ")
    assert "for logits float32[5, 4, 4]" in text and "transom doctor --clear" in text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", transom.SlowPath)
        _, ran = call()
    assert ran != "aaa_drifts" and len(wrong) == 3
    shown = transom.explain("sinkhorn", torch.zeros(1, 4, 4), iterations=3, eps=1e-6).rejected
    assert shown["aaa_drifts"][0].startswith("quarantined: comb[0, 0, 0] is ")


def test_only_every_nth_call_is_compared(wrong, monkeypatch):
    monkeypatch.setenv("TRANSOM_GUARD", "4")
    right, _ = call()
    call()
    bad, _ = call()
    assert not torch.equal(bad, right) and guard.entries() == []
    with pytest.warns(guard.Quarantined):
        call()


def test_quarantine_outlives_the_process_and_ends_with_clear(wrong, monkeypatch):
    monkeypatch.setenv("TRANSOM_GUARD", "1")
    call(), call()
    with pytest.warns(guard.Quarantined):
        call()
    guard._known.clear()
    guard._read.clear()  # as a new process begins
    (entry,) = guard.entries()
    assert (entry.op, entry.impl, entry.version) == ("sinkhorn", "aaa_drifts", "7")
    forget_plans()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", transom.SlowPath)
        assert call()[1] != "aaa_drifts"
    assert guard.clear() == 1 and guard.entries() == []
    monkeypatch.setenv("TRANSOM_GUARD", "0")
    assert call()[1] == "aaa_drifts"


def test_another_version_gets_another_chance(wrong, monkeypatch):
    monkeypatch.setenv("TRANSOM_GUARD", "1")
    call(), call()
    with pytest.warns(guard.Quarantined):
        call()
    impl = transom.sinkhorn.impls["aaa_drifts"]
    assert guard.reason(impl, "cpu") is not None
    from dataclasses import replace

    assert guard.reason(replace(impl, version="8"), "cpu") is None


def test_a_value_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("TRANSOM_GUARD", "often")
    with pytest.raises(ValueError, match="TRANSOM_GUARD: value is 'often'; expected a whole"):
        guard.every()
