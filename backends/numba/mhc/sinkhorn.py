"""sinkhorn, many tokens at once: each step is vector code over tokens, in the first-level cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.kernels.mhc.sinkhorn import sinkhorn, sinkhorn_backward

from .._arrays import array, floats, scratch
from .._compile import kernel, part
from .._numbers import exp, wide
from .._pool import for_each, threads
from ._sinkhorn_backward import numba as backward

TOKENS = 32
"""Of a task, side by side: two vectors of the widest instruction set."""
SAFE = np.float32(2.0**-120)
"""An eps from which on no sum has an infinite reciprocal."""


@part
def _task(task, thread, logits, comb, iterations, eps, room):
    """One block of tokens: element (i, k) of all of them is row i*R + k of m."""
    T, R = logits.shape[:2]
    m, total = room[thread, : R * R], room[thread, R * R]
    first = task * TOKENS
    for n in range(R * R):
        row, i, k = m[n], n // R, n % R
        for t in range(TOKENS):
            row[t] = wide(logits[min(first + t, T - 1), i, k])
    for i in range(R):
        total[:] = m[i * R]
        for k in range(1, R):
            row = m[i * R + k]
            for t in range(TOKENS):
                total[t] = max(total[t], row[t])
        for k in range(R):
            row = m[i * R + k]
            for t in range(TOKENS):
                row[t] = exp(row[t] - total[t])
        _divide(m, total, i * R, 1, R, np.float32(0))
        for k in range(R):
            row = m[i * R + k]
            for t in range(TOKENS):
                row[t] += eps
    for step in range(iterations):
        for i in range(R if step else 0):
            _divide(m, total, i * R, 1, R, eps)
        for k in range(R):
            _divide(m, total, k, R, R, eps)
    for n in range(R * R):
        row, i, k = m[n], n // R, n % R
        for t in range(min(TOKENS, T - first)):
            comb[first + t, i, k] = row[t]


@part
def _divide(m, total, first, step, R, eps):
    """R rows of m, from `first` on, by their sum plus eps."""
    for t in range(TOKENS):
        total[t] = eps
    for n in range(R):
        row = m[first + n * step]
        for t in range(TOKENS):
            total[t] += row[t]
    if eps >= SAFE:
        for t in range(TOKENS):
            total[t] = np.float32(1) / total[t]
    for n in range(R):
        row = m[first + n * step]
        if eps >= SAFE:
            for t in range(TOKENS):
                row[t] *= total[t]
        else:
            for t in range(TOKENS):
                row[t] /= total[t]


@kernel
def _run(logits, comb, iterations, eps, room):
    tasks = -(-logits.shape[0] // TOKENS)
    for_each(_task, tasks, room.shape[0], (logits, comb, iterations, np.float32(eps), room))


@sinkhorn.impl(requires=floats("logits"))
def numba(logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """softmax + eps, then columns and rows in turn, divided by their sums + eps."""
    R, T = logits.shape[-1], logits.shape[:-2].numel()
    comb = torch.empty(logits.shape, dtype=torch.float32)
    if comb.numel():
        used = threads(T * R * R * iterations)
        _run(
            array(logits.reshape(T, R, R)),
            array(comb.view(T, R, R)),
            iterations,
            eps,
            scratch(used, R * R + 1, TOKENS),
        )
    return comb


sinkhorn_backward.impl(requires=floats("logits"))(backward)
