"""transom tune --tiles on the interpreter's tiles. Run by test_interpreted.py, in a process where
TRITON_INTERPRET is set."""

from __future__ import annotations

import importlib

import pytest

from transom.backends.triton import Tile, set_tiles
from transom.cli import main

choice = importlib.import_module("transom.backends.triton._choice")


@pytest.fixture
def two_tiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    choice._measured.cache_clear()
    # The first has four times as many steps: the interpreter's time is that of its steps.
    slow, fast = ({"BM": 16, "BN": n, "BK": n} for n in (16, 64))
    for case in ("few", "few_f32"):
        set_tiles(f"grouped_gemm.{case}", choice.INTERPRETER, [slow, fast])
    yield Tile.of(fast)
    choice._replaced.clear()
    choice._measured.cache_clear()


def test_the_fastest_tile_is_kept(two_tiles, capsys):
    asked = ["tune", "--tiles", "grouped_gemm", "--memory", "1", "--repeats", "1"]
    assert main(asked) == 0
    assert "grouped_gemm.few" in capsys.readouterr().out
    assert choice.chosen("grouped_gemm.few_f32", choice.INTERPRETER, "cpu") == two_tiles
