"""Rotary: exact angles, both pairings and spans, YaRN's ramp."""

from __future__ import annotations

import math

import pytest
import torch

from transom.nn.rotary import Rotary, Yarn

CPU = torch.device("cpu")


@pytest.mark.parametrize("position", [0, 1, 65_537, 1_000_000, 2**24 + 1])
def test_edge_36_angles_are_exact_at_any_position(position: int) -> None:
    rotary = Rotary(8, 160_000.0, "half", "last")
    cos, sin = rotary.angles(position, 1, device=CPU)
    for i in range(4):
        angle = position * 160_000.0 ** (-2 * i / 8)
        # position * frequency keeps 53 bits; half a unit of float32 for the result
        slack = 2.0**-25 + position * 2.0**-52
        assert abs(float(cos[0, i]) - math.cos(angle)) <= slack
        assert abs(float(sin[0, i]) - math.sin(angle)) <= slack


def test_edge_37_the_two_pairings_and_spans() -> None:
    x = torch.arange(1.0, 7.0).view(1, 1, 6)
    c, s = math.cos(1.0), math.sin(1.0)
    c2, s2 = math.cos(0.01), math.sin(0.01)

    def turn(pairing: str, span: str) -> list[float]:
        rotary = Rotary(4, 10_000.0, pairing, span)
        return rotary.turn(x, rotary.angles(1, 1, device=CPU)).flatten().tolist()

    def two(a: float, b: float, c: float, s: float) -> list[float]:
        return [a * c - b * s, b * c + a * s]

    a, b = two(1, 2, c, s), two(3, 4, c2, s2)
    assert turn("interleaved", "first") == pytest.approx([*a, *b, 5, 6])
    a, b = two(1, 3, c, s), two(2, 4, c2, s2)
    assert turn("half", "first") == pytest.approx([a[0], b[0], a[1], b[1], 5, 6])
    a, b = two(3, 5, c, s), two(4, 6, c2, s2)
    assert turn("half", "last") == pytest.approx([1, 2, a[0], b[0], a[1], b[1]])
    a, b = two(3, 4, c, s), two(5, 6, c2, s2)
    assert turn("interleaved", "last") == pytest.approx([1, 2, *a, *b])


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_inverse_turns_back(pairing: str) -> None:
    rotary = Rotary(6, 10_000.0, pairing, "last")
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = rotary.angles(40, 5, device=CPU)
    back = rotary.turn(rotary.turn(x, angles), angles, inverse=True)
    assert torch.allclose(back, x, atol=1e-6)


def test_steps_are_positions_of_blocks() -> None:
    rotary = Rotary(4, 10_000.0, "half", "last")
    every = rotary.angles(0, 13, device=CPU)
    blocks = rotary.angles(4, 3, step=4, device=CPU)
    assert torch.equal(blocks.cos, every.cos[4::4])
    assert torch.equal(blocks.sin, every.sin[4::4])


def test_a_low_dtype_is_rounded_once() -> None:
    rotary = Rotary(4, 10_000.0, "interleaved", "last")
    x = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = rotary.angles(7, 3, device=CPU)
    assert torch.equal(rotary.turn(x, angles), rotary.turn(x.float(), angles).bfloat16())


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    plain = Rotary(64, 160_000.0, "interleaved", "last").frequencies()
    scaled = Rotary(
        64, 160_000.0, "interleaved", "last", Yarn(16.0, 65_536, 32.0, 1.0)
    ).frequencies()
    ratio = plain / scaled
    turns = 65_536 * plain / (2 * math.pi)
    assert ratio[turns > 64].eq(1).all()
    assert torch.allclose(ratio[turns < 0.5], torch.full((), 16.0, dtype=torch.float64))
    assert (ratio.diff() >= 0).all()
    assert ((ratio > 1) & (ratio < 16)).any()


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("factor", "original", "theta"), [(16.0, 65_536, 160_000.0), (40.0, 4096, 1e4)]
)
def test_yarn_against_transformers(
    factor: float, original: int, theta: float, truncate: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        head_dim=64,
        max_position_embeddings=int(original * factor),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": truncate,
        },
    )
    want, _ = ROPE_INIT_FUNCTIONS["yarn"](config, CPU)
    yarn = Yarn(factor, original, 32.0, 1.0, truncate)
    got = Rotary(64, theta, "half", "last", yarn).frequencies()
    assert torch.allclose(got.float(), want, rtol=2e-6)
