"""A model of which every case of transom bench is small, and rows as a run would keep them."""

from __future__ import annotations

import pytest

from transom.bench import models, records
from transom.bench.cases import PLAIN, Wanted, forget
from transom.bench.measure import Row

TOY = models.Model(
    "toy",
    "Toy",
    32,
    "a test",
    models.Experts(16, 2, 32, "sigmoid", groups=4, top_groups=2, limit=10.0),
    models.Attention(
        4, 512, 512, 0.05, 4, window=4, ratios=(4, 128), index_heads=2, index_dim=8, row_bytes=584
    ),
    models.Blocks(4, 2, 8, 4, 3),
    models.Engram(3, 2, 32, 64, "bf16"),
    streams=2,
    iterations=3,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The model is known, and no measured choice of this machine decides a test."""
    monkeypatch.setitem(models.MODELS, "toy", TOY)
    monkeypatch.setenv("TRANSOM_TUNE", "off")
    monkeypatch.delenv("TRANSOM_USE", raising=False)
    yield
    forget()


def wanted(tokens=(5,), contexts=(16,), dtypes=("f32",), formats=(PLAIN,), memory=1 << 30, **more):
    return Wanted(tokens, contexts, dtypes, formats, memory, **more)


def a_row(candidate="native", median=1.0, attained=0.5, noise=0.01, **more) -> Row:
    around = [1.0, 1 - 2 * noise, 1 - noise, 1 + noise, 1 + 2 * noise]
    values = dict(
        op="moe_experts",
        model="toy",
        label="T = 5",
        title="Toy, T = 5, f32",
        dims={"T": 5},
        dtype="f32",
        format="plain",
        candidate=candidate,
        note="",
        threads=2,
        level="avx2",
        peer="transom" if candidate in ("native", "composite") else "torch",
        scaled="",
        cold="",
        sweep=("tokens", 5.0),
        flops=1e9,
        bytes=1e8,
        bound="memory",
        error=1e-7,
        calls=9,
        seconds=[median * f for f in around],
        attained=[attained * f for f in around],
        chosen=candidate == "native",
    )
    return Row(**{**values, **more})


def lines(*rows: Row, machine="a machine") -> list[dict]:
    ceilings = dict(
        compiled=True,
        threads=2,
        level="avx2",
        best_level="avx512",
        fma=100.0,
        dot=150.0,
        read=20.0,
        fma_best=200.0,
        dot_best=400.0,
        buffer_bytes=1 << 30,
        cache_bytes=1 << 25,
    )
    about = {**records.about(ceilings, {}, "abc"), "machine": machine}
    return [records.line(about, row) for row in rows]
