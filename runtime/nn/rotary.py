"""Rotary position embedding with its pairing, span and frequency scaling spelled out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """cos and sin [S, dim / 2], float32, of the angles of S positions."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Yarn:
    """Frequencies for longer contexts: slow ones are divided by `factor`, fast ones are kept.

    factor                longest position now / `original`
    original              tokens of the context that the model was first trained with
    beta_fast, beta_slow  turns within `original` above which a frequency is kept, and below which
                          it is divided by the full factor; a linear ramp between
    truncate              round the ends of the ramp outwards to whole pairs
    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2.
    """

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    truncate: bool = True

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """`frequencies` [dim / 2], theta ** (-2 i / dim), after scaling."""
        pairs = frequencies.shape[0]

        def pair_of(turns: float) -> float:
            return pairs * math.log(self.original / (turns * 2 * math.pi)) / math.log(theta)

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        step = torch.arange(pairs, dtype=torch.float64, device="cpu") - low
        slow = (step / max(high - low, 1e-3)).clamp(0, 1)
        return frequencies * (1 - slow) + frequencies / self.factor * slow


@dataclass(frozen=True)
class Rotary:
    """Turns channels (a, b) to (a cos t - b sin t, b cos t + a sin t), t = p theta^(-2i/dim).

    dim      channels that turn, even; p is the position in tokens, i the number of the pair
    theta    base of the frequencies
    pairing  "interleaved": channels (2i, 2i+1); "half": channels (i, i + dim/2)
    span     "first" or "last" `dim` channels of a head; the others stay as they are
    yarn     frequency scaling, or None

    Neither pairing nor span has a default: each is some model's, and a wrong one shows in no norm.
    Angles are made in float64 on the host from whole positions and rounded once to float32, so
    that position 1,000,000 is as exact as position 1.
    Errors: ValueError for an odd dim and unknown names.
    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """

    dim: int
    theta: float
    pairing: Literal["interleaved", "half"]
    span: Literal["first", "last"]
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rotary: dim is {self.dim}; must be even and at least 2")
        if self.pairing not in ("interleaved", "half"):
            raise ValueError(f"rotary: pairing is {self.pairing!r}; must be interleaved or half")
        if self.span not in ("first", "last"):
            raise ValueError(f"rotary: span is {self.span!r}; must be first or last")

    def frequencies(self) -> Tensor:
        """Radians per token of every pair: [dim / 2], float64, on the CPU."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim
        frequencies = self.theta**-exponent
        return self.yarn.scaled(frequencies, self.theta) if self.yarn else frequencies

    def angles(self, start: int, count: int, *, step: int = 1, device: torch.device) -> Angles:
        """Angles of the positions start, start + step, ... (count of them), on `device`."""
        positions = start + step * torch.arange(count, dtype=torch.float64, device="cpu")
        turns = positions[:, None] * self.frequencies()
        return Angles(turns.cos().float().to(device), turns.sin().float().to(device))

    def turn(self, x: Tensor, angles: Angles, *, inverse: bool = False) -> Tensor:
        """x [B, S, ..., D >= dim] turned by the angles of its S positions; `inverse` turns back.

        Returns new memory in x's dtype; the product is float32 (float64 for float64).
        """
        if x.dim() < 3 or x.shape[-1] < self.dim or x.shape[1] != angles.cos.shape[0]:
            expected = f"[B, S = {angles.cos.shape[0]}, ..., at least dim = {self.dim}]"
            raise ValueError(f"rotary: x has shape {list(x.shape)}; expected {expected}")
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = (1, x.shape[1], *[1] * (x.dim() - 3), self.dim // 2)
        cos, sin = angles.cos.view(shape).to(wide), angles.sin.view(shape).to(wide)
        if inverse:
            sin = -sin
        rest = x.shape[-1] - self.dim
        turning = (x[..., : self.dim] if self.span == "first" else x[..., rest:]).to(wide)
        if self.pairing == "interleaved":
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turning.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        turned = turned.to(x.dtype)
        if self.span == "first":
            return torch.cat((turned, x[..., self.dim :]), -1)
        return torch.cat((x[..., :rest], turned), -1)
