"""sinkhorn: whole matrices in registers; the gradient computes the steps again, it stores none."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.mhc.sinkhorn import sinkhorn, sinkhorn_backward
from transom.requires import at_most

from .._language import narrow
from .._launch import launch, programs, tile_for
from .._offer import floats, offer

LARGEST = 64
"""Rows of a matrix, that some of them fit the registers."""


@jit
def softmax(logits, inside):
    """exp(logits) by its sum over the last axis; 0 where not inside."""
    logits = tl.where(inside, logits, float("-inf"))
    top = tl.max(logits, 2)[:, :, None]
    # A row of padding has no largest.
    weights = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 2)[:, :, None]
    return weights / tl.where(total == 0, 1.0, total)


@jit
def divided(m, inside, step, eps):
    """(m / total, total) of a step: by the sums + eps of columns in even steps, of rows in odd."""
    total = tl.where(step % 2 == 0, tl.sum(m, 1)[:, None, :], tl.sum(m, 2)[:, :, None]) + eps
    total = tl.where(inside, total, 1.0)
    return m / total, total


@jit
def normalised(logits, inside, iterations, eps):
    """The steps of sinkhorn on [t,R,R]; 0 where not inside."""
    m = tl.where(inside, softmax(logits, inside) + eps, 0.0)
    for step in range(0, 2 * iterations - 1):
        m, _ = divided(m, inside, step, eps)
    return m


@jit
def normalised_backward(grad, logits, inside, iterations, eps):
    """The gradient towards the logits. A step backwards needs the sums that it divided by: they are
    computed again from the start, on matrices that never leave the registers."""
    soft = softmax(logits, inside)
    steps = 2 * iterations - 1
    for back in range(0, steps):
        last = steps - 1 - back
        m = tl.where(inside, soft + eps, 0.0)
        for step in range(0, last):
            m, _ = divided(m, inside, step, eps)
        m, total = divided(m, inside, last, eps)
        product = grad * m
        along = tl.where(
            last % 2 == 0, tl.sum(product, 1)[:, None, :], tl.sum(product, 2)[:, :, None]
        )
        grad = tl.where(inside, (grad - along) / total, 0.0)
    return soft * (grad - tl.sum(grad * soft, 2)[:, :, None])


@jit
def _matrices(t, T, R: tl.constexpr, BR: tl.constexpr):
    """(offsets, inside) of the matrices of tokens t, [t, BR, BR]."""
    i, k = tl.arange(0, BR)[None, :, None], tl.arange(0, BR)[None, None, :]
    t = t[:, None, None]
    return (t.to(tl.int64) * R + i) * R + k, (t < T) & (i < R) & (k < R)


@jit
def _forward(logits, comb, T, iterations, eps, R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr):
    for number in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        at, inside = _matrices(number * BT + tl.arange(0, BT), T, R, BR)
        m = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(comb + at, normalised(m, inside, iterations, eps), mask=inside)


@jit
def _backward(
    dcomb, logits, dlogits, T, iterations, eps, R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr
):
    for number in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        at, inside = _matrices(number * BT + tl.arange(0, BT), T, R, BR)
        m = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dcomb + at, mask=inside, other=0.0)
        grad = normalised_backward(grad, m, inside, iterations, eps)
        tl.store(dlogits + at, narrow(grad, dlogits.dtype.element_ty), mask=inside)


def side(R: int) -> int:
    """The side of the tile that holds R x R."""
    return 1 << (R - 1).bit_length()


def _launch(kernel, like: Tensor, *tensors: Tensor, iterations: int, eps: float) -> None:
    R, T = like.shape[-1], like.shape[:-2].numel()
    if not like.numel():
        return
    tile = tile_for("sinkhorn.matrices", like)
    BT = max(1, tile["ELEMENTS"] // side(R) ** 2)
    launch(
        kernel,
        programs(like, cdiv(T, BT), tile),
        *(t.contiguous() for t in tensors),
        T,
        iterations,
        eps,
        tile=tile,
        entry="sinkhorn.matrices",
        R=R,
        BR=side(R),
        BT=BT,
    )


@offer(sinkhorn, *floats("logits"), at_most("R", LARGEST))
def forward(logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """softmax + eps, then columns and rows in turn, divided by their sums + eps."""
    comb = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _launch(_forward, logits, logits, comb, iterations=iterations, eps=eps)
    return comb


@offer(sinkhorn_backward, *floats("logits"), at_most("R", LARGEST))
def backward(dcomb: Tensor, logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    """The steps computed again and walked backwards."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(_backward, logits, dcomb, logits, dlogits, iterations=iterations, eps=eps)
    return dlogits
