"""Slots sorted by expert, on the device: a counting sort whose order never depends on timing.

Slots are cut into chunks. The first kernel counts every chunk's slots of each expert; the second
adds what stands before a chunk; the third adds up experts; the last puts each slot in its place, in
order. No atomics, no scan, nothing read by the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from .._launch import launch, programs
from ._gemm import Groups, power_of_two

CHUNK = 256
"""Slots that one program counts and places."""
AT_ONCE = 16
"""Of them, at a time: as a matrix with all experts they fit in registers."""


@jit
def _expert(ids, at, slots, E):
    """The experts of some slots: E for an empty one, beyond all for one that there is not."""
    id = tl.load(ids + at, mask=at < slots, other=-1).to(tl.int32)
    e = tl.where((id >= 0) & (id < E), id, E)
    return tl.where(at < slots, e, E + 1)


@jit
def _count(ids, counts, slots, E, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    for chunk in range(tl.program_id(0), tl.cdiv(slots, CHUNK), tl.num_programs(0)):
        count = tl.zeros((GROUPS,), tl.int32)
        for i in range(0, CHUNK, AT_ONCE):
            e = _expert(ids, chunk * CHUNK + i + tl.arange(0, AT_ONCE), slots, E)
            count += tl.sum((e[:, None] == group[None, :]).to(tl.int32), 0)
        tl.store(counts + chunk * (E + 1) + group, count, mask=group <= E)


@jit
def _before(counts, totals, chunks, E, BLOCK: tl.constexpr):
    # counts[chunk] becomes the sum of the chunks before it; some experts a program.
    for first in range(tl.program_id(0) * BLOCK, E + 1, tl.num_programs(0) * BLOCK):
        group = first + tl.arange(0, BLOCK)
        inside = group <= E
        total = tl.zeros((BLOCK,), tl.int32)
        for chunk in range(0, chunks):
            at = counts + chunk * (E + 1) + group
            count = tl.load(at, mask=inside, other=0)
            tl.store(at, total, mask=inside)
            total += count
        tl.store(totals + group, total, mask=inside)


@jit
def _ends(totals, offsets, E, GROUPS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    end = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, E, 16):
        other = first + tl.arange(0, 16)
        total = tl.load(totals + other, mask=other < E, other=0)
        end += tl.sum(tl.where(other[None, :] <= group[:, None], total[None, :], 0), 1)
    tl.store(offsets + group, end, mask=group < E)


@jit
def _place(
    ids,
    counts,
    offsets,
    order,
    slots,
    E,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group, i, j = tl.arange(0, GROUPS), tl.arange(0, AT_ONCE), tl.arange(0, AT_ONCE)
    start = tl.load(offsets + tl.minimum(tl.maximum(group - 1, 0), E - 1))
    start = tl.where(group == 0, 0, start)
    for chunk in range(tl.program_id(0), tl.cdiv(slots, CHUNK), tl.num_programs(0)):
        base = start + tl.load(counts + chunk * (E + 1) + tl.minimum(group, E))
        for first in range(0, CHUNK, AT_ONCE):
            at = chunk * CHUNK + first + i
            e = _expert(ids, at, slots, E)
            other = _expert(ids, chunk * CHUNK + first + j, slots, E)
            mine = e[:, None] == group[None, :]
            earlier = (e[:, None] == other[None, :]) & (j[None, :] < i[:, None])
            place = tl.sum(tl.where(mine, base[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
            # Within bounds whatever stands in the ids, so that no store goes elsewhere.
            place = tl.minimum(tl.maximum(place, 0), slots - 1)
            tl.store(order + place, at, mask=at < slots)
            base += tl.sum(mine.to(tl.int32), 0)


class Sorted(NamedTuple):
    """Slots sorted by expert, stably; empty ones behind all experts."""

    order: Tensor
    """[slots], int32: the number t*K + s of each."""
    groups: Groups


def sort(ids: Tensor, E: int) -> Sorted:
    """Sort ids [T, K] by expert; what lies outside 0..E-1 is an empty slot."""
    slots, device = ids.numel(), ids.device
    chunks = -(-slots // CHUNK)
    counts = torch.empty(chunks, E + 1, dtype=torch.int32, device=device)
    totals = torch.empty(E + 1, dtype=torch.int32, device=device)
    offsets = torch.empty(E, dtype=torch.int32, device=device)
    order = torch.empty(slots, dtype=torch.int32, device=device)
    ids = ids.contiguous()
    sizes = {"CHUNK": CHUNK, "AT_ONCE": AT_ONCE, "GROUPS": power_of_two(E + 2)}
    grid = programs(ids, chunks)
    launch(_count, grid, ids, counts, slots, E, **sizes)
    launch(_before, programs(ids, -(-(E + 1) // 16)), counts, totals, chunks, E, BLOCK=16)
    launch(_ends, (1,), totals, offsets, E, GROUPS=power_of_two(E))
    launch(_place, grid, ids, counts, offsets, order, slots, E, **sizes)
    return Sorted(order, Groups.of(offsets, slots))
