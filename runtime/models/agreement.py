"""Do two runs of a model agree? The rule, and what is said when they don't."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import UNIT_ROUNDOFF

EXACT_LIMIT = 1e-4
"""Float32: the largest logit difference, of the logits' range."""

SPREAD = 4.0
"""Low precision: the median position may differ by this many roundings, each layer adding its own
at random."""

_ROWS = 64
"""Positions compared at a time, so that a large vocabulary needs no second copy of the logits."""


@dataclass(frozen=True)
class Agreement:
    """What comparing logits position by position, and greedy tokens one by one, gave."""

    largest: float
    """Largest absolute difference of any logit."""
    range: float
    """Largest less smallest logit of the original, over all positions."""
    relative: tuple[float, ...]
    """By position (prompt first, then generated tokens): its largest difference, of the range."""
    prompt: int
    """How many of the positions are the prompt's."""
    same_choice: float
    """Share of positions where both put the same token first."""
    tokens: int
    first_difference: int | None
    """The first generated token that differs, counted from 0; None if all are equal."""
    margin: float | None
    """There: how far the original's first and second choice are apart, of the range."""
    rule: str
    """'exact' (float32, float64) or 'rounding' (bfloat16, float16)."""
    limit: float

    @property
    def worst(self) -> float:
        """The largest difference of all, of the range."""
        return _largest(self.relative)

    @property
    def median(self) -> float:
        """The difference at the median position, of the range."""
        return _median(self.relative)

    @property
    def judged(self) -> float:
        """What is held against the limit: the largest difference, or the median position's in low
        precision."""
        return self.worst if self.rule == "exact" else self.median

    @property
    def agrees(self) -> bool:
        """True if the outputs agree; False too where a difference is NaN."""
        return self.judged <= self.limit and (
            self.rule == "rounding" or self.first_difference is None
        )

    @property
    def verdict(self) -> str:
        """One sentence."""
        what = (
            "largest logit difference"
            if self.rule == "exact"
            else "logit difference at the median position"
        )
        seen = f"{what} is {self.judged:.1e} of the logits' range; limit {self.limit:.0e}"
        if self.tokens == 0:
            return seen
        if self.first_difference is None:
            return f"{seen}; " + (
                "the token is equal" if self.tokens == 1 else f"all {self.tokens} tokens are equal"
            )
        near = (
            ""
            if self.margin is None
            else f" (the first two choices are {self.margin:.1e} of the range apart)"
        )
        return f"{seen}; the tokens differ from number {self.first_difference + 1} on{near}"


def limit(dtype: torch.dtype, layers: int) -> tuple[str, float]:
    """The rule for a model of this dtype and depth, and its limit as a share of the logits' range.

    Float32: the two runs order their sums differently, nothing else, so the largest difference must
    stay below 1e-4 and greedy tokens must be equal. In bfloat16 and float16 both runs round every
    intermediate, at different places, by a unit roundoff u; the differences of L layers add up like
    a random walk, to about u * sqrt(L) of the range. Moreover a rounding can tip a near tie of the
    router or the indexer, and that one position then differs by much, in Hugging Face's own run
    against float32 as well (measured on the built-in model: 0.15 of the range, as much as between
    the two runs). So the median position is judged, with a limit of 4 * u * sqrt(L), and tokens are
    shown but not judged.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return "rounding", SPREAD * UNIT_ROUNDOFF[dtype] * math.sqrt(max(1, layers))
    return "exact", EXACT_LIMIT


def compare(
    original: Tensor,
    other: Tensor,
    prompt: int,
    tokens: tuple[int, ...],
    others: tuple[int, ...],
    rule: tuple[str, float],
) -> Agreement:
    """Compare logits [positions, vocabulary] and generated tokens.

    Both logits are of the same text: the prompt and the tokens that the original generated,
    whatever the other would have chosen. So one differing token doesn't make all later positions
    incomparable.
    """
    high, low, same = -math.inf, math.inf, 0
    by_position: list[float] = []
    for a, b in zip(original.split(_ROWS), other.split(_ROWS), strict=True):
        a, b = a.float(), b.float()
        finite = a[a.isfinite()]  # a model may forbid tokens with -inf
        if finite.numel():
            high, low = max(high, finite.max().item()), min(low, finite.min().item())
        by_position += (a - b).abs().masked_fill_(a == b, 0.0).amax(-1).tolist()
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    spread = max(0.0, high - low)
    first = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), None)
    margin = None
    if first is not None:
        top = original[prompt - 1 + first].float().topk(2).values
        margin = (top[0] - top[1]).item() / spread
    relative = tuple(
        d / spread if spread > 0 else (math.nan if d != 0 else 0.0) for d in by_position
    )
    return Agreement(
        _largest(by_position),
        spread,
        relative,
        prompt,
        same / max(1, len(original)),
        len(tokens),
        first,
        margin,
        *rule,
    )


def _largest(values: tuple[float, ...] | list[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else max(values, default=0.0)


def _median(values: tuple[float, ...]) -> float:
    if any(math.isnan(v) for v in values):
        return math.nan
    return sorted(values)[len(values) // 2] if values else 0.0
