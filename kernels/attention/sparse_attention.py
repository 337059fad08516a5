"""Attention over selected entries, a window of raw tokens and a sink; the keys are the values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transom.config import workspace_bytes
from transom.declare import op
from transom.dtypes import accumulator
from transom.kernels import _bounds as bounds
from transom.kernels._ordered_sum import add_rows

from ._online_softmax import (
    OnlineSoftmax,
    finite,
    gathered_back,
    kept_share,
    mixtures,
    products,
    recomputed_weights,
    sink_share,
)

# Keys of a tile when all queries of a block meet the same keys: wide enough for matrix products,
# and the logits of 64 queries of 128 heads (32 MiB) still fit the default workspace.
SHARED_TILE = 1024


@op(
    "q[B,S,H,D], kv[B,N,D], indices?[B,S,L], visible?[B,S], local_kv?[B,M,D], sink?[H],"
    " local_valid?[B,M] -> o[B,S,H,v_dim], lse[B,S,H]",
    dtypes="q: float; kv: q; indices: index; visible: index; local_kv: q; sink: q | f32;"
    " local_valid: bool; o: q; lse: acc(q)",
    flops="2*B*S*H*(D+v_dim)*((L if L > 0 else N)+window)",
    bytes="B*(S*H*(D+v_dim)+D*((min(N, S*L) if L > 0 else N)+min(M, S+window)))*size.q+4*B*S*(L+H)",
    accumulate="D+(L if L > 0 else N)+window",
    autocast="low: q kv local_kv",
    batch="B",
    varying="B S M N",
    examples=[
        dict(B=2, S=5, H=3, D=8, N=9, L=4, M=7, window=3, v_dim=8, scale=0.35),
        # Every visible entry, neither window nor list.
        dict(B=2, S=4, H=2, D=8, N=6, v_dim=5, scale=0.4),
        # DeepSeek-V4-Flash, CSA prefill: 512 selected of 1024 entries, window 128.
        dict(
            B=1, S=4096, H=64, D=512, N=1024, L=512, M=4096, window=128, v_dim=512, scale=512**-0.5
        ),
        # DeepSeek-V3.2 decode: 2048 selected of 32,768 latent rows of 512 + 64.
        dict(B=4, S=1, H=128, D=576, N=32768, L=2048, M=1, window=1, v_dim=512, scale=192**-0.5),
    ],
)
def _sparse_attention(
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
    """o = sum_j softmax(scale * q . K)_j K_j[:v_dim] over entries, local tokens and sink; lse.

    The declared operator behind the public function, which documents the arguments; here `scale`
    and `v_dim` are given and the lse is always returned. Temporaries stay within the workspace:
    queries are taken in blocks, keys in tiles, with an online softmax over the tiles.
    """
    return forward(
        q, kv, indices, visible, local_kv, window, sink, scale, v_dim, local_valid, _convert
    )


def _convert(keys: Tensor, dtype: torch.dtype) -> Tensor:
    return keys.to(dtype)


def forward(
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
    read: Callable[[Tensor, torch.dtype], Tensor],
) -> tuple[Tensor, Tensor]:
    """The composite; `read` makes numbers of the rows of kv that a tile has loaded."""
    batch, queries, heads, _ = q.shape
    dtype = accumulator(q.dtype)
    o = q.new_empty((batch, queries, heads, v_dim))
    lse = q.new_empty((batch, queries, heads), dtype=dtype)
    sinks = None if sink is None else sink.to(dtype)
    plan = _plan(q, kv, indices, local_kv, window, copies=2)
    for rows in plan.blocks():
        # In memory's order: a product may round otherwise where its factors are strided.
        x = (q[rows].to(dtype) * scale).contiguous()
        softmax = OnlineSoftmax(x.shape[:-1], v_dim, x)
        for tile in _tiles(
            plan, rows, kv, indices, visible, local_kv, local_valid, window, dtype, read
        ):
            logits = products(x, tile.keys).masked_fill_(~tile.seen, -torch.inf)
            softmax.add(mixtures(softmax.weights(logits), tile.clean[..., :v_dim]))
        o[rows], lse[rows] = softmax.finish(sinks)
    return o, lse


class _Plan(NamedTuple):
    """How the work is cut: `batches` x `queries` at a time, `keys` of them per tile."""

    shape: tuple[int, int]
    batches: int
    queries: int
    keys: int

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        for b in range(0, self.shape[0], self.batches):
            for s in range(0, self.shape[1], self.queries):
                yield (
                    slice(b, min(b + self.batches, self.shape[0])),
                    slice(s, min(s + self.queries, self.shape[1])),
                )


def _plan(
    q: Tensor, kv: Tensor, indices: Tensor | None, local_kv: Tensor | None, window: int, copies: int
) -> _Plan:
    """Blocks whose keys, logits (`copies` of them) and sums fit the workspace; at least one query
    and 16 keys."""
    (b, s, h, d), item = q.shape, accumulator(q.dtype).itemsize
    budget = workspace_bytes()
    gathered = indices is not None
    width = indices.shape[2] if gathered else min(kv.shape[1], SHARED_TILE)
    if local_kv is not None:
        width = max(width, min(window, local_kv.shape[1], SHARED_TILE))
    per_key = item * h * copies + (item * d * (copies + 1) + 64 if gathered else h)
    per_query = item * h * d * (copies + 3)
    width = max(1, min(width, max(16, (budget - per_query) // max(per_key, 1))))
    per_query += width * per_key
    queries = max(1, budget // max(per_query, 1))
    if queries < s:
        if local_kv is not None:
            # A block of t queries meets t + window - 1 local tokens, of which each sees `window`.
            queries = min(queries, max(window, 64))
        return _Plan((b, s), 1, queries, width)
    shared = 0 if gathered and local_kv is None else item * d * width * copies
    batches = budget // max(1, s * per_query + shared)
    return _Plan((b, s), min(max(batches, 1), max(b, 1)), max(s, 1), width)


class _Tile(NamedTuple):
    """Keys that a block of queries meets, [batches, n, D] or gathered [batches, queries, n, D].

    `clean` is safe to be multiplied by a weight of zero. `seen` broadcasts against the logits.
    `place` says where the keys stand: a slice of rows, or row numbers with -1 for none.
    """

    keys: Tensor
    clean: Tensor
    seen: Tensor
    local: bool
    place: slice | Tensor


def _tiles(
    plan: _Plan,
    rows: tuple[slice, slice],
    kv: Tensor,
    indices: Tensor | None,
    visible: Tensor | None,
    local_kv: Tensor | None,
    local_valid: Tensor | None,
    window: int,
    dtype: torch.dtype,
    read: Callable[[Tensor, torch.dtype], Tensor] = _convert,
) -> Iterator[_Tile]:
    """The tiles of one block of queries: entries first, then local tokens."""
    batches, queries = rows
    total = kv.shape[1]
    bound = None if visible is None else visible[rows].unsqueeze(-1)
    if indices is not None:
        in_batch = torch.arange(batches.start, batches.stop, device=kv.device)[:, None, None]
        for i in range(0, indices.shape[2] if total else 0, plan.keys):
            index = indices[batches, queries, i : i + plan.keys].long()
            seen = (index >= 0) & (index < (total if bound is None else bound.clamp(max=total)))
            keys = read(kv[in_batch, index.clamp(0, total - 1)], dtype).contiguous()
            # Selected, not multiplied: a clamped index may have loaded a row of NaN.
            keys = keys.masked_fill_(~seen[..., None], 0)
            place = torch.where(seen, in_batch * total + index, -1)
            yield _Tile(keys, keys, seen.unsqueeze(2), False, place)
    else:
        for i in range(0, total, plan.keys):
            place = slice(i, min(i + plan.keys, total))
            keys = read(kv[batches, place], dtype).contiguous()
            seen = torch.arange(place.start, place.stop, device=kv.device)[None, None, None]
            seen = seen >= 0 if bound is None else seen < bound.unsqueeze(-1)
            yield _Tile(keys, finite(keys), seen, False, place)
    if local_kv is not None:
        first = local_kv.shape[1] - plan.shape[1]
        stop = first + queries.stop
        position = torch.arange(first + queries.start, stop, device=kv.device)
        for i in range(max(0, first + queries.start - window + 1), stop, plan.keys):
            place = slice(i, min(i + plan.keys, stop))
            keys = local_kv[batches, place].to(dtype).contiguous()
            distance = position[:, None] - torch.arange(i, place.stop, device=kv.device)
            seen = ((distance >= 0) & (distance < window))[None, :, None]
            if local_valid is not None:
                seen = seen & local_valid[batches, place][:, None, None]
            yield _Tile(keys, finite(keys), seen, True, place)


@op(
    "do[B,S,H,v_dim], dlse[B,S,H], q[B,S,H,D], kv[B,N,D], indices?[B,S,L], visible?[B,S],"
    " local_kv[B,M,D], sink[H], local_valid?[B,M], o[B,S,H,v_dim], lse[B,S,H]"
    " -> dq[B,S,H,D], dkv[B,N,D], dlocal_kv[B,M,D], dsink[H]",
    dtypes="do: q; dlse: acc(q); q: float; kv: q; indices: index; visible: index; local_kv: q;"
    " sink: q | f32; local_valid: bool; o: q; lse: acc(q); dq: q; dkv: q; dlocal_kv: q;"
    " dsink: sink",
    flops="2*B*S*H*(3*D+2*v_dim)*((L if L > 0 else N)+window)",
    accumulate="S*H+D+(L if L > 0 else N)+window",
    batch="B",
    examples=[
        dict(B=2, S=5, H=3, D=8, N=9, L=4, M=7, window=3, v_dim=8, scale=0.35),
        dict(
            B=1, S=4096, H=64, D=512, N=1024, L=512, M=4096, window=128, v_dim=512, scale=512**-0.5
        ),
    ],
)
def sparse_attention_backward(
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
    """dS = p (share (do . V - do . o) + dlse), p = exp(scale * q . K - lse), and from it the
    gradients of sparse_attention.

    share = exp(lse) / (exp(lse) + exp(sink)) is what the sink leaves, so share * p are the weights
    of the output; lse leaves the sink out, hence the plain p beside dlse. With dK and dV of a row
    added up, since K and V are one:
    dq = scale sum_j dS_j K_j; dkv_j = sum_(s,h) scale dS_j q + share p_j do; dsink = -sum (1 -
    share) (do . o).

    do, o        [B,S,H,v_dim], q's dtype: gradient and result of the forward.
    dlse, lse    [B,S,H], float32 (float64 for float64).
    local_kv     [B,M,D]; M = 0 with window = 0 where the forward had none.
    sink         [H]; -inf where the forward had none.
    The rest as in sparse_attention. Returns dq, dkv, dlocal_kv and dsink with the shape and dtype
    of q, kv, local_kv and sink. Weights are recomputed in blocks; sums over queries are float32
    (float64 for float64), in a fixed order, and rounded once.
    *Source:* contracts of DeepSeek-V4 attention with shared keys and values; Dao et al. 2022,
    arXiv:2205.14135, app. B.
    """
    dtype, v_dim = accumulator(q.dtype), do.shape[3]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dkv = kv.new_zeros(kv.shape, dtype=dtype)
    dlocal = local_kv.new_zeros(local_kv.shape, dtype=dtype)
    dsink = sink.new_zeros(sink.shape, dtype=dtype)
    sinks = sink.to(dtype)
    present = local_kv if window else None
    plan = _plan(q, kv, indices, present, window, copies=4)
    for rows in plan.blocks():
        x, dy = q[rows].to(dtype), do[rows].to(dtype)
        delta = (dy * o[rows]).sum(-1)
        share = kept_share(lse[rows], sinks)
        dsink -= (sink_share(lse[rows], sinks) * delta).sum((0, 1))
        dx = torch.zeros_like(x)
        for tile in _tiles(plan, rows, kv, indices, visible, present, local_valid, window, dtype):
            lead = tile.keys.dim() - 2
            logits = products(x * scale, tile.keys).masked_fill_(~tile.seen, -torch.inf)
            p = recomputed_weights(logits, lse[rows])
            ds = products(dy, tile.clean[..., :v_dim]).sub_(delta.unsqueeze(-1))
            ds.mul_(share.unsqueeze(-1)).add_(dlse[rows].unsqueeze(-1)).mul_(p).mul_(scale)
            # p is 0 where a key is not seen, but do . V of such a key may have overflowed.
            ds.masked_fill_(~tile.seen, 0)
            dx += mixtures(ds, tile.clean)
            drows = gathered_back(ds, x, lead)
            drows[..., :v_dim] += gathered_back(p.mul_(share.unsqueeze(-1)), dy, lead)
            if isinstance(tile.place, slice):
                (dlocal if tile.local else dkv)[rows[0], tile.place] += drows
            else:
                add_rows(dkv.flatten(0, 1), tile.place.flatten(), drows.flatten(0, 2))
        dq[rows] = dx
    return dq, dkv.to(kv.dtype), dlocal.to(local_kv.dtype), dsink.to(sink.dtype)


@_sparse_attention.front
def sparse_attention(
    q: Tensor,
    kv: Tensor,
    indices: Tensor | None = None,
    *,
    visible: Tensor | None = None,
    local_kv: Tensor | None = None,
    window: int = 0,
    sink: Tensor | None = None,
    scale: float | None = None,
    v_dim: int | None = None,
    return_lse: bool = False,
    local_valid: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o[s] = sum_j e^(l_j) V_j / (sum_j e^(l_j) + e^sink), l_j = scale * q[s] . K_j.

    K_j is a row of kv or local_kv, V_j = K_j[:v_dim]; the softmax is taken for each head.
    j runs over the entries of kv that query s selects and over the local tokens in its window: one
    softmax over both and the sink, which takes part in the denominator and has no value. An entry
    that covers a token of the window, or that is named twice, counts each time.

    q            [B,S,H,D].
    kv           [B,N,D]: entries, keys and values at once; N may be 0. Or [B,N,584] and [B,N,288],
                 uint8: rows as `pack_cache_rows` makes them of D = 512, read by the operator
                 sparse_attention_rows, which has no gradient.
    indices      [B,S,L], int32 or int64: the entries that each query sees; any value < 0 or >= N
                 stands for none. None: every entry.
    visible      [B,S], int32 or int64: query s sees only entries j < visible[b,s], selected or not.
    local_kv     [B,M,D], M >= S: the last M raw tokens; query s stands at M-S+s.
    window       tokens that a query sees of local_kv, itself included: M-S+s-window+1 .. M-S+s.
    sink         [H], q's dtype or float32: a logit per head; -inf is no sink, +inf makes the output
                 0.
    scale        of the logits; D**-0.5 if None.
    v_dim        leading dims of a key that are its value; D if None.
    return_lse   also return lse[B,S,H] = log sum_j e^(l_j), natural, without the sink; float32
                 (float64 for float64).
    local_valid  [B,M], bool: False marks padding among the local tokens, never attended. Padding
                 keeps its place: the window counts positions of local_kv, padded or not.
    Returns o[B,S,H,v_dim] in q's dtype. A query that sees nothing: o = 0, lse = -inf. Rows of kv
    and local_kv that a query does not see have no influence on its output, whatever they hold (NaN,
    Inf).
    Differentiable in q, kv, local_kv and sink, through o and lse.
    Raises ValueError for shapes that disagree, M < S, a window without local_kv or the reverse,
    v_dim > D.
    *Source:* DeepSeek-V3.2 and V4 (arXiv:2606.19348) attention; output conventions of FlashMLA,
    with lse = -inf.
    """
    if kv.dtype == torch.uint8:
        from .sparse_attention_rows import sparse_attention_rows as attend
    else:
        attend = _sparse_attention
    o, lse = attend.call(
        q,
        kv,
        indices,
        visible=visible,
        local_kv=local_kv,
        window=window,
        sink=sink,
        scale=max(q.shape[-1], 1) ** -0.5 if scale is None else scale,
        v_dim=q.shape[-1] if v_dim is None else v_dim,
        local_valid=local_valid,
    )
    return (o, lse) if return_lse else o


@_sparse_attention.check
def attention_check(
    given: set[str], window: int, v_dim: int, D: int, S: int, M: int | None = None
) -> str | None:
    if not 0 <= v_dim <= D:
        return f"v_dim is {v_dim}; must be in 0..D = {D}"
    if "local_kv" not in given:
        if window != 0:
            return f"window is {window} and local_kv is not given; pass local_kv, or window=0"
        if "local_valid" in given:
            return "local_valid is given and local_kv is not; pass both or neither"
        return None
    if window < 1:
        return f"window is {window} and local_kv is given; must be >= 1, the query itself included"
    if M < S:
        return f"local_kv has M = {M} tokens; must hold those of all S = {S} queries"
    return bounds.above(bounds.WINDOW, window=window)


@_sparse_attention.gradient(save="q kv indices visible local_kv sink local_valid o lse")
def _(saved: Any, do: Tensor, dlse: Tensor) -> dict[str, Tensor | None]:
    q, kv = saved.q, saved.kv
    dq, dkv, dlocal, dsink = sparse_attention_backward(
        do,
        dlse,
        q,
        kv,
        saved.indices,
        saved.visible,
        kv[:, :0] if saved.local_kv is None else saved.local_kv,
        q.new_full((q.shape[2],), -torch.inf) if saved.sink is None else saved.sink,
        saved.local_valid,
        saved.o,
        saved.lse,
        window=saved.window,
        scale=saved.scale,
    )
    return {
        "q": dq,
        "kv": dkv,
        "local_kv": None if saved.local_kv is None else dlocal,
        "sink": None if saved.sink is None else dsink,
    }


@sparse_attention_backward.check
def _(window: int, v_dim: int, D: int, S: int, M: int) -> str | None:
    if v_dim > D:
        return f"do has v_dim = {v_dim}; must be at most D = {D}"
    if window == 0 and M == 0:
        return None
    if window < 1 or M < S:
        return (
            f"local_kv has M = {M} with window = {window}; must be M >= S = {S} with"
            " window >= 1, or both 0"
        )
    return bounds.above(bounds.WINDOW, window=window)


def _seen_rows(
    b: int,
    s: int,
    N: int,
    S: int,
    M: int,
    indices: np.ndarray | None,
    visible: np.ndarray | None,
    window: int,
    local_valid: np.ndarray | None,
) -> tuple[list[int], list[int]]:
    """The rows of kv and of local_kv that query (b, s) attends to, repeated as often as they are
    named."""
    bound = N if visible is None else min(N, int(visible[b, s]))
    named = range(N) if indices is None else indices[b, s]
    entries = [int(j) for j in named if 0 <= j < bound]
    at = M - S + s
    nearest = range(max(0, at - window + 1), at + 1) if M else ()
    return entries, [j for j in nearest if local_valid is None or local_valid[b, j]]


@_sparse_attention.reference
def attention_reference(
    q: np.ndarray,
    kv: np.ndarray,
    indices: np.ndarray | None,
    visible: np.ndarray | None,
    local_kv: np.ndarray | None,
    window: int,
    sink: np.ndarray | None,
    scale: float,
    v_dim: int,
    local_valid: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    B, S, H, _ = q.shape
    N, local = kv.shape[1], kv[:, :0] if local_kv is None else local_kv
    o, lse = np.zeros((B, S, H, v_dim)), np.full((B, S, H), -np.inf)
    for b, s in np.ndindex(B, S):
        entries, near = _seen_rows(
            b, s, N, S, local.shape[1], indices, visible, window, local_valid
        )
        keys = np.concatenate([kv[b, entries], local[b, near]])
        if len(keys) == 0:
            continue
        logits = scale * q[b, s] @ keys.T
        lse[b, s] = np.logaddexp.reduce(logits, axis=-1)
        total = lse[b, s] if sink is None else np.logaddexp(lse[b, s], sink)
        o[b, s] = np.exp(logits - total[:, None]) @ keys[:, :v_dim]
    return o, lse


@sparse_attention_backward.reference
def _(
    do: np.ndarray,
    dlse: np.ndarray,
    q: np.ndarray,
    kv: np.ndarray,
    indices: np.ndarray | None,
    visible: np.ndarray | None,
    local_kv: np.ndarray,
    sink: np.ndarray,
    local_valid: np.ndarray | None,
    o: np.ndarray,
    lse: np.ndarray,
    window: int,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    B, S, H, v_dim = do.shape
    dq, dkv, dlocal = np.zeros_like(q), np.zeros_like(kv), np.zeros_like(local_kv)
    dsink = np.zeros(H)
    for b, s, h in np.ndindex(B, S, H):
        if lse[b, s, h] == -np.inf:
            continue
        entries, near = _seen_rows(
            b, s, kv.shape[1], S, local_kv.shape[1], indices, visible, window, local_valid
        )
        keys = np.concatenate([kv[b, entries], local_kv[b, near]])
        delta = do[b, s, h] @ o[b, s, h]
        with_sink = np.logaddexp(lse[b, s, h], sink[h])
        share = np.exp(lse[b, s, h] - with_sink)
        p = np.exp(scale * keys @ q[b, s, h] - lse[b, s, h])
        ds = p * (share * (keys[:, :v_dim] @ do[b, s, h] - delta) + dlse[b, s, h])
        dq[b, s, h] = scale * ds @ keys
        dkeys = scale * ds[:, None] * q[b, s, h]
        dkeys[:, :v_dim] += share * p[:, None] * do[b, s, h]
        np.add.at(dkv[b], entries, dkeys[: len(entries)])
        np.add.at(dlocal[b], near, dkeys[len(entries) :])
        dsink[h] -= np.exp(sink[h] - with_sink) * delta
    return dq, dkv, dlocal, dsink


@_sparse_attention.sample
def attention_sample(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    B, S, N = dims["B"], dims["S"], dims["N"]
    out: dict[str, Any] = {"visible": rng.integers(0, N + 1, (B, S))}
    if "L" in dims:
        indices = rng.integers(0, max(N, 1), (B, S, dims["L"]))
        # Any value outside 0..N-1 stands for none, not only -1.
        none = rng.choice([-1, N, -(2**31), 2**31 - 1], indices.shape)
        out["indices"] = np.where(rng.random(indices.shape) < 0.2, none, indices)
    if "M" in dims:
        out["local_valid"] = rng.random((B, dims["M"])) < 0.9
    return out


@sparse_attention_backward.sample
def _(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    B, S, H, D, N, M = (dims[name] for name in "BSHDNM")
    out = attention_sample(rng, dims)
    out.update(
        q=rng.standard_normal((B, S, H, D)),
        kv=rng.standard_normal((B, N, D)),
        local_kv=rng.standard_normal((B, M, D)),
        sink=rng.standard_normal(H),
    )
    if dims["v_dim"] > D:
        return out  # such a call is refused
    forward = {name: out.get(name) for name in ("q", "kv", "indices", "visible", "local_kv")}
    rest = {name: dims[name] for name in ("window", "scale", "v_dim")}
    # The weights are exp(logits - lse), so the lse must belong to the logits.
    out["o"], out["lse"] = attention_reference(
        **forward, **rest, sink=out["sink"], local_valid=out.get("local_valid")
    )
    return out
