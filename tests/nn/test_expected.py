"""What does not fit a module is refused in the module's own words, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import transom.nn as tn

ROTARY = tn.Rotary(8, 1e4, "interleaved", "last")
SHARED = tn.SharedShape(
    hidden=32, heads=4, head_dim=16, q_rank=16, out_groups=2, out_rank=8, window=4, eps=1e-6
)
LATENT = tn.LatentShape(
    hidden=32, heads=2, q_rank=16, kv_rank=16, nope=8, rope=8, value=8, eps=1e-6
)
INDEX = tn.IndexShape(4, 16, 3)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def moe() -> Any:
    return tn.MoE(64, 48, 8, 2)


def attention(form: str) -> Any:
    if form == "dsa":
        rotary = tn.Rotary(8, 1e4, "half", "first")
        return tn.SparseAttention.dsa(LATENT, ROTARY, index=INDEX, index_rotary=rotary)
    if form == "csa":
        return tn.SparseAttention.csa(SHARED, ROTARY, ratio=2, index=INDEX)
    more = {"ratio": 4} if form == "hca" else {}
    return getattr(tn.SparseAttention, form)(SHARED, ROTARY, **more)


def engram() -> Any:
    hashed = tn.engram_hashes([1], table_sizes=[11], heads=2, compressed_vocab=50, seed=0)[1]
    return tn.Engram(
        16, 2, hashed=hashed, column=4, vocab=50, token_map=None, pad=0, form="demo", gate_eps=1e-6
    )


def connection(sublayer: Any = None) -> Any:
    return tn.HyperConnection(
        sublayer or torch.nn.Identity(), 16, 2, iterations=2, eps=1e-6, rms_eps=1e-6, post_scale=2.0
    )


CASES = {
    "MoE, width": (lambda: moe()(zeros(2, 8, 32)), r"MoE: x has shape \[2, 8, 32\]; .*hidden = 64"),
    "MoE, wider": (lambda: moe()(zeros(2, 9, 128)), "MoE: x has shape"),
    "MoE, no dim": (lambda: moe()(zeros()), "MoE: x has shape"),
    "MoE, preset": (
        lambda: moe()(zeros(2, 9, 64), preset=zeros(9, 4, dtype=torch.int32)),
        r"MoE: preset has shape \[9, 4\]; x has the tokens \[2, 9\]: expected \[2, 9, 2\]",
    ),
    "MoE, mask": (
        lambda: moe()(zeros(2, 9, 64), mask=zeros(3, 6, dtype=torch.bool)),
        "MoE: mask has shape",
    ),
    "MoE, tokens": (
        lambda: moe()(zeros(2, 9, 64), tokens=zeros(9, dtype=torch.int64)),
        "MoE: tokens has shape",
    ),
    "MoE, routing": (lambda: moe().routing(zeros(4, 63)), "MoE: x has shape"),
    **{
        f"{form}, {what}": (lambda form=form, x=x: attention(form)(x), "SparseAttention: x has")
        for form in ("window", "hca", "csa", "dsa")
        for what, x in (("width", zeros(1, 5, 31)), ("rank", zeros(5, 32)))
    },
    **{
        f"{form}, cache of another batch": (
            lambda form=form: attention(form)(
                zeros(3, 2, 32), attention(form)(zeros(2, 5, 32)).cache
            ),
            r"SparseAttention: cache.(local|entries) has shape .*B = 3",
        )
        for form in ("window", "hca", "csa", "dsa")
    },
    "cache of another form": (
        lambda: attention("window")(zeros(1, 2, 32), attention("hca")(zeros(1, 9, 32)).cache),
        "SparseAttention: cache.entries is given; a layer of this form has none",
    ),
    "cache before the start": (
        lambda: attention("window")(zeros(1, 2, 32), tn.AttentionCache(-1)),
        "SparseAttention: cache.position is -1",
    ),
    "Engram, streams": (
        lambda: engram()(zeros(1, 4, 3, 16), zeros(1, 4, dtype=torch.int64)),
        "Engram: x has shape .*streams = 2",
    ),
    "Engram, tokens": (
        lambda: engram()(zeros(1, 4, 2, 16), zeros(1, 5, dtype=torch.int64)),
        "Engram: tokens has shape",
    ),
    "Engram, blocked": (
        lambda: engram()(zeros(1, 4, 2, 16), zeros(1, 4, dtype=torch.int64), blocked=zeros(1, 4)),
        "Engram: blocked is float32; expected bool",
    ),
    "Engram, lookback": (
        lambda: engram()(
            zeros(1, 4, 2, 16),
            zeros(1, 4, dtype=torch.int64),
            cache=tn.EngramCache(zeros(2, 1, dtype=torch.int64)),
        ),
        "Engram: cache.lookback has shape",
    ),
    "HyperConnection, width": (lambda: connection()(zeros(3, 2, 15)), "HyperConnection: x has"),
    "HyperConnection, sublayer": (
        lambda: connection(torch.nn.Linear(16, 8))(zeros(3, 2, 16)),
        r"HyperConnection: the sublayer gave \[3, 8\] for \[3, 16\]",
    ),
    "HyperConnectionHead": (
        lambda: tn.HyperConnectionHead(16, 2, eps=1e-6, rms_eps=1e-6)(zeros(3, 16)),
        "HyperConnectionHead: x has shape",
    ),
    "to_streams": (lambda: tn.to_streams(zeros(3, 4), 0), "to_streams: streams is 0"),
    "RMSNorm": (lambda: tn.RMSNorm(8, 1e-6)(zeros(3, 1)), "RMSNorm: x has shape"),
    "Rotary": (
        lambda: ROTARY.turn(zeros(1, 3, 2, 16), ROTARY.angles(0, 4, device=torch.device("cpu"))),
        "rotary: x has shape",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_one_line(name: str) -> None:
    call, text = CASES[name]
    with pytest.raises((ValueError, TypeError), match=f"^{text}") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_hyper_connections_are_float32_whatever_the_default_is() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = connection()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
