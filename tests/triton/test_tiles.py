"""Tiles as data: every table, its lookup, what a vendor and a measurement put in place."""

from __future__ import annotations

import importlib

import pytest

from transom.backends.triton import Tile, probe, set_tiles

choice = importlib.import_module("transom.backends.triton._choice")


@pytest.mark.parametrize("entry", choice.entries())
def test_every_entry_has_a_tile_for_every_architecture(entry):
    for arch in (*choice.ARCHITECTURES, choice.INTERPRETER, "unheard_of"):
        for tile in choice.tiles(entry, arch):
            assert all(size & (size - 1) == 0 for _, size in tile.sizes)
            assert tile.warps in (1, 2, 4, 8, 16) and tile.stages >= 1 and tile.each >= 1


@pytest.fixture
def replaced():
    yield
    choice._replaced.clear()


def test_the_longest_prefix_is_taken(replaced):
    tile = Tile.of({"BM": 32, "BN": 32, "BK": 32, "warps": 2})
    before = choice.tiles("grouped_gemm.many", "sm_80")
    set_tiles("grouped_gemm.many", "sm_9", [tile])
    assert choice.tiles("grouped_gemm.many", "sm_90")[0] != tile  # the table has sm_90 itself
    assert choice.tiles("grouped_gemm.many", "sm_91") == (tile,)
    assert choice.tiles("grouped_gemm.many", "sm_80") == before


def test_an_entry_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no entry 'grouped_gemm.most'; expected one of"):
        set_tiles("grouped_gemm.most", "sm_90", [{"BM": 16}])
    with pytest.raises(ValueError, match="got no tile"):
        set_tiles("grouped_gemm.many", "sm_90", [])


def test_a_measured_tile_is_taken_while_it_is_listed(tmp_path, monkeypatch, replaced):
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    choice._measured.cache_clear()
    first, second, *_ = choice.tiles("grouped_gemm.few", "sm_90")
    choice.remember("grouped_gemm.few", second, "cpu")
    assert choice.chosen("grouped_gemm.few", "sm_90", "cpu") == second
    monkeypatch.setenv("TRANSOM_TUNE", "off")
    assert choice.chosen("grouped_gemm.few", "sm_90", "cpu") == first
    monkeypatch.delenv("TRANSOM_TUNE")
    set_tiles("grouped_gemm.few", "sm_90", [first])
    assert choice.chosen("grouped_gemm.few", "sm_90", "cpu") == first
    choice._measured.cache_clear()


def test_without_triton_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert probe() == (
        "triton is not installed; expected triton >= 3.2; pip install transom[triton]"
    )
