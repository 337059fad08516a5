"""Sinkhorn normalisation: logits to a nearly doubly stochastic matrix, by a number of steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.dtypes import accumulator
from transom.kernels import _bounds as bounds

_EXAMPLES = [
    dict(T=(3,), R=4, iterations=3, eps=1e-6),
    dict(T=(4096,), R=4, iterations=20, eps=1e-6),
    dict(T=(64,), R=4, iterations=20, eps=1e-6),
]


@op(
    "logits[*T,R,R] -> comb[*T,R,R]",
    dtypes="logits: float; comb: acc(logits)",
    flops="T*R*R*(5 + 4*iterations)",
    accumulate="R*iterations",
    batch="*T",
    examples=_EXAMPLES,
)
def sinkhorn(logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """comb = softmax(logits, -1) + eps, columns, then rows and columns in turn, divided by sums.

    Every division is by the sum plus eps.

    logits      square matrices; leading dimensions are free.
    iterations  column steps; 1 to 1000.  The softmax is the first row step, so there are
                iterations-1 others: the result ends on columns, whose sums are 1 to about R*eps;
                rows only as far as the steps have converged.
    eps         added to the softmax and to every sum; >= 0.

    Returns float32 (float64 for float64 logits).  Raises ValueError for other iterations and
    for eps < 0.

    *Source:* DeepSeek-V4, arXiv 2606.19348 (its released code; mHC, arXiv 2512.24880, eq. 9 has
    neither softmax nor eps).
    """
    R, T = logits.shape[-1], logits.shape[:-2].numel()
    dtype = accumulator(logits.dtype)
    comb = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    flat, out = logits.reshape(T, R, R), comb.view(T, R, R)
    for rows in blocks(T, 4 * R * R * dtype.itemsize):
        out[rows] = normalised(flat[rows].to(dtype), iterations, eps)
    return comb


@op(
    "dcomb[*T,R,R], logits[*T,R,R] -> dlogits[*T,R,R]",
    dtypes="dcomb: acc(logits); logits: float; dlogits: logits",
    flops="T*R*R*(10 + 10*iterations)",
    accumulate="2*R*iterations",
    examples=_EXAMPLES,
)
def sinkhorn_backward(dcomb: Tensor, logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """Gradient of `sinkhorn` with respect to its logits, of the steps as they were taken.

    The steps are computed again and walked backwards: for y = x / (sum(x) + eps),
    dx = (dy - sum(dy*y)) / (sum(x) + eps) over the same axis.  A fixed point is not assumed: twenty
    steps have not converged for extreme logits.

    *Source:* derived from the formula of `sinkhorn`.
    """
    R, T = logits.shape[-1], logits.shape[:-2].numel()
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    flat, grads, out = logits.reshape(T, R, R), dcomb.reshape(T, R, R), dlogits.view(T, R, R)
    for rows in blocks(T, (2 * iterations + 6) * R * R * dcomb.dtype.itemsize):
        taken = flat[rows].to(dcomb.dtype)
        out[rows] = normalised_backward(grads[rows], taken, iterations, eps).to(out.dtype)
    return dlogits


def normalised(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The steps of `sinkhorn` on [t,R,R], in the dtype of logits."""
    m = torch.softmax(logits, -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def normalised_backward(dcomb: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The steps of `sinkhorn_backward` on [t,R,R]."""
    soft = torch.softmax(logits, -1)
    axes = (-2,) + (-1, -2) * (iterations - 1)
    m, steps = soft + eps, []
    for axis in axes:
        total = m.sum(axis, keepdim=True) + eps
        m = m / total
        steps.append((axis, m, total))
    grad = dcomb
    for axis, result, total in reversed(steps):
        grad = (grad - (grad * result).sum(axis, keepdim=True)) / total
    return soft * (grad - (grad * soft).sum(-1, keepdim=True))


def blocks(count: int, bytes_each: int) -> Iterator[slice]:
    """Slices of 0..count whose items, `bytes_each` apiece, fit the workspace."""
    step = max(1, config.workspace_bytes() // max(1, bytes_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@sinkhorn.gradient(save="logits")
def _(saved, dcomb):
    dlogits = sinkhorn_backward(dcomb, saved.logits, iterations=saved.iterations, eps=saved.eps)
    return {"logits": dlogits}


def sinkhorn_reference(logits, iterations, eps):
    """The steps, in NumPy."""
    m = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    m = m / m.sum(-1, keepdims=True) + eps
    m = m / (m.sum(-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdims=True) + eps)
        m = m / (m.sum(-2, keepdims=True) + eps)
    return m


def sinkhorn_backward_reference(dcomb, logits, iterations, eps):
    """The steps backwards, in NumPy; m is undone by multiplication with the sums that it was
    divided by."""
    soft = np.exp(logits - logits.max(-1, keepdims=True, initial=-np.inf))
    soft = soft / soft.sum(-1, keepdims=True)
    m, sums = soft + eps, []
    for step in range(2 * iterations - 1):
        sums.append(m.sum(-2 if step % 2 == 0 else -1, keepdims=True) + eps)
        m = m / sums[-1]
    grad = dcomb
    for step in reversed(range(2 * iterations - 1)):
        axis = -2 if step % 2 == 0 else -1
        m = m * sums[step]
        grad = grad / sums[step] - (grad * m).sum(axis, keepdims=True) / sums[step] ** 2
    return soft * (grad - (grad * soft).sum(-1, keepdims=True))


sinkhorn.reference(sinkhorn_reference)
sinkhorn_backward.reference(sinkhorn_backward_reference)


def _rules(iterations: int, eps: float) -> str | None:
    if iterations < 1:
        return f"iterations is {iterations}; must be >= 1"
    if text := bounds.above(bounds.ITERATIONS, iterations=iterations):
        return text
    if not eps >= 0:
        return f"eps is {eps}; must be >= 0"
    return None


for _op in (sinkhorn, sinkhorn_backward):
    _op.check(_rules)
