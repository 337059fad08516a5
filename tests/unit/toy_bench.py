"""A model of which every case of transom bench is small."""

from __future__ import annotations

import pytest

from transom.bench import models
from transom.bench.cases import PLAIN, Wanted, forget

TOY = models.Model(
    "toy", "Toy", 32, "a test",
    models.Experts(16, 2, 32, "sigmoid", groups=4, top_groups=2, limit=10.0),
    models.Attention(4, 512, 512, 0.05, 4, window=4, ratios=(4, 128), index_heads=2, index_dim=8,
                     row_bytes=584),
    models.Blocks(4, 2, 8, 4, 3), models.Engram(3, 2, 32, 64, "bf16"), streams=2, iterations=3,
)  # fmt: skip


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
