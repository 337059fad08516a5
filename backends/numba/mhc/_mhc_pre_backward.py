"""mhc_pre_backward and mhc_head_backward: two passes over the streams, and between them what is one
number a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ._mixes_backward import gradients, products
from ._sinkhorn_backward import numba as sinkhorn_backward


def pre_backward(
    dh: Tensor,
    dpost: Tensor,
    dcomb: Tensor,
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
    post_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dfn, dscale, dbase; mixes and Sinkhorn steps are computed again."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    flat, dhs = x.reshape(T, R, D).contiguous(), dh.reshape(T, D)
    fn, base, parts = fn.float(), base.float(), (R, R, R * R)
    by = torch.cat([one.expand(n) for one, n in zip(scale.float().split(1), parts, strict=True)])
    u, squares, dots = products(flat, fn, dhs)
    r = torch.rsqrt(squares / max(1, R * D) + rms_eps)
    a = u * r * by + base
    gates = torch.sigmoid(a[:, : 2 * R])
    slope = gates * (1 - gates)
    logits = a[:, 2 * R :].unflatten(1, (R, R))
    below = sinkhorn_backward(dcomb.reshape(T, R, R), logits, iterations=iterations, eps=eps)
    post = dpost.reshape(T, R) * post_scale
    da = torch.cat((dots * slope[:, :R], post * slope[:, R:], below.flatten(1)), 1)
    dx, dfn, dscale, dbase = gradients(da, flat, dhs, fn, by, u, r, gates[:, :R] + eps)
    return dx.view(x.shape), dfn, torch.stack([p.sum() for p in dscale.split(parts)]), dbase


def head_backward(
    dh: Tensor, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dfn, dscale, dbase, as of mhc_pre with the gates of the streams alone."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    flat, dhs = x.reshape(T, R, D).contiguous(), dh.reshape(T, D)
    fn, scale = fn.float(), scale.float()
    u, squares, dots = products(flat, fn, dhs)
    r = torch.rsqrt(squares / max(1, R * D) + rms_eps)
    gate = torch.sigmoid(u * r * scale + base.float())
    da = dots * gate * (1 - gate)
    dx, dfn, dscale, dbase = gradients(da, flat, dhs, fn, scale, u, r, gate + eps)
    return dx.view(x.shape), dfn, dscale.sum(0, keepdim=True), dbase


pre_backward.__name__ = head_backward.__name__ = "numba"
