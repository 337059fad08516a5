"""Calls that were right are kept for the version that they were executed with, and no other."""

from __future__ import annotations

import importlib.util

import pytest

import transom

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def test_a_call_is_kept_for_the_sources_it_ran_with(monkeypatch, tmp_path):
    from transom.conformance.ascend import kept

    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    op = transom.ops()["route"]
    assert kept.find(op, "route(T=3)", "launches") is None
    kept.keep(op, "route(T=3)", "launches", 2)
    assert kept.find(op, "route(T=3)", "launches") == 2
    assert kept.find(op, "route(T=4)", "launches") is None
    assert kept.find(op, "route(T=3)", "other launches") is None
    assert kept.find(transom.ops()["route_backward"], "route(T=3)", "launches") is None
    monkeypatch.setattr(kept, "_sources", lambda path: "others")
    assert kept.find(op, "route(T=3)", "launches") is None


def test_the_digest_follows_the_sources(monkeypatch, tmp_path):
    from transom.conformance.ascend import kept

    first = kept._sources.__wrapped__("moe/route")
    assert (
        first == kept._sources.__wrapped__("moe/route") != kept._sources.__wrapped__("mhc/mhc_pre")
    )
    monkeypatch.setattr(kept, "OURS", kept.OURS[1:])
    assert kept._sources.__wrapped__("moe/route") != first
