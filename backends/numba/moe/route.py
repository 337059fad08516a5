"""route: a token's scores in vector code, its k largest keys by insertion into a short list."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from transom.kernels.moe.route import LINEAR_ABOVE, ROOT_BELOW, SCORES, TINY, route, route_backward

from .._arrays import array, floats, given, scratch
from .._compile import kernel, part, strict
from .._numbers import exp, sigmoid, wide
from .._pool import for_each, threads

SOFTMAX, SIGMOID, SQRTSOFTPLUS, TOPK_SOFTMAX = range(len(SCORES))
TOKENS = 8
"""Of a task."""
LANES = 64
"""Scores are made for a multiple of so many experts: then a vector computes each of them, and equal
logits have equal scores wherever they stand."""
_LINEAR, _ROOT, _TINY = np.float32(LINEAR_ABOVE), np.float32(ROOT_BELOW), np.float32(TINY)
_ONE, _LOWEST = np.float32(1), np.float32(-math.inf)


@strict
def _sqrtsoftplus(z):
    """sqrt(log(1 + e**z)), as z above 20 and e**(z/2) below -20."""
    if z > _LINEAR:
        return np.sqrt(z)
    if z < _ROOT:
        return exp(np.float32(0.5) * z)
    e = exp(-abs(z))
    return np.sqrt(max(z, np.float32(0)) + np.float32(math.log1p(e)))


@part
def _scores(z, score):
    """z replaced by its scores; `z` is as long as a multiple of LANES, the rest being -inf."""
    n = z.shape[0]
    if score == SIGMOID:
        for e in range(n):
            z[e] = sigmoid(z[e])
    elif score == SQRTSOFTPLUS:
        for e in range(n):
            z[e] = _sqrtsoftplus(z[e]) if z[e] == z[e] else z[e]
    elif score == SOFTMAX:
        top = _LOWEST
        for e in range(n):
            top = z[e] if z[e] > top or z[e] != z[e] else top
        top = np.float32(0) if top == _LOWEST else top
        total = np.float32(0)
        for e in range(n):
            z[e] = exp(z[e] - top)
            total += z[e]
        total = _ONE if total == np.float32(0) else total
        for e in range(n):
            z[e] /= total


@part
def _insert(key, place, keys, places, held):
    """Put a key into the falling list of the largest, of which `held` are there."""
    at = min(held, keys.shape[0] - 1)
    while at > 0 and key > keys[at - 1]:
        keys[at], places[at] = keys[at - 1], places[at - 1]
        at -= 1
    keys[at], places[at] = key, place


@part
def _largest(keys, best, places):
    """places of the largest keys, NaN apart, falling, the lowest place first among equals."""
    k, held = best.shape[0], 0
    for e in range(keys.shape[0]):
        key = keys[e]
        if key == key and (held < k or key > best[k - 1]):
            _insert(key, e, best, places, held)
            held = min(held + 1, k)


@part
def _keep_groups(keys, groups, top_groups, biased, best, places):
    """NaN in place of the keys of all but the best groups: none of them is chosen."""
    size = keys.shape[0] // groups
    of_group, kept = best[:groups], best[groups : groups + top_groups]
    for g in range(groups):
        first, second = _LOWEST, _LOWEST
        for e in range(g * size, (g + 1) * size):
            if keys[e] > first:
                first, second = keys[e], first
            elif keys[e] > second:
                second = keys[e]
        both = first + second if biased and size > 1 else first
        of_group[g] = both if both == both else first  # +inf counts beside -inf
    _largest(of_group, kept, places)
    for g in range(groups):
        chosen = False
        for i in range(top_groups):
            chosen = chosen or places[i] == g
        if not chosen:
            keys[g * size : (g + 1) * size] = np.float32(math.nan)


@part
def _task(task, thread, logits, form, bias, preset, mask, ids, weights, room, integers):
    score, groups, top_groups, renormalize, scale = form
    (T, E), k, padded = logits.shape, ids.shape[1], -(-logits.shape[1] // LANES) * LANES
    z, keys = room[thread, :padded], room[thread, padded : padded + E]
    best, places = room[thread, padded + E :], integers[thread]
    for t in range(task * TOKENS, min((task + 1) * TOKENS, T)):
        chosen, out = ids[t], weights[t]
        if mask.size > 0 and not mask[t]:
            chosen[:] = np.int32(-1)
            out[:] = np.float32(0)
            continue
        row = logits[t]
        for e in range(E):
            z[e] = wide(row[e])
        z[E:] = _LOWEST
        _scores(z, score)
        if preset.size > 0:
            for i in range(k):
                chosen[i] = preset[t, i] if 0 <= preset[t, i] < E else -1
        else:
            for e in range(E):
                key = z[e] + bias[e] if bias.size > 0 else z[e]
                keys[e] = key if key == key else _LOWEST
            if top_groups < groups:
                _keep_groups(keys, groups, top_groups, bias.size > 0, best, places)
            _largest(keys, best[:k], places)
            for i in range(k):
                chosen[i] = places[i]
        _weigh(z, chosen, out, score == TOPK_SOFTMAX, renormalize, scale)


@part
def _weigh(s, chosen, out, softmax, renormalize, scale):
    """The weights of the chosen experts, their scores added in slot order."""
    k, top = chosen.shape[0], _LOWEST
    for i in range(k):
        if chosen[i] >= 0:
            value = s[chosen[i]]
            top = value if value > top or value != value else top
    top = np.float32(0) if top == _LOWEST else top
    total = _TINY
    for i in range(k):
        value = np.float32(0)
        if chosen[i] >= 0:
            value = exp(s[chosen[i]] - top) if softmax else s[chosen[i]]
        out[i] = value
        total += value
    for i in range(k):
        value = out[i] / total if softmax or renormalize else out[i]
        out[i] = value * scale if chosen[i] >= 0 else np.float32(0)


@kernel
def _run(logits, form, bias, preset, mask, ids, weights, room, integers):
    args = (logits, form, bias, preset, mask, ids, weights, room, integers)
    for_each(_task, -(-logits.shape[0] // TOKENS), room.shape[0], args)


@route.impl(requires=floats("logits"))
def numba(
    logits: Tensor,
    k: int,
    *,
    score: str,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    preset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ids = the k largest of s + bias, weights = scale * s[ids] / (sum(s[ids]) + 1e-20)."""
    T, E = logits.shape
    ids, weights = torch.empty((T, k), dtype=torch.int32), torch.empty((T, k))
    used = threads(8 * T * E)
    form = (SCORES.index(score), groups, top_groups, renormalize, np.float32(scale))
    size = -(-E // LANES) * LANES + E + max(k, 2 * groups)
    _run(
        array(logits),
        form,
        given(bias, 1, torch.float32),
        given(preset, 2, torch.int64),
        given(mask, 1, torch.bool),
        array(ids),
        array(weights),
        scratch(used, size),
        np.empty((used, max(k, groups)), np.int64),
    )
    return ids, weights


@part
def _chosen(z, ids, dweights, form, p, ds):
    """ds = the gradient of the score (of the logit, for topk_softmax) in each slot; 0 if empty."""
    score, renormalize, scale = form
    K = ids.shape[0]
    _weigh(z, ids, p, score == TOPK_SOFTMAX, renormalize, _ONE)
    total, dot = _TINY, np.float32(0)
    for i in range(K):
        taken = ids[i] >= 0
        ds[i] = dweights[i] * scale if taken else np.float32(0)
        total += z[ids[i]] if taken else np.float32(0)
        dot += ds[i] * p[i] if taken else np.float32(0)
    for i in range(K):
        if score == TOPK_SOFTMAX:
            ds[i] = p[i] * (ds[i] - dot)
        elif renormalize:
            ds[i] = (ds[i] - dot) / total if ids[i] >= 0 else np.float32(0)


@part
def _backward_task(task, thread, dweights, logits, ids, form, dlogits, room):
    (T, E), K, score = logits.shape, ids.shape[1], form[0]
    padded = -(-E // LANES) * LANES
    z, full = room[thread, :padded], room[thread, padded : padded + E]
    p, ds = room[thread, padded + E : padded + E + K], room[thread, padded + E + K :]
    for t in range(task * TOKENS, min((task + 1) * TOKENS, T)):
        row, out, chosen, used = logits[t], dlogits[t], ids[t], False
        out[:] = np.float32(0)
        full[:] = np.float32(0)
        for i in range(K):
            used = used or chosen[i] >= 0
        if not used:
            continue
        if score == SOFTMAX:
            z[:E] = row
            z[E:] = _LOWEST
            _scores(z, score)
        else:  # no other score depends on the experts that were not chosen
            for i in range(K):
                if chosen[i] >= 0:
                    z[chosen[i]] = _score(row[chosen[i]], score)
        _chosen(z, chosen, dweights[t], form, p, ds)
        for i in range(K):
            if chosen[i] >= 0:
                full[chosen[i]] += ds[i]
        if score == SOFTMAX:
            dot = np.float32(0)
            for e in range(E):
                dot += full[e] * z[e]
            for e in range(E):
                out[e] = z[e] * (full[e] - dot)
        else:
            for i in range(K):
                e = chosen[i]
                if e >= 0:
                    out[e] = full[e] * _slope(row[e], z[e], score)


@part
def _score(z, score):
    """The score of one logit, of those that are an expert's own."""
    if score == SIGMOID:
        return sigmoid(z)
    return _sqrtsoftplus(z) if score == SQRTSOFTPLUS and z == z else z


@part
def _slope(z, s, score):
    """ds/dz."""
    if score == SIGMOID:
        return s * sigmoid(-z)
    if score == SQRTSOFTPLUS:
        return np.float32(0.5) * (s if z < _ROOT else sigmoid(z) / s)
    return _ONE


@kernel
def _run_backward(dweights, logits, ids, form, dlogits, room):
    args = (dweights, logits, ids, form, dlogits, room)
    for_each(_backward_task, -(-logits.shape[0] // TOKENS), room.shape[0], args)


def _numba_backward(
    dweights: Tensor,
    logits: Tensor,
    ids: Tensor,
    *,
    score: str,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """ds = scale/Z * (dw - sum_j dw_j s_j / Z), times ds/dz."""
    (T, E), K = logits.shape, ids.shape[1]
    dlogits, used = torch.empty(T, E), threads(8 * T * E)
    valid = torch.where((ids >= 0) & (ids < E), ids, -1)
    form = (SCORES.index(score), renormalize, np.float32(scale))
    _run_backward(
        array(dweights),
        array(logits.float()),
        array(valid.long()),
        form,
        array(dlogits),
        scratch(used, -(-E // LANES) * LANES + E + 2 * K),
    )
    return dlogits.to(logits.dtype)


_numba_backward.__name__ = "numba"
route_backward.impl(requires=floats("logits"))(_numba_backward)
