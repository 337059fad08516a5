"""lightning_indexer_kl: a query's listed keys are copied into tiles, their scores kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._arrays import array, flat, scratch
from .._compile import kernel, part
from .._numbers import wide
from .._pool import for_each, threads
from .._product import LANES
from ._scores import log_mass, score_listed
from ._tiles import KEYS, pack, padded, whole


@part
def _task(task, thread, q, k, N, weights, target, indices, loss, room):
    """One query."""
    packed, tiles, dots, scores, places = room
    b, s, H = task // loss.shape[1], task % loss.shape[1], q.shape[1]
    queries, score, place, goals = packed[thread], scores[thread], places[thread], target[b, s]
    pack(q, np.float32(1), task, 0, H, 0, H, queries)
    count = score_listed(
        b, k, N, indices[b, s], queries, weights[task], tiles[thread], dots[thread], score, place
    )
    total = np.float32(0)
    norm = log_mass(score, count) if count > 0 else np.float32(0)
    for i in range(count):
        goal = wide(goals[place[i]])
        if goal != 0:
            total += goal * (np.log(goal) - (score[i] - norm))
    loss[b, s] = total


@kernel
def _run(q, k, N, weights, target, indices, loss, room):
    args = (q, k, N, weights, target, indices, loss, room)
    for_each(_task, q.shape[0], room[0].shape[0], args)


def numba(q: Tensor, k: Tensor, weights: Tensor, target: Tensor, indices: Tensor) -> Tensor:
    """loss[b,s] = sum_l target_l * (log target_l - log softmax(I)_l), I of the listed keys."""
    (B, S, H, D), N, L = q.shape, k.shape[1], indices.shape[2]
    loss = torch.zeros((B, S))
    if not loss.numel() or not L:
        return loss
    used, lanes = threads(B * S * L * H * D), padded(H)
    _run(
        array(q.reshape(B * S, H, D)),
        (flat(k), *k.stride()[:2]),
        N,
        array(weights.float().reshape(B * S, H)),
        array(target),
        array(whole(indices)),
        array(loss),
        (
            scratch(used, lanes // LANES, D, LANES),
            scratch(used, KEYS, D),
            scratch(used, L, lanes),
            scratch(used, L),
            np.empty((used, L), np.int64),
        ),
    )
    return loss
