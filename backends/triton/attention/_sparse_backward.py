"""The gradients of sparse_attention: weights computed again, and no float atomics.

What a query gives to each row that it sees is written, a row each, and then summed by row in the
order of the queries. As many queries at a time as the workspace holds.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom import config

from .._language import dot, mixture, narrow
from .._launch import as_bytes, launch, programs, tile_for
from .._segments import by_target, sum_rows
from ..moe._gemm import power_of_two
from ..moe._weights import precision
from ._keys import gathered, kept_share


@jit
def _query(
    q,
    do,
    o,
    lse,
    dlse,
    sink,
    query,
    head,
    there,
    H,
    D: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
):
    """(x, its tail, do, lse, dlse, do . o, the share that the sink leaves) of some heads."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    x = gathered(q + query * H * D, head * D, there, 0, BV, D, 0, DTYPE)
    x_tail = x
    if BT > 0:
        x_tail = gathered(q + query * H * D, head * D, there, BV, BT, D, 0, DTYPE)
    dy = gathered(do + query * H * V, head * V, there, 0, BV, V, 0, DTYPE)
    out = gathered(o + query * H * V, head * V, there, 0, BV, V, 0, DTYPE)
    delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
    # Heads that are not there have no key.
    norm = tl.load(lse + query * H + head, mask=there, other=float("-inf"))
    dnorm = tl.load(dlse + query * H + head, mask=there, other=0.0)
    return x, x_tail, dy, norm, dnorm, delta, kept_share(norm, tl.load(sink + head).to(tl.float32))


@jit
def _weights(
    x,
    x_tail,
    dy,
    norm,
    dnorm,
    delta,
    share,
    tile,
    tail,
    seen,
    scale,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dS * scale, share * p) of a tile of keys, [heads, keys]; 0 where a key is not seen."""
    none = tl.zeros((x.shape[0], tile.shape[0]), tl.float32)
    logits = dot(x, tl.trans(tile), none, PRECISION)
    if BT > 0:
        logits = dot(x_tail, tl.trans(tail), logits, PRECISION)
    p = tl.exp(logits * scale - tl.where(norm == float("-inf"), float("inf"), norm)[:, None])
    ds = dot(dy, tl.trans(tile), none, PRECISION) - delta[:, None]
    ds = (ds * share[:, None] + dnorm[:, None]) * p * scale
    taken = seen[None, :] & (norm != float("-inf"))[:, None]
    return tl.where(taken, ds, 0.0), tl.where(taken, p * share[:, None], 0.0)


@jit
def _place(
    indices,
    visible,
    valid,
    query,
    place,
    S,
    N,
    L,
    M,
    window,
    kv_row,
    local_row,
    LISTED: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """(offset of the row, whether it is seen) of a query's places in its list, or window."""
    if LOCAL:
        j = M - S + query % S - window + 1 + place
        seen = (place < window) & (j >= 0)
        j = tl.minimum(tl.maximum(j, 0), M - 1)
        if valid is not None:
            seen = seen & (tl.load(valid + query // S * M + j) != 0)
        row = j.to(tl.int64) * local_row
    else:
        bound = N
        if visible is not None:
            bound = tl.minimum(tl.maximum(tl.load(visible + query), 0), N).to(tl.int32)
        j = tl.minimum(place, L - 1)
        if LISTED:
            j = tl.load(indices + query * L + j)
        seen = (place < L) & (j >= 0) & (j < bound)
        row = tl.where(seen, j, 0).to(tl.int64) * kv_row
    return row, seen


@jit
def _dq(
    q,
    do,
    o,
    lse,
    dlse,
    sink,
    kv,
    local,
    indices,
    visible,
    valid,
    dq,
    dsink,
    kv_batch,
    kv_row,
    local_batch,
    local_row,
    work,
    S,
    H,
    N,
    L,
    M,
    window,
    scale,
    LISTED: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dq = sum_j dS_j K_j of BH heads of a query, and its part of dsink.
    blocks = tl.cdiv(H, BH)
    for number in range(tl.program_id(0), work, tl.num_programs(0)):
        query = tl.cast(number // blocks, tl.int64)
        head = number % blocks * BH + tl.arange(0, BH)
        there = head < H
        head = tl.minimum(head, H - 1)
        x, x_tail, dy, norm, dnorm, delta, share = _query(
            q, do, o, lse, dlse, sink, query, head, there, H, D, V, BV, BT
        )
        s = tl.load(sink + head).to(tl.float32)
        lost = tl.where(s == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(norm - s)))
        tl.store(dsink + query * H + head, -lost * delta, mask=there)
        total = tl.zeros((BH, BV), tl.float32)
        rest = tl.zeros((BH, BT if BT > 0 else 1), tl.float32)
        for first in range(0, L, BK):
            row, seen = _place(
                indices,
                visible,
                valid,
                query,
                first + tl.arange(0, BK),
                S,
                N,
                L,
                M,
                window,
                kv_row,
                local_row,
                LISTED,
                False,
            )
            base = kv + query // S * kv_batch
            tile = gathered(base, row, seen, 0, BV, D, 0, q.dtype.element_ty)
            tail = tile
            if BT > 0:
                tail = gathered(base, row, seen, BV, BT, D, 0, q.dtype.element_ty)
            ds, _ = _weights(
                x, x_tail, dy, norm, dnorm, delta, share, tile, tail, seen, scale, BT, PRECISION
            )
            total = mixture(ds, tile, total, PRECISION)
            if BT > 0:
                rest = mixture(ds, tail, rest, PRECISION)
        for first in range(0, window, BK):
            row, seen = _place(
                indices,
                visible,
                valid,
                query,
                first + tl.arange(0, BK),
                S,
                N,
                L,
                M,
                window,
                kv_row,
                local_row,
                LISTED,
                True,
            )
            base = local + query // S * local_batch
            tile = gathered(base, row, seen, 0, BV, D, 0, q.dtype.element_ty)
            tail = tile
            if BT > 0:
                tail = gathered(base, row, seen, BV, BT, D, 0, q.dtype.element_ty)
            ds, _ = _weights(
                x, x_tail, dy, norm, dnorm, delta, share, tile, tail, seen, scale, BT, PRECISION
            )
            total = mixture(ds, tile, total, PRECISION)
            if BT > 0:
                rest = mixture(ds, tail, rest, PRECISION)
        _put(dq + query * H * D, head, there, 0, total, D, BV)
        if BT > 0:
            _put(dq + query * H * D, head, there, BV, rest, D, BT)


@jit
def _put(base, row, there, FIRST: tl.constexpr, tile, D: tl.constexpr, BLOCK: tl.constexpr):
    column = FIRST + tl.arange(0, BLOCK)
    at = base + row[:, None] * D + column[None, :]
    inside = there[:, None] & (column < D)[None, :]
    tl.store(at, narrow(tile, base.dtype.element_ty), mask=inside)


@jit
def _give(
    q,
    do,
    o,
    lse,
    dlse,
    sink,
    rows,
    indices,
    visible,
    valid,
    given,
    batch_stride,
    row_stride,
    at,
    count,
    first,
    width,
    offset,
    S,
    H,
    N,
    L,
    M,
    window,
    scale,
    LISTED: tl.constexpr,
    LOCAL: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # given[i, offset + place] = sum over heads of dS q + share p do, for `count` places of a query
    # first + i: BK rows at a time, the heads in blocks of BH.
    tiles = tl.cdiv(count, BK)
    for number in range(tl.program_id(0), at * tiles, tl.num_programs(0)):
        i = number // tiles
        query = tl.cast(first + i, tl.int64)
        place = number % tiles * BK + tl.arange(0, BK)
        row, seen = _place(
            indices,
            visible,
            valid,
            query,
            place,
            S,
            N,
            L,
            M,
            window,
            row_stride,
            row_stride,
            LISTED,
            LOCAL,
        )
        base = rows + query // S * batch_stride
        tile = gathered(base, row, seen, 0, BV, D, 0, q.dtype.element_ty)
        tail = tile
        if BT > 0:
            tail = gathered(base, row, seen, BV, BT, D, 0, q.dtype.element_ty)
        total = tl.zeros((BK, BV), tl.float32)
        rest = tl.zeros((BK, BT if BT > 0 else 1), tl.float32)
        for h in range(0, H, BH):
            head = h + tl.arange(0, BH)
            there = head < H
            head = tl.minimum(head, H - 1)
            x, x_tail, dy, norm, dnorm, delta, share = _query(
                q, do, o, lse, dlse, sink, query, head, there, H, D, V, BV, BT
            )
            ds, p = _weights(
                x, x_tail, dy, norm, dnorm, delta, share, tile, tail, seen, scale, BT, PRECISION
            )
            total = mixture(tl.trans(ds), x, total, PRECISION)
            total = mixture(tl.trans(p), dy, total, PRECISION)
            if BT > 0:
                rest = mixture(tl.trans(ds), x_tail, rest, PRECISION)
        into = given + (tl.cast(i, tl.int64) * width + offset) * D
        _put(into, place, place < count, 0, total, D, BV)
        if BT > 0:
            _put(into, place, place < count, BV, rest, D, BT)


def attend_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    kv: Tensor,
    indices: Tensor | None,
    visible: Tensor | None,
    local_kv: Tensor,
    sink: Tensor,
    local_valid: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dkv, dlocal_kv and dsink."""
    (B, S, H, D), N, M, V = q.shape, kv.shape[1], local_kv.shape[1], do.shape[3]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = torch.zeros((B * (N + M), D), dtype=torch.float32, device=q.device)
    dsink = torch.zeros((B * S, H), dtype=torch.float32, device=q.device)
    listed = indices is not None and N > 0
    length = indices.shape[2] if listed else N if indices is None else 0
    width = length + window
    if B * S * H and width:
        wide = power_of_two(V)
        tail = power_of_two(D - wide) if D > wide else 0
        entry = "sparse_attention." + ("f32" if q.dtype == torch.float32 else "backward")
        tile = tile_for(entry, q)
        more = dict(
            tile=tile,
            entry=entry,
            LISTED=listed,
            D=D,
            V=V,
            BV=wide,
            BT=tail,
            PRECISION=precision(q.dtype, q.dtype, q),
        )
        q, do, o, lse, dlse, sink = (a.contiguous() for a in (q, do, o, lse, dlse, sink))
        lists = (
            indices.contiguous() if listed else None,
            None if visible is None else visible.contiguous(),
            as_bytes(local_valid),
        )
        sizes = (S, H, N, length, M, window, scale)
        work = B * S * cdiv(H, tile["BH"])
        launch(
            _dq,
            programs(q, work, tile),
            q,
            do,
            o,
            lse,
            dlse,
            sink,
            kv,
            local_kv,
            *lists,
            dq,
            dsink,
            *kv.stride()[:2],
            *local_kv.stride()[:2],
            work,
            *sizes,
            **more,
        )
        target = _targets(
            indices if listed else None, visible, local_valid, B, S, N, M, length, window, q
        )
        at_once = max(1, min(B * S, config.workspace_bytes() // (4 * width * max(1, D))))
        given = torch.empty((at_once, width, D), dtype=torch.float32, device=q.device)
        for first in range(0, B * S, at_once):
            some = min(at_once, B * S - first)
            for rows, count, offset in ((kv, length, 0), (local_kv, window, length)):
                if count:
                    launch(
                        _give,
                        programs(q, some * cdiv(count, tile["BK"]), tile),
                        q,
                        do,
                        o,
                        lse,
                        dlse,
                        sink,
                        rows,
                        *lists,
                        given,
                        *rows.stride()[:2],
                        some,
                        count,
                        first,
                        width,
                        offset,
                        *sizes,
                        LOCAL=offset > 0 or rows is local_kv,
                        **more,
                    )
            order, starts = by_target(target[first : first + some], sums.shape[0])
            sum_rows(given.view(-1, 1, D), order, starts, sums, add=True)
    else:
        dq.zero_()
    dkv, dlocal = sums.split((B * N, B * M))
    return (
        dq,
        dkv.view(B, N, D).to(kv.dtype),
        dlocal.view(B, M, D).to(local_kv.dtype),
        dsink.sum(0).to(sink.dtype),
    )


def _targets(
    indices: Tensor | None,
    visible: Tensor | None,
    valid: Tensor | None,
    B: int,
    S: int,
    N: int,
    M: int,
    length: int,
    window: int,
    like: Tensor,
) -> Tensor:
    """[B*S, length + window]: the row of all entries, then all local tokens, that a query gives
    to at each place; -1 for none."""
    arange = lambda n: torch.arange(n, device=like.device)  # noqa: E731
    batch = arange(B)[:, None, None]
    j = arange(length).expand(B, S, length) if indices is None else indices.long()
    bound = N if visible is None else visible.clamp(max=N)[..., None]
    entries = torch.where((j >= 0) & (j < bound), batch * N + j, -1)
    near = (M - S - window + 1 + arange(S)[:, None] + arange(window)).expand(B, S, window)
    seen = near >= 0
    if valid is not None and window:
        seen = seen & valid[batch, near.clamp(min=0)]
    local = torch.where(seen, B * N + batch * M + near, -1)
    return torch.cat((entries, local), 2).flatten(0, 1)
