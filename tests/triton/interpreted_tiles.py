"""transom tune --tiles on the interpreter's tiles. Run by test_interpreted.py, in a process where
TRITON_INTERPRET is set."""

from __future__ import annotations

import importlib

import pytest
import torch

import transom
from transom.backends.triton import Tile, set_tiles
from transom.cli import main

choice = importlib.import_module("transom.backends.triton._choice")
gemm = importlib.import_module("transom.backends.triton.moe._gemm")
sparse = importlib.import_module("transom.backends.triton.attention.sparse_attention")


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


def asked_for(module, monkeypatch):
    """The entries that a module's host code asks tiles of."""
    asked, tile_for = [], module.tile_for
    monkeypatch.setattr(module, "tile_for", lambda e, t: asked.append(e) or tile_for(e, t))
    return asked


def test_experts_second_product_over_codes_has_tiles_of_its_own(monkeypatch):
    asked = asked_for(gemm, monkeypatch)
    T, D, E, K = 96, 64, 2, 2
    random = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(T, n, generator=random) for n in (D, K))
    gate_up, down = (torch.randn(E, n, D, generator=random) / 8 for n in (2 * D, D))
    codes = [transom.quantize(w, "mxfp4") for w in (gate_up, down)]
    ids = torch.randint(0, E, (T, K), generator=random)
    args = (x.bfloat16(), ids, weights.softmax(1), *codes)
    with transom.use(moe_experts="triton"):
        got = transom.moe_experts(*args)
    with transom.use(moe_experts="composite"):
        want = transom.moe_experts(*args)
    assert asked == ["grouped_gemm.many_codes_split"]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_attention_over_rows_that_end_behind_their_values_has_tiles_of_its_own(monkeypatch):
    asked = asked_for(sparse, monkeypatch)
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 3, 288, generator=random).half()
    kv = torch.randn(1, 40, 288, generator=random).half()
    with transom.use(sparse_attention="triton"):
        got = transom.sparse_attention(q, kv, scale=0.06, v_dim=256)
    with transom.use(sparse_attention="composite"):
        want = transom.sparse_attention(q, kv, scale=0.06, v_dim=256)
    assert asked == ["sparse_attention.tailed"]
    torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3)
