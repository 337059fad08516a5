"""Two small operators and deliberately wrong implementations of them: each must be caught by the
check that is named."""

from __future__ import annotations

import mmap
import time

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.requires import Requirement, at_most


@op(
    "x[T,D], weight[D] -> y[T,D]",
    dtypes="x: float; weight: x | f32; y: x",
    accumulate="D",
    batch="T",
    examples=[dict(T=5, D=16), dict(T=40, D=64)],
)
def meta_norm(x: Tensor, weight: Tensor, *, eps: float = 0.01) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight."""
    f = x.float()
    y = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps) * weight.float()
    return y.to(x.dtype).contiguous()


@meta_norm.reference
def _(x, weight, eps):
    mean = np.sum(x * x, -1, keepdims=True) / max(1, x.shape[-1])
    return x / np.sqrt(mean + eps) * weight


@op(
    "dy[T,D], x[T,D], weight[D] -> dx[T,D], dweight[D]",
    dtypes="dy, x: float; weight: x | f32; dx: x; dweight: weight",
    accumulate="D*T",
    examples=[dict(T=5, D=16)],
)
def meta_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, *, eps: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Gradients of meta_norm."""
    f, g = x.float(), dy.float()
    r = torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    gw = g * weight.float()
    dx = r * (gw - f * r * r * (gw * f).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous(), (g * f * r).sum(0).to(weight.dtype)


@meta_norm_backward.reference
def _(dy, x, weight, eps):
    r = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    gw = dy * weight
    return r * (gw - x * r * r * np.mean(gw * x, -1, keepdims=True)), np.sum(dy * x * r, 0)


@meta_norm.gradient(save="x weight")
def _(saved, dy):
    dx, dweight = meta_norm_backward(dy, saved.x, saved.weight, eps=saved.eps)
    return {"x": dx, "weight": dweight}


@op(
    "table[N,D], index[T,L] -> y[T,D], best[T]",
    dtypes="table: float; index: index; y: table; best: i32",
    accumulate="L",
    examples=[dict(T=6, L=4, N=9, D=8)],
)
def meta_gather(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """y[t] = sum of table[index[t,l]] over valid l (-1: none); best[t] = first l whose row has the
    largest first element."""
    valid = index >= 0
    if table.shape[0] == 0:
        return table.new_zeros(index.shape[0], table.shape[1]), index.new_full(
            (index.shape[0],), -1, dtype=torch.int32
        )
    rows = torch.where(valid[..., None], table[index.clamp(min=0).long()], 0).float()
    first = torch.where(valid, rows[..., 0] if table.shape[1] else 0.0, -torch.inf)
    best = _first_of_largest(first, valid)
    return rows.sum(1).to(table.dtype), best


def _first_of_largest(score: Tensor, valid: Tensor) -> Tensor:
    if score.shape[1] == 0:
        return score.new_full((score.shape[0],), -1, dtype=torch.int32)
    is_best = (score == score.amax(1, keepdim=True)) & valid
    place = (
        torch.arange(score.shape[1], dtype=torch.int32)
        .where(is_best, torch.iinfo(torch.int32).max)
        .amin(1)
    )
    return torch.where(valid.any(1), place, -1).to(torch.int32)


@meta_gather.reference
def _(table, index):
    y, best = np.zeros((len(index), table.shape[1])), np.full(len(index), -1)
    for t, row in enumerate(index):
        for place, j in enumerate(row):
            if j >= 0:
                y[t] += table[j]
                if best[t] < 0 or (table.shape[1] and table[j, 0] > table[row[best[t]], 0]):
                    best[t] = place
    return y, best


@meta_gather.check_values
def _(index, N):
    if index.numel() and int(index.max()) >= N:
        return f"index holds {int(index.max())}; expected below N = {N}"
    return None


@meta_gather.sample
def _(rng, dims):
    n, d = dims["N"], dims["D"]
    table = rng.standard_normal((n, d))
    index = rng.integers(-1, n, (dims["T"], dims["L"]))
    if n:
        table[n - 1] = np.nan  # behind every sentinel stands a row that must never be read
        index[index == n - 1] = -1
    if n > 2:
        table[1] = table[0]  # ties
    return {"table": table, "index": index}


# Wrong on purpose ------------------------------------------------------------------------------

NORM = meta_norm.impls["composite"].function
GATHER = meta_gather.impls["composite"].function


def off_by_one_row(x, weight, *, eps=0.01):
    return torch.roll(NORM(x, weight, eps=eps), 1, 0)


def ignores_eps(x, weight, *, eps=0.01):
    return NORM(x, weight, eps=0.0)


def ignores_strides(x, weight, *, eps=0.01):
    flat = torch.as_strided(x, x.shape, (x.shape[1], 1))
    return NORM(flat, weight, eps=eps)


def ignores_storage_offset(x, weight, *, eps=0.01):
    start = torch.as_strided(x, x.shape, x.stride(), max(0, x.storage_offset() - 1))
    return NORM(start, weight, eps=eps)


def accumulates_in_half(x, weight, *, eps=0.01):
    mean = (
        x.half().square().cumsum(-1)[..., -1:] / x.shape[-1]
        if x.shape[-1]
        else x.new_zeros(*x.shape[:-1], 1)
    )
    return (x.float() * torch.rsqrt(mean.float() + eps) * weight.float()).to(x.dtype)


def truncates(x, weight, *, eps=0.01):
    y = NORM(x.float(), weight, eps=eps)
    if x.dtype != torch.bfloat16:
        return y.to(x.dtype)
    return (y.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def writes_past_the_end(x, weight, *, eps=0.01):
    y = NORM(x, weight, eps=eps)
    end = (
        x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    )
    if x.numel():
        torch.as_strided(x, (1,), (1,), end).fill_(0)
    return y


def scribbles_on_its_input(x, weight, *, eps=0.01):
    y = NORM(x, weight, eps=eps)
    x.mul_(2)
    return y


def returns_its_input(x, weight, *, eps=0.01):
    return x.copy_(NORM(x, weight, eps=eps))


def returns_another_dtype(x, weight, *, eps=0.01):
    return NORM(x, weight, eps=eps).float()


def returns_a_strided_tensor(x, weight, *, eps=0.01):
    return NORM(x, weight, eps=eps).t().contiguous().t()


def is_not_repeatable(x, weight, *, eps=0.01):
    return NORM(x, weight, eps=eps) * (1 + 1e-7 * torch.randint(0, 4, (1,)))


def loses_the_last_column(x, weight, *, eps=0.01):
    y = NORM(x, weight, eps=eps)
    y[:, y.shape[1] // 16 * 16 :] = 0
    return y


def fails_on_one_row(x, weight, *, eps=0.01):
    return NORM(x, weight, eps=eps) if x.shape[0] != 1 else x.new_empty(2, x.shape[1])


def multiplies_sentinels_by_zero(table, index):
    valid = (index >= 0).float()
    rows = (
        table[index.long()].float()
        if table.shape[0]
        else index.new_zeros(*index.shape, table.shape[1]).float()
    )
    return (rows * valid[..., None]).sum(1).to(table.dtype), GATHER(table, index)[1]


def counts_sentinels_as_row_zero(table, index):
    return GATHER(table, index.clamp(min=0))


def takes_the_last_of_ties(table, index):
    y, _ = GATHER(table, index)
    _, best = GATHER(table, index.flip(1))
    return y, torch.where(best < 0, best, index.shape[1] - 1 - best)


def sums_in_another_dtype(table, index):
    y, best = GATHER(table, index)
    return y, best.long()


def gradient_without_the_mean(dy, x, weight, *, eps=0.01):
    f, g = x.float(), dy.float()
    r = torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    return (r * g * weight.float()).to(x.dtype), (g * f * r).sum(0).to(weight.dtype)


SILENT = Requirement("silent", ("D",), lambda f: " " if f.dims["D"] > 8 else None)
LIMIT = at_most("D", 8)


def crashes_on_what_it_accepts(x, weight, *, eps=0.01):
    if x.shape[-1] > 8:
        raise RuntimeError("a device error")
    return NORM(x, weight, eps=eps)


_shared = {}


def works_in_one_buffer_for_all(x, weight, *, eps=0.01):
    mine = _shared[0] = NORM(x, weight, eps=eps)
    time.sleep(0.002)  # another thread comes between
    if mine is not _shared[0]:
        mine.zero_()
    return mine


def keeps_every_result(x, weight, *, eps=0.01):
    pages = mmap.mmap(-1, 1 << 16)  # its own: none that the process has left over
    pages[:] = bytes(1 << 16)
    _shared.setdefault("kept", []).append(pages)
    return NORM(x, weight, eps=eps)


def refuses_one_row_less_than_it_states(x, weight, *, eps=0.01):
    if x.shape[-1] == 9:
        raise RuntimeError("no such tile")
    return NORM(x, weight, eps=eps)
