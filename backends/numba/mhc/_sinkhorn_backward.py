"""sinkhorn_backward, many tokens at once as in sinkhorn: every step is kept, then walked back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._arrays import array, scratch
from .._compile import kernel, part
from .._numbers import exp
from .._pool import for_each, threads

TOKENS = 16
"""Of a task, side by side: a vector of the widest instruction set, as all steps are kept."""
ZERO, ONE = np.float32(0), np.float32(1)


@part
def _softmax(m, total, R):
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
        total[:] = ZERO
        for k in range(R):
            row = m[i * R + k]
            for t in range(TOKENS):
                total[t] += row[t]
        for k in range(R):
            row = m[i * R + k]
            for t in range(TOKENS):
                row[t] /= total[t]


@part
def _forward(before, after, sums, first, step, R, eps):
    """after = R rows of before, from `first` on, by their sum plus eps, which goes into sums."""
    for t in range(TOKENS):
        sums[t] = eps
    for n in range(R):
        row = before[first + n * step]
        for t in range(TOKENS):
            sums[t] += row[t]
    for n in range(R):
        row, into = before[first + n * step], after[first + n * step]
        for t in range(TOKENS):
            into[t] = row[t] / sums[t]


@part
def _back(grad, result, sums, dot, first, step, R):
    """grad = (grad - sum(grad * result)) / sums, over R rows from `first` on."""
    dot[:] = ZERO
    for n in range(R):
        row, of = grad[first + n * step], result[first + n * step]
        for t in range(TOKENS):
            dot[t] += row[t] * of[t]
    for n in range(R):
        row = grad[first + n * step]
        for t in range(TOKENS):
            row[t] = (row[t] - dot[t]) / sums[t]


@part
def _task(task, thread, dcomb, logits, dlogits, iterations, eps, room):
    """One block of tokens: element (i, k) of all of them is row i*R + k of a matrix."""
    (T, R), first, work = logits.shape[:2], task * TOKENS, room[thread]
    N, steps = R * R, 2 * iterations - 1
    # softmax; softmax + eps and the result of each step; the sums of each; the gradient; a row.
    soft, grad, dot = work[:N], work[N : 2 * N], work[2 * N]
    results, sums = work[2 * N + 1 : 3 * N + 1 + steps * N], work[3 * N + 1 + steps * N :]
    for n in range(N):
        row, of, i, k = soft[n], grad[n], n // R, n % R
        for t in range(TOKENS):
            row[t] = logits[min(first + t, T - 1), i, k]
            of[t] = dcomb[min(first + t, T - 1), i, k]
    _softmax(soft, dot, R)
    for n in range(N):
        row, into = soft[n], results[n]
        for t in range(TOKENS):
            into[t] = row[t] + eps
    for s in range(steps):
        before, after = results[s * N : (s + 1) * N], results[(s + 1) * N : (s + 2) * N]
        for i in range(R):
            start, step = (i, R) if s % 2 == 0 else (i * R, 1)
            _forward(before, after, sums[s * R + i], start, step, R, eps)
    for s in range(steps - 1, -1, -1):
        after = results[(s + 1) * N : (s + 2) * N]
        for i in range(R):
            start, step = (i, R) if s % 2 == 0 else (i * R, 1)
            _back(grad, after, sums[s * R + i], dot, start, step, R)
    for i in range(R):
        dot[:] = ZERO
        for k in range(R):
            row, of = grad[i * R + k], soft[i * R + k]
            for t in range(TOKENS):
                dot[t] += row[t] * of[t]
        for k in range(R):
            row, of = grad[i * R + k], soft[i * R + k]
            for t in range(min(TOKENS, T - first)):
                dlogits[first + t, i, k] = of[t] * (row[t] - dot[t])


@kernel
def _run(dcomb, logits, dlogits, iterations, eps, room):
    tasks = -(-logits.shape[0] // TOKENS)
    args = (dcomb, logits, dlogits, iterations, np.float32(eps), room)
    for_each(_task, tasks, room.shape[0], args)


def numba(dcomb: Tensor, logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """The steps of `sinkhorn` as they were taken, backwards."""
    R, T, steps = logits.shape[-1], logits.shape[:-2].numel(), 2 * iterations - 1
    dlogits = torch.empty(logits.shape)
    if dlogits.numel():
        used = threads(3 * T * R * R * iterations)
        _run(
            array(dcomb.reshape(T, R, R)),
            array(logits.float().reshape(T, R, R)),
            array(dlogits.view(T, R, R)),
            iterations,
            eps,
            scratch(used, 3 * R * R + 1 + steps * (R * R + R), TOKENS),
        )
    return dlogits.to(logits.dtype)
