"""Softmax over keys that arrive in tiles, and the products that attention makes with such a tile.

Shapes: `lead` are the dims that queries and keys share one to one, `rows` the dims of queries that
meet the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def products(x: Tensor, keys: Tensor) -> Tensor:
    """x[lead, rows, D] . keys[lead, n, D] -> [lead, rows, n]: every row against every key."""
    lead = keys.dim() - 2
    return (x.flatten(lead, -2) @ keys.mT).unflatten(lead, x.shape[lead:-1])


def mixtures(weights: Tensor, values: Tensor) -> Tensor:
    """weights[lead, rows, n], values[lead, n, D] -> [lead, rows, D]: the weighted sum of the
    values."""
    lead = values.dim() - 2
    return (weights.flatten(lead, -2) @ values).unflatten(lead, weights.shape[lead:-1])


def gathered_back(weights: Tensor, x: Tensor, lead: int) -> Tensor:
    """weights[lead, rows, n], x[lead, rows, D] -> [lead, n, D]: what each key collects from all
    rows."""
    return weights.flatten(lead, -2).mT @ x.flatten(lead, -2)


def finite(x: Tensor) -> Tensor:
    """x with 0 in place of NaN and Inf: zero times such a value would be NaN in a sum over keys."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


class OnlineSoftmax:
    """o = sum_j softmax(l)_j v_j over keys that come tile by tile, with logits -inf for keys that
    are not seen.

    Kept per row: the largest logit so far, the sum of exp(l - largest), and the weighted sum of
    values relative to it.
    Source: Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3; Dao et al. 2022,
    arXiv:2205.14135.
    """

    def __init__(self, rows: Sequence[int], width: int, like: Tensor) -> None:
        self.largest = like.new_full((*rows, 1), -torch.inf)
        self.mass = like.new_zeros((*rows, 1))
        self.sum = like.new_zeros((*rows, width))

    def weights(self, logits: Tensor) -> Tensor:
        """exp(logits - largest), written over `logits`; what was summed before is brought to the
        new largest."""
        largest = torch.maximum(self.largest, logits.amax(-1, keepdim=True))
        # While nothing is seen the largest is -inf, and -inf - (-inf) would be NaN.
        shift = largest.masked_fill(largest == -torch.inf, 0.0)
        weights = logits.sub_(shift).exp_()
        earlier = self.largest.sub_(shift).exp_()
        self.mass.mul_(earlier).add_(weights.sum(-1, keepdim=True))
        self.sum.mul_(earlier)
        self.largest = largest
        return weights

    def add(self, mixture: Tensor) -> None:
        """Add the weighted sum of the values that belong to the last `weights`."""
        self.sum.add_(mixture)

    def finish(self, sink: Tensor | None) -> tuple[Tensor, Tensor]:
        """o[rows, width] and lse[rows]; `sink` broadcasts against rows, joins the denominator and
        not the lse."""
        lse = (self.largest + self.mass.log()).squeeze(-1)
        empty = self.mass == 0
        o = self.sum / self.mass.masked_fill(empty, 1.0)
        if sink is not None:
            o *= kept_share(lse, sink).unsqueeze(-1)
        return o, lse


def kept_share(lse: Tensor, sink: Tensor) -> Tensor:
    """exp(lse) / (exp(lse) + exp(sink)): the share of the softmax that the sink leaves to the keys;
    0 without keys."""
    return torch.sigmoid(lse - sink).masked_fill(lse == -torch.inf, 0.0)


def sink_share(lse: Tensor, sink: Tensor) -> Tensor:
    """exp(sink) / (exp(lse) + exp(sink)): the share that goes to the sink; 0 for a sink of -inf."""
    return torch.sigmoid(sink - lse).masked_fill((sink == -torch.inf).expand_as(lse), 0.0)


def recomputed_weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), written over `logits`: the softmax without the sink; 0 in rows without a
    key."""
    return logits.sub_(lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1)).exp_()
