"""Selections of whole pools of tokens: m tokens side by side, and the tail that fills none yet.

A query that sees n tokens chooses among n // m pools and always sees the last n mod m tokens. The
pools are counted over tokens alone: where slots of the sequence are padding, tokens are packed in
front (`Slots.packed`) and what is chosen is named by slot again.
"""

from __future__ import annotations

import torch
from torch import Tensor

import transom

from .padding import Slots


def seen(slots: Slots, batch: int, queries: int, device: torch.device) -> Tensor:
    """[B, S]: how many tokens each query sees, its own included."""
    if slots.valid is not None:
        return slots.packed(device)[1]
    count = torch.arange(slots.past + 1, slots.past + queries + 1, device=device)
    return count.expand(batch, -1)


def packed(slots: Slots, rows: Tensor) -> Tensor:
    """rows[B, N, D] of the slots, those of tokens in front."""
    if slots.valid is None:
        return rows
    order, _ = slots.packed(rows.device)
    return rows.gather(1, order[..., None].expand(-1, -1, rows.shape[2]))


def whole(rows: Tensor, m: int) -> Tensor:
    """[B, N, D] -> [B, N // m, m, D]: the rows of each pool; those that fill none are left out."""
    count = rows.shape[1] // m
    return rows[:, : count * m].unflatten(1, (count, m))


def best(q: Tensor, pools: Tensor, weights: Tensor, top: int, count: Tensor, m: int) -> Tensor:
    """[B, S, top]: the pools with the best scores of a query that sees `count` tokens, -1 after the
    last."""
    if not pools.shape[1]:
        return count.new_empty(*count.shape, 0, dtype=torch.int32)
    top = min(top, pools.shape[1])
    return transom.lightning_indexer(q, pools, weights, top, visible=count // m)


def with_tail(chosen: Tensor, count: Tensor, m: int) -> Tensor:
    """`chosen` and the pool that is not full yet, which stands behind all that are."""
    tail = torch.where(count % m > 0, count // m, -1)
    return torch.cat([chosen, tail[..., None].to(chosen.dtype)], dim=-1)


def tokens(chosen: Tensor, count: Tensor, m: int, slots: Slots) -> Tensor:
    """[B, S, L * m]: the slots of the tokens of the pools chosen[B, S, L] among the first `count`,
    -1 where there is none."""
    rows = chosen[..., None] * m + torch.arange(m, device=chosen.device, dtype=chosen.dtype)
    there = (chosen >= 0)[..., None] & (rows < count[..., None, None])
    rows = torch.where(there, rows, -1).flatten(2)
    return rows if slots.valid is None else slots.unpacked(rows)
