"""Attention over selected entries, the indexer that selects them, and the compression of entries.

Each length in --context is a decode step of one query over that many tokens of cache; up to
PREFILL tokens it is also a prefill of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ceilings import cache_bytes
from ..models import Attention, Model
from . import DRAWS, Case, Draw, Inputs, Wanted, by_dtype, short

PREFILL = 8192
"""The longest context that is also prefilled."""
_HCA = 32
"""Entries of this many tokens or more are all read; of fewer, the best are selected."""


def cases(model: Model, wanted: Wanted) -> Iterator[Case]:
    """lightning_indexer, sparse_attention and compress_kv, or block_sparse_attention."""
    attention = model.attention
    for dtype, _ in by_dtype(wanted):
        for tokens in wanted.contexts:
            for queries in sorted({1, tokens} if tokens <= PREFILL else {1}):
                if attention is not None:
                    yield from _selected(model, attention, dtype, tokens, queries)
                if model.blocks is not None:
                    yield _blocks(model, dtype, tokens, queries)


def _selected(
    model: Model, attention: Attention, dtype: str, tokens: int, queries: int
) -> Iterator[Case]:
    phase = f"decode at {short(tokens)}" if queries == 1 else f"prefill {short(tokens)}"
    sweep = ("context", float(tokens)) if queries == 1 else ("prefill", float(tokens))
    kinds = [(ratio, _kind(ratio)) for ratio in attention.ratios]
    for ratio, kind in ([(0, "window")] if attention.window else []) + kinds:
        entries = tokens // ratio if ratio else 0
        dims: dict[str, Any] = dict(
            S=queries,
            tokens=tokens,
            N=entries,
            H=attention.heads,
            D=attention.head_dim,
            Dv=attention.v_dim,
            window=attention.window,
            ratio=ratio,
            L=attention.top_k if 0 < ratio < _HCA else 0,
        )
        yield Case(
            "sparse_attention",
            model.name,
            f"{phase}, {kind}",
            dims,
            dtype,
            "plain",
            _attend(dims, attention),
            sweep=sweep,
        )
        if entries and attention.row_bytes:
            yield Case(
                "sparse_attention_rows",
                model.name,
                f"{phase}, {kind}",
                dims,
                dtype,
                "plain",
                _attend_rows(dims, attention),
                sweep=sweep,
            )
        if dims["L"] and entries:
            inner = dict(
                S=queries,
                tokens=tokens,
                N=entries,
                H=attention.index_heads,
                D=attention.index_dim,
                top_k=attention.top_k,
                ratio=ratio,
            )
            yield Case(
                "lightning_indexer",
                model.name,
                f"{phase}, {queries:,} x {entries:,}",
                inner,
                dtype,
                "plain",
                _index(inner),
                sweep=sweep,
            )
        if ratio > 1 and queries > 1:
            overlap = ratio < _HCA
            packed = dict(S=queries, W=(1 + overlap) * attention.head_dim, m=ratio, overlap=overlap)
            yield Case(
                "compress_kv",
                model.name,
                f"{phase}, {kind}",
                packed,
                dtype,
                "plain",
                _compress(packed),
                sweep=sweep,
            )


def _kind(ratio: int) -> str:
    """DeepSeek's names: compressed sparse, heavily compressed, and V3.2's of single tokens."""
    return "HCA" if ratio >= _HCA else "CSA" if ratio > 1 else "selected"


def _seen(dims: Mapping[str, Any]) -> Tensor:
    """visible[1,S]: entries that end at or before each query's token."""
    last = torch.arange(dims["tokens"] - dims["S"], dims["tokens"])
    return ((last + 1) // dims["ratio"])[None]


def _copies(one: float) -> int:
    """Caches of other layers that take turns, so that none is left over from the call before."""
    return max(1, min(DRAWS, int(2 * cache_bytes() / max(one, 1.0)) + 1, int(2e9 / max(one, 1.0))))


def _told(copies: int, one: float) -> str:
    from transom.cli import units

    return f"queries new each call, {copies} caches of {units.memory(one)} in turn"


def _last(values: Mapping[str, Any], names: tuple[str, ...], some: int) -> dict[str, Any]:
    """The call with its last `some` queries: they keep their places."""
    return {n: v[:, -some:] if n in names and v is not None else v for n, v in values.items()}


def _few(*names: str, some: int = 3) -> Any:
    def few(values: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        return _last(values, names, some), lambda out: out[:, -some:]

    return few


def _attend(dims: Mapping[str, Any], attention: Attention) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        S, N, H, D, Dv, L, window = (dims[n] for n in ("S", "N", "H", "D", "Dv", "L", "window"))
        item = draw.dtype.itemsize
        M = min(dims["tokens"], S + window - 1) if window else 0
        copies = _copies((N + M) * D * item) if S == 1 else 1
        caches = [draw.normal(1, N, D) for _ in range(copies)]
        visible = _seen(dims) if N else None
        sink = draw.normal(H) if attention.sink else None
        draws, pairs = [], 0.0
        for i in range(DRAWS if S == 1 else 2):
            indices = None
            if L and N:
                assert visible is not None
                indices = selected(draw, visible[0], N, L)[None]
                pairs = float((indices >= 0).sum())
            elif N:
                assert visible is not None
                pairs = float(visible.clamp(max=N).sum())
            draws.append(
                draw.call(
                    "sparse_attention",
                    q=draw.normal(1, S, H, D),
                    kv=caches[i % copies],
                    indices=indices,
                    visible=visible,
                    local_kv=draw.normal(1, M, D) if window else None,
                    window=window,
                    sink=sink,
                    scale=attention.scale,
                    v_dim=Dv,
                )
            )
        if window:
            first = M - S + torch.arange(S)
            pairs += float((first + 1).clamp(max=window).sum())
        read = min(N, S * L) if L else N
        moved = (S * H * (D + Dv) + (read + M) * D) * item + 4.0 * S * (L + H)
        told = _told(copies, (N + M) * D * item)
        few = _few("q", "indices", "visible")
        return Inputs(draws, 2.0 * H * (D + Dv) * pairs, moved, few, cold=told)

    return make


def _attend_rows(dims: Mapping[str, Any], attention: Attention) -> Callable[[Draw], Inputs]:
    """As _attend, with the entries packed into rows."""
    attend, size = _attend(dims, attention), attention.row_bytes

    def make(draw: Draw) -> Inputs:
        import transom

        inputs, packed = attend(draw), {}
        draws = []
        for values in inputs.draws:
            given = dict(values)
            kv = given.pop("kv")
            if id(kv) not in packed:
                packed[id(kv)] = transom.pack_cache_rows(kv, row_bytes=size)
            draws.append({"q": given.pop("q"), "rows": packed[id(kv)], **given})
        S, N, L = dims["S"], dims["N"], dims["L"]
        saved = (min(N, S * L) if L else N) * (dims["D"] * draw.dtype.itemsize - size)
        cold = f"queries new each call, {len(packed)} caches in turn"
        return Inputs(draws, inputs.flops, inputs.bytes - saved, inputs.few, cold=cold)

    return make


def selected(draw: Draw, visible: Tensor, entries: int, top_k: int) -> Tensor:
    """[S, top_k] int32: for each query that many of its visible entries, ascending; then -1."""
    rows = []
    for part in visible.split(max(1, (1 << 24) // max(1, entries))):
        score = torch.rand(part.shape[0], entries, generator=draw.source)
        score.masked_fill_(torch.arange(entries) >= part[:, None], -1.0)
        best = score.topk(min(top_k, entries), dim=1)
        # the places of entries that are not visible go behind all others
        chosen = best.indices.masked_fill(best.values < 0, entries).sort(dim=1).values
        chosen = chosen.masked_fill_(chosen == entries, -1)
        rows.append(torch.nn.functional.pad(chosen, (0, top_k - chosen.shape[1]), value=-1))
    return torch.cat(rows).to(torch.int32)


def _index(dims: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        S, N, H, D = (dims[n] for n in "SNHD")
        item = draw.dtype.itemsize
        copies = _copies(N * D * item) if S == 1 else 1
        keys = [draw.normal(1, N, D) for _ in range(copies)]
        visible = _seen(dims)
        draws = [
            draw.call(
                "lightning_indexer",
                dict(B=1, S=S, H=H, D=D),
                k=keys[i % copies],
                weights=draw.normal(1, S, H, dtype=torch.float32),
                top_k=dims["top_k"],
                visible=visible,
            )
            for i in range(DRAWS if S == 1 else 2)
        ]
        pairs = float(visible.clamp(max=N).sum())
        moved = (S * H * D + N * D) * item + 4.0 * S * (H + dims["top_k"])
        few = _few("q", "weights", "visible")
        told = _told(copies, N * D * item)
        return Inputs(draws, 2.0 * H * (D + 1) * pairs, moved, few, cold=told)

    return make


def _compress(dims: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        S, W, m = dims["S"], dims["W"], dims["m"]
        bias = draw.normal(m, W, dtype=torch.float32)
        draws = [
            draw.call(
                "compress_kv", dict(B=1, S=S, W=W), position_bias=bias, overlap=dims["overlap"]
            )
            for _ in range(DRAWS)
        ]
        moved = (2 * S * W + S // m * W / (1 + dims["overlap"])) * draw.dtype.itemsize
        return Inputs(draws, 8.0 * S * W, moved, None, cold=f"{DRAWS} inputs in turn")

    return make


def _blocks(model: Model, dtype: str, tokens: int, queries: int) -> Case:
    blocks = model.blocks
    assert blocks is not None
    phase = f"decode at {short(tokens)}" if queries == 1 else f"prefill {short(tokens)}"
    dims: dict[str, Any] = dict(
        S=queries,
        N=tokens,
        Hq=blocks.heads,
        Hkv=blocks.kv_heads,
        D=blocks.head_dim,
        L=blocks.chosen,
        block=blocks.block,
    )
    sweep = ("context" if queries == 1 else "prefill", float(tokens))
    return Case(
        "block_sparse_attention",
        model.name,
        phase,
        dims,
        dtype,
        "plain",
        _attend_blocks(dims),
        sweep=sweep,
    )


def _attend_blocks(dims: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        S, N, Hq, Hkv, D, L, block = (dims[n] for n in ("S", "N", "Hq", "Hkv", "D", "L", "block"))
        item = draw.dtype.itemsize
        one = 2 * N * Hkv * D * item
        copies = _copies(one) if S == 1 else 1
        caches = [(draw.normal(1, N, Hkv, D), draw.normal(1, N, Hkv, D)) for _ in range(copies)]
        own = (torch.arange(N - S, N) // block)[:, None, None].expand(S, Hkv, 1)
        draws = []
        for i in range(DRAWS if S == 1 else 2):
            # the query's own block and others before it
            before = own[:, 0, 0].repeat_interleave(Hkv)
            others = selected(draw, before, -(-N // block), L - 1).view(S, Hkv, L - 1)
            lists = torch.cat((others, own.to(torch.int32)), -1).sort(-1, descending=True).values
            k, v = caches[i % copies]
            draws.append(
                draw.call(
                    "block_sparse_attention",
                    dict(B=1, S=S, Hq=Hq, D=D),
                    k=k,
                    v=v,
                    block_indices=lists[None].contiguous(),
                    block_size=block,
                    causal=True,
                    scale=D**-0.5,
                )
            )
        whole = float((others >= 0).sum()) * block
        within = float((torch.arange(N - S, N) % block + 1).sum()) * Hkv
        pairs = (whole + within) * Hq / Hkv
        touched = min(N, S * L * block) * Hkv
        moved = (2 * S * Hq * D + 2 * touched * D) * item
        few = _few("q", "block_indices")
        return Inputs(draws, 4.0 * D * pairs, moved, few, cold=_told(copies, one))

    return make
