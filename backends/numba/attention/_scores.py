"""Scores of the lightning indexer, and those of the keys that a query lists."""

from __future__ import annotations

import numpy as np

from .._compile import part
from ._tiles import KEYS, copy_row, meet


@part
def score_of(dots, factors):
    """sum_h factors[h] * relu(dots[h]); NaN stays NaN."""
    total = np.float32(0)
    for h in range(factors.shape[0]):
        x = dots[h]
        total += factors[h] * (x if x > 0 or x != x else np.float32(0))
    return total


@part
def score_listed(b, k, N, indices, queries, factors, tile, dots, scores, places):
    """Scores of the keys that a list names, in its order; returns their number.

    dots [L + 1, heads], scores and places [L]: of the i-th such key its products with the heads,
    its score, and where in the list it stands.
    """
    keys, of_batch, of_row = k
    D = queries.shape[1]
    count = done = 0
    for place in range(indices.shape[0] + 1):
        if place < indices.shape[0]:
            j = np.int64(indices[place])
            if 0 <= j < N:
                copy_row(keys, b * of_batch + j * of_row, tile[count - done, :D])
                places[count] = place
                count += 1
        filled = count - done
        if filled == KEYS or (filled > 0 and place == indices.shape[0]):
            some = dots[done:]
            meet(queries, tile, filled, some)
            for i in range(filled):
                scores[done + i] = score_of(some[i], factors)
            done = count
    return count


@part
def log_mass(scores, count):
    """log sum_i exp(scores[i]) over the first `count`, at least one."""
    top = scores[0]
    for i in range(count):
        # A NaN goes into the sum all the same.
        top = scores[i] if scores[i] > top else top
    total = np.float32(0)
    for i in range(count):
        total += np.exp(scores[i] - top)
    return top + np.log(total)
