"""sparse_attention: the heads of a query are the rows of a tile, since they share their keys."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.attention.sparse_attention import sparse_attention, sparse_attention_backward
from transom.requires import at_most, last_dim_contiguous

from .._language import dot, mixture, narrow
from .._launch import as_bytes, launch, programs, tile_for
from .._offer import floats, offer
from ..moe._gemm import power_of_two
from ..moe._weights import precision
from ._keys import LN2, LOG2E, gathered, kept_share, softmax_step
from ._sparse_backward import attend_backward

FEWEST = 128
"""Keys that a part has at least, where a query's keys are shared out."""


@jit
def _meet(
    x,
    x_tail,
    rows,
    row,
    seen,
    largest,
    mass,
    sum,
    scale,
    D: tl.constexpr,
    BYTES: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys, of which those `seen` take part."""
    tile = gathered(rows, row, seen, 0, BV, D, BYTES, x.dtype)
    logits = tl.zeros((x.shape[0], tile.shape[0]), tl.float32)
    logits = dot(x, tl.trans(tile), logits, PRECISION)
    if BT > 0:
        tail = gathered(rows, row, seen, BV, BT, D, BYTES, x.dtype)
        logits = dot(x_tail, tl.trans(tail), logits, PRECISION)
    logits = tl.where(seen[None, :], logits * scale, float("-inf"))
    weights, earlier, largest, mass = softmax_step(logits, largest, mass)
    return largest, mass, mixture(weights, tile, sum * earlier[:, None], PRECISION)


@jit
def _forward(
    q,
    kv,
    indices,
    visible,
    local,
    valid,
    sink,
    o,
    lse,
    kv_batch,
    kv_row,
    local_batch,
    local_row,
    work,
    splits,
    S,
    H,
    N,
    L,
    M,
    window,
    scale,
    LISTED: tl.constexpr,
    BYTES: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # BH heads of a query at a time and, where splits > 1, one part of its L entries and window.
    # Queries and sums stay on the chip; rows come in tiles of BK, whose first BV columns serve the
    # logits and the sums, BT more only the logits. Bound by the tensor cores where BH heads are
    # many, else by the rows' bytes.
    blocks = tl.cdiv(H, BH)
    for number in range(tl.program_id(0), work, tl.num_programs(0)):
        split = number % splits
        query = tl.cast(number // splits // blocks, tl.int64)
        head = number // splits % blocks * BH + tl.arange(0, BH)
        there = head < H
        head = tl.minimum(head, H - 1)
        batch, s = query // S, (query % S).to(tl.int32)
        DTYPE: tl.constexpr = q.dtype.element_ty
        x = gathered(q + query * H * D, head * D, there, 0, BV, D, 0, DTYPE)
        x_tail = x
        if BT > 0:
            x_tail = gathered(q + query * H * D, head * D, there, BV, BT, D, 0, DTYPE)
        if BYTES > 0 and DTYPE == tl.float16:
            # What a cache row holds fits into bfloat16 and float32, not into float16.
            x, x_tail = x.to(tl.float32), x_tail.to(tl.float32)
        largest = tl.full((BH,), float("-inf"), tl.float32)
        mass = tl.zeros((BH,), tl.float32)
        sum = tl.zeros((BH, BV), tl.float32)

        bound = N
        if visible is not None:
            bound = tl.minimum(tl.maximum(tl.load(visible + query), 0), N).to(tl.int32)
        part = (L + splits * BK - 1) // (splits * BK) * BK  # also where L and splits are constants
        stop = tl.minimum((split + 1) * part, L)
        if not LISTED:
            stop = tl.minimum(stop, bound)
        for first in range(split * part, stop, BK):
            place = first + tl.arange(0, BK)
            seen = place < stop
            j = tl.minimum(place, L - 1)
            if LISTED:
                j = tl.load(indices + query * L + j)
                seen = seen & (j >= 0) & (j < bound)
            row = tl.where(seen, j, 0).to(tl.int64) * kv_row
            largest, mass, sum = _meet(
                x,
                x_tail,
                kv + batch * kv_batch,
                row,
                seen,
                largest,
                mass,
                sum,
                scale,
                D,
                BYTES,
                BV,
                BT,
                PRECISION,
            )
        if local is not None:
            position = M - S + s
            start = tl.maximum(0, position - window + 1)
            part = tl.cdiv(tl.cdiv(position + 1 - start, splits), BK) * BK
            stop = tl.minimum(start + (split + 1) * part, position + 1)
            for first in range(start + split * part, stop, BK):
                place = first + tl.arange(0, BK)
                seen = place < stop
                j = tl.minimum(place, position).to(tl.int64)
                if valid is not None:
                    seen = seen & (tl.load(valid + batch * M + j) != 0)
                largest, mass, sum = _meet(
                    x,
                    x_tail,
                    local + batch * local_batch,
                    j * local_row,
                    seen,
                    largest,
                    mass,
                    sum,
                    scale,
                    D,
                    0,
                    BV,
                    BT,
                    PRECISION,
                )

        norm = largest * LN2 + tl.log(mass)
        out = sum / tl.where(mass == 0, 1.0, mass)[:, None]
        if sink is not None:
            out *= kept_share(norm, tl.load(sink + head).to(tl.float32))[:, None]
        at = (query * splits + split) * H + head
        tl.store(lse + at, norm, mask=there)
        column = tl.arange(0, BV)
        into = o + at[:, None] * V + column[None, :]
        tl.store(into, narrow(out, o.dtype.element_ty), mask=there[:, None] & (column < V)[None, :])


@jit
def _merge(parts, norms, sink, o, lse, work, splits, H, V: tl.constexpr, BV: tl.constexpr):
    # A row of the output at a time: the means over the parts of its keys, in their order, each
    # weighted by its mass.
    column = tl.arange(0, BV)
    inside = column < V
    for number in range(tl.program_id(0), work, tl.num_programs(0)):
        query, h = tl.cast(number // H, tl.int64), number % H
        at = query * splits * H + h
        norm = tl.load(norms + at)
        mean = tl.load(parts + at * V + column, mask=inside, other=0.0)
        for _ in range(1, splits):
            at += H
            other = tl.load(norms + at)
            more = tl.load(parts + at * V + column, mask=inside, other=0.0)
            top = tl.maximum(norm, other)
            shift = tl.where(top == float("-inf"), 0.0, top)
            old, new = tl.exp(norm - shift), tl.exp(other - shift)
            norm = shift + tl.log(old + new)
            mean = (mean * old + more * new) / tl.where(old + new == 0, 1.0, old + new)
        if sink is not None:
            mean *= kept_share(norm, tl.load(sink + h).to(tl.float32))
        at = query * H + h
        tl.store(lse + at, norm)
        tl.store(o + at * V + column, narrow(mean, o.dtype.element_ty), mask=inside)


def attend(
    q: Tensor,
    kv: Tensor,
    indices: Tensor | None,
    visible: Tensor | None,
    local_kv: Tensor | None,
    window: int,
    sink: Tensor | None,
    scale: float,
    v_dim: int,
    local_valid: Tensor | None,
    row_bytes: int = 0,
) -> tuple[Tensor, Tensor]:
    """o and lse; row_bytes: the length of kv's rows where they are packed, else 0."""
    (B, S, H, D), N = q.shape, kv.shape[1]
    o, lse = q.new_empty((B, S, H, v_dim)), q.new_empty((B, S, H), dtype=torch.float32)
    if not lse.numel():
        return o, lse
    # Rows wider than what they hold of values: the rest is a tile of its own.
    wide = power_of_two(v_dim)
    tail = power_of_two(D - wide) if D > wide else 0
    case = "rows" if row_bytes else "narrow" if wide <= 128 else "tailed" if tail else "wide"
    if q.dtype == torch.float32 or (row_bytes and q.dtype == torch.float16):
        case = "f32"
    entry = f"sparse_attention.{case}"
    tile = tile_for(entry, q)
    listed = indices is not None and N > 0
    length = indices.shape[2] if listed else N if indices is None else 0
    work = B * S * cdiv(H, tile["BH"])
    splits = _splits(q, work, length + window, tile)
    to, norms = o, lse
    if splits > 1:
        to = torch.empty((B, S, splits, H, v_dim), dtype=torch.float32, device=q.device)
        norms = torch.empty((B, S, splits, H), dtype=torch.float32, device=q.device)
    sinks = None if sink is None else sink.contiguous()
    launch(
        _forward,
        programs(q, work * splits, tile),
        q.contiguous(),
        kv,
        indices.contiguous() if listed else None,
        None if visible is None else visible.contiguous(),
        local_kv,
        as_bytes(local_valid),
        None if splits > 1 else sinks,
        to,
        norms,
        *kv.stride()[:2],
        *((0, 0) if local_kv is None else local_kv.stride()[:2]),
        work * splits,
        splits,
        S,
        H,
        N,
        length,
        0 if local_kv is None else local_kv.shape[1],
        window,
        scale * LOG2E,
        tile=tile,
        entry=entry,
        LISTED=listed,
        BYTES=row_bytes,
        D=D,
        V=v_dim,
        BV=wide,
        BT=tail,
        PRECISION=precision(q.dtype, q.dtype, q),
    )
    if splits > 1:
        launch(
            _merge,
            programs(q, lse.numel()),
            to,
            norms,
            sinks,
            o,
            lse,
            lse.numel(),
            splits,
            H,
            V=v_dim,
            BV=wide,
        )
    return o, lse


def _splits(q: Tensor, work: int, keys: int, tile) -> int:
    """Into how many parts a query's keys are cut, so that few queries employ the whole device.

    One under deterministic algorithms: a query's bits must not depend on the others.
    """
    if torch.are_deterministic_algorithms_enabled():
        return 1
    return max(1, min(programs(q, 1 << 20, tile)[0] // work, keys // FEWEST))


@offer(
    sparse_attention,
    *floats("q"),
    last_dim_contiguous("kv", "local_kv"),
    at_most("N", 2**31 - 1),
    at_most("D", 1024),
)
def forward(
    q: Tensor,
    kv: Tensor,
    indices: Tensor | None = None,
    *,
    visible: Tensor | None = None,
    local_kv: Tensor | None = None,
    window: int = 0,
    sink: Tensor | None = None,
    scale: float,
    v_dim: int,
    local_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o = sum_j softmax(scale * q . K)_j K_j[:v_dim] over entries, local tokens and sink; lse."""
    return attend(q, kv, indices, visible, local_kv, window, sink, scale, v_dim, local_valid)


@offer(
    sparse_attention_backward,
    *floats("q"),
    last_dim_contiguous("kv", "local_kv"),
    at_most("N", 2**31 - 1),
    at_most("D", 1024),
)
def backward(
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
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dkv, dlocal_kv and dsink."""
    return attend_backward(
        do, dlse, q, kv, indices, visible, local_kv, sink, local_valid, o, lse, window, scale
    )
