"""Sums of rows into numbered rows, the gradient of a gather: sorted, then added in order.

No float atomics: every row of the result is summed by one program, in the order of its sources.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from ._language import narrow
from ._launch import launch, programs, tile_for

# Elements of the rows' columns that a program takes.
WIDEST = 512


@jit
def _sum(
    source,
    order,
    starts,
    into,
    count,
    blocks,
    each,
    row,
    part,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    # into[r] = (into[r] +) the sum of source[order[i]], i = starts[r] .. starts[r+1] - 1: BR rows
    # at a time are added to BR partial sums. Bound by memory.
    for number in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        r = tl.cast(number // blocks, tl.int64)
        column = number % blocks * BD + tl.arange(0, BD)
        inside = column < D
        column = tl.minimum(column, D - 1)
        first, stop = tl.load(starts + r), tl.load(starts + r + 1)
        sums = tl.zeros((BR, BD), tl.float32)
        for i in range(first, stop, BR):
            place = i + tl.arange(0, BR)
            there = place < stop
            n = tl.load(order + tl.minimum(place, stop - 1)).to(tl.int64)
            at = source + ((n // each) * row + (n % each) * part)[:, None] + column[None, :]
            value = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
            sums += value.to(tl.float32)
        total = tl.sum(sums, 0)
        at = into + r * D + column
        if ADD:
            total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, narrow(total, into.dtype.element_ty), mask=inside)


def by_target(target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(order, starts): `order[starts[r]:starts[r + 1]]` are the places i with target[i] = r,
    ascending, for r < count. Targets below 0 and from count on belong to no r."""
    ascending, order = torch.sort(target.flatten(), stable=True)
    bounds = torch.arange(count + 1, dtype=ascending.dtype, device=target.device)
    return order, torch.searchsorted(ascending, bounds)


def sum_rows(
    source: Tensor, order: Tensor, starts: Tensor, into: Tensor, add: bool = False
) -> None:
    """into[r] = sum of the rows order[starts[r]:starts[r+1]] of source; add: on top of into.

    source [n,each,D] counts as n * each rows, and may be expanded over `each`; into [count,D].
    """
    count, D = into.shape
    if not into.numel():
        return
    if not source.numel():
        if not add:
            into.zero_()
        return
    source = source if source.stride(2) == 1 or D == 1 else source.contiguous()
    tile = tile_for("segments.rows", into)
    width = min(WIDEST, max(16, 1 << (D - 1).bit_length()))
    blocks = -(-D // width)
    launch(
        _sum,
        programs(into, count * blocks, tile),
        source,
        order,
        starts,
        into,
        count,
        blocks,
        source.shape[1],
        source.stride(0),
        source.stride(1),
        tile=tile,
        entry="segments.rows",
        D=D,
        ADD=add,
        BD=width,
    )
