"""Pool every block of m tokens into one entry by a softmax of learned gates, with carried state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op


@dataclass(frozen=True)
class CompressState:
    """What compress_kv carries from one chunk of a sequence to the next.

    kv        [B, R, W]  rows of the block before (with overlap: m rows), then of the incomplete
                         block (m rows); R = 2 m with overlap, else m.  Rows not filled yet are 0.
    gate      [B, R, W]  the same rows' gates, position bias added; -inf where not filled yet.
    position  tokens consumed so far: `position % m` rows of the incomplete block are filled.

    The tensors are float32 (float64 for float64 inputs).  A state is never written to: to roll a
    sequence back, keep the older state; an entry emitted since then is no part of it.
    Source: DeepSeek-V4 report, arXiv:2606.19348, section 2.3.
    """

    kv: Tensor
    gate: Tensor
    position: int

    def reorder(self, index: Tensor) -> CompressState:
        """The state whose sequence b is this one's sequence `index[b]` (index[B'], as in beams)."""
        kv, gate = self.kv.index_select(0, index), self.gate.index_select(0, index)
        return CompressState(kv, gate, self.position)

    @property
    def nbytes(self) -> int:
        """Bytes held by both tensors."""
        return self.kv.nbytes + self.gate.nbytes


@op(
    "kv[B,S,W], gate[B,S,W], position_bias[m,W], state_kv?[B,(1+overlap)*m,W],"
    " state_gate?[B,(1+overlap)*m,W] -> entries[B,(pending+S)//m,W//(1+overlap)],"
    " next_kv[B,(1+overlap)*m,W], next_gate[B,(1+overlap)*m,W]",
    dtypes="kv: float; gate: kv | f32; position_bias: kv | f32; state_kv: acc(kv);"
    " state_gate: acc(kv); entries: kv; next_kv: acc(kv); next_gate: acc(kv)",
    flops="8*B*S*W",
    accumulate="(1+overlap)*m",
    batch="B",
    examples=[
        dict(B=2, S=11, W=16, m=4, overlap=True, pending=0),
        dict(B=2, S=19, W=8, m=8, overlap=False, pending=0),
        dict(B=1, S=4096, W=1024, m=4, overlap=True, pending=0),
        dict(B=1, S=4096, W=512, m=128, overlap=False, pending=0),
    ],
)
def _compress_kv(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    *,
    overlap: bool,
    state_kv: Tensor | None = None,
    state_gate: Tensor | None = None,
    pending: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """entries[i] = sum over the slots p of block i of softmax_p(gate[p] + bias[p mod m]) * kv[p].

    The declared operator behind `transom.compress_kv`, which describes the formula and shapes.

    state_kv, state_gate  [B, R, W], R = (1 + overlap) * m: the state's tensors, both or neither
    pending  tokens of the incomplete block in the state, 0 .. m - 1; 0 without a state
    Returns entries, next_kv, next_gate: new tensors.
    Errors: ValueError for an odd width with overlap, half a state, pending without a state.
    Source: DeepSeek-V4 report, arXiv:2606.19348, section 2.3.
    """
    rows = _Rows(kv, gate, position_bias, overlap, state_kv, state_gate, pending)
    entries = kv.new_empty(rows.batch, rows.blocks, rows.width)
    for start, stop in rows.tiles(copies=4):
        entries[:, start:stop] = _pool(*rows.slots(start, stop))[0]
    next_kv, next_gate = rows.blank()
    first = rows.blocks * rows.m
    for at, values, gates in rows.pieces(first, rows.count):
        next_kv[:, at - first : at - first + values.shape[1]] = values
        next_gate[:, at - first : at - first + gates.shape[1]] = gates
    return entries, next_kv, next_gate


@_compress_kv.front
def compress_kv(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    *,
    overlap: bool,
    state: CompressState | None = None,
) -> tuple[Tensor, CompressState]:
    """entries[i] = sum over the slots p of block i of softmax_p(gate[p] + bias[p mod m]) * kv[p].

    The softmax is each channel's own, over the m tokens of block i; with `overlap` over 2 m slots
    jointly: the previous block's tokens with the first half of the channels, the block's own tokens
    with the second half.  The first block has no previous one: those slots have gate -inf and value
    0.  Blocks are counted from the sequence's own position 0.  A block still incomplete yields no
    entry and is carried in the state, so that any cutting of a sequence into calls gives the same
    entries and leaves the same state.  A slot whose gate is -inf is left out, whatever its value;
    a channel without any slot left is 0.  No norm and no rotation inside.

    kv, gate       [B, S, C*D], C = 2 with overlap (CSA), else 1 (HCA)
    position_bias  [m, C*D], m the compression ratio in tokens
    state          what the previous call on these sequences returned; None at their start
    Returns entries [B, (pending + S) // m, D] in kv's dtype, with pending = state.position % m, and
    the state after these tokens.  Softmax, sums and state are float32 (float64 for float64).
    Gradients reach kv, gate and position_bias, and through the state those of earlier calls.
    Errors: ValueError for widths or a state that do not fit together, TypeError for dtypes.
    Source: DeepSeek-V4 report, arXiv:2606.19348, section 2.3.
    """
    if state is None:
        entries, next_kv, next_gate = _compress_kv.call(kv, gate, position_bias, overlap=overlap)
        return entries, CompressState(next_kv, next_gate, kv.shape[1])
    _check_state(state, kv, position_bias, overlap)
    # Only the place within a block matters, and it takes few values: one plan serves all blocks.
    entries, next_kv, next_gate = _compress_kv.call(
        kv,
        gate,
        position_bias,
        overlap=overlap,
        state_kv=state.kv,
        state_gate=state.gate,
        pending=state.position % max(1, position_bias.shape[0]),
    )
    return entries, CompressState(next_kv, next_gate, state.position + kv.shape[1])


def _check_state(state: Any, kv: Tensor, position_bias: Tensor, overlap: bool) -> None:
    """Refuse what is no state, and the state of another layer, by the sizes that a user knows."""
    if not isinstance(state, CompressState):
        raise TypeError(f"compress_kv: state is {type(state).__name__}; expected a CompressState")
    if kv.dim() != 3 or position_bias.dim() != 2:
        return  # the operator says what is wrong with them
    m = position_bias.shape[0]
    seen, expected = state.kv.shape, (kv.shape[0], 2 * m if overlap else m, kv.shape[2])
    if tuple(seen) != expected:
        raise ValueError(
            f"compress_kv: state is of shape [B, R, W] = {list(seen)}; this kv with m = {m} and"
            f" overlap = {overlap} has {list(expected)}"
        )


class _Rows:
    """What entries are pooled from, in order: [block before, if overlap] [pending] [new tokens].

    Entry i pools rows i*m, i*m + 1, ...: blocks that began in an earlier call are no special case.
    """

    def __init__(
        self,
        kv: Tensor,
        gate: Tensor,
        position_bias: Tensor,
        overlap: bool,
        state_kv: Tensor | None,
        state_gate: Tensor | None,
        pending: int,
    ) -> None:
        self.dtype = torch.promote_types(kv.dtype, torch.float32)
        self.kv, self.gate, self.bias = kv, gate, position_bias.to(self.dtype)
        self.state_kv, self.state_gate = state_kv, state_gate
        self.overlap, self.m, self.pending = overlap, position_bias.shape[0], pending
        self.batch, self.width = kv.shape[0], kv.shape[2] // (1 + overlap)
        self.before = overlap * self.m  # rows of the block before
        self.head = self.before + pending  # rows that come from the state
        self.count = self.head + kv.shape[1]
        self.blocks = (pending + kv.shape[1]) // self.m

    def blank(self) -> tuple[Tensor, Tensor]:
        """Values and gates of a state in which nothing is filled."""
        zeros = self.bias.new_zeros(self.batch, self.before + self.m, self.kv.shape[2])
        return zeros, torch.full_like(zeros, -torch.inf)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, values, biased gates [B, rows, W]) of what makes the rows start to stop."""
        if start < min(stop, self.head):
            part = slice(start, min(stop, self.head))
            if self.state_kv is None or self.state_gate is None:
                old_kv, old_gate = self.blank()
            else:
                old_kv, old_gate = self.state_kv, self.state_gate
            yield start, old_kv[:, part], old_gate[:, part]
        if stop > max(start, self.head):
            first, last = max(start, self.head) - self.head, stop - self.head
            place = (torch.arange(first, last, device=self.bias.device) + self.pending) % self.m
            gates = self.gate[:, first:last].to(self.dtype) + self.bias[place]
            yield first + self.head, self.kv[:, first:last].to(self.dtype), gates

    def slots(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Values and gates [B, n, slots, D] of the entries from start to stop."""
        pieces = list(self.pieces(start * self.m, (stop + self.overlap) * self.m))
        values, gates = (torch.cat([p[i] for p in pieces], 1) for i in (1, 2))
        return self._halves(values), self._halves(gates)

    def _halves(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, self.m))
        if not self.overlap:
            return x
        return torch.cat([x[:, :-1, :, : self.width], x[:, 1:, :, self.width :]], 2)

    def tiles(self, copies: int) -> list[tuple[int, int]]:
        """Ranges of entries whose temporaries, `copies` of their slots, fit into the workspace."""
        slots = max(1, self.batch * (self.before + self.m) * self.width)
        step = max(1, config.workspace_bytes() // (2 * copies * slots * self.bias.element_size()))
        return [(i, min(i + step, self.blocks)) for i in range(0, self.blocks, step)]


def _pool(values: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries [B, n, D], with the weights and the values [B, n, slots, D] they are made of."""
    peak = gates.amax(2, keepdim=True)
    # With every slot left out -inf - (-inf) would be NaN; from any finite peak exp gives 0.
    weights = torch.exp(gates - torch.where(peak == -torch.inf, 0.0, peak))
    total = weights.sum(2, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    values = torch.where(gates == -torch.inf, 0.0, values)  # selected: 0 * NaN is NaN
    return (weights * values).sum(2), weights, values


@_compress_kv.reference
def _(  # type: ignore[no-untyped-def]
    kv, gate, position_bias, overlap, state_kv, state_gate, pending
):
    batch, tokens, width = kv.shape
    m = position_bias.shape[0]
    channels = width // 2 if overlap else width
    before = m if overlap else 0
    if state_kv is None:
        state_kv = np.zeros((batch, before + m, width))
        state_gate = np.full((batch, before + m, width), -np.inf)
    biased = gate + position_bias[(pending + np.arange(tokens)) % m]
    all_kv = np.concatenate([state_kv[:, : before + pending], kv], 1)
    all_gate = np.concatenate([state_gate[:, : before + pending], biased], 1)

    blocks = (pending + tokens) // m
    entries = np.zeros((batch, blocks, channels))
    for i in range(blocks):
        now = slice(before + i * m, before + (i + 1) * m)
        v, g = all_kv[:, now, width - channels :], all_gate[:, now, width - channels :]
        if overlap:
            past = slice(i * m, (i + 1) * m)
            v = np.concatenate([all_kv[:, past, :channels], v], 1)
            g = np.concatenate([all_gate[:, past, :channels], g], 1)
        for b in range(batch):
            for c in range(channels):
                used = g[b, :, c] != -np.inf
                if used.any():
                    e = np.exp(g[b, used, c] - g[b, used, c].max())
                    entries[b, i, c] = (e * v[b, used, c]).sum() / e.sum()

    next_kv = np.zeros((batch, before + m, width))
    next_gate = np.full((batch, before + m, width), -np.inf)
    left = all_kv.shape[1] - blocks * m
    next_kv[:, :left], next_gate[:, :left] = all_kv[:, blocks * m :], all_gate[:, blocks * m :]
    return entries, next_kv, next_gate


def _check(
    overlap: bool,
    pending: int,
    m: int,
    W: int,  # noqa: N803
    given: frozenset[str],
) -> str | None:
    if m < 1:
        return f"position_bias has m = {m} rows; must be at least 1"
    if overlap and W % 2:
        return f"kv has width {W} with overlap = True; must be even, two halves of D channels"
    if ("state_kv" in given) != ("state_gate" in given):
        return "one of state_kv and state_gate was given; must be both or neither"
    if not 0 <= pending < m:
        return f"pending is {pending}; must be in 0..m - 1 = {m - 1}"
    if pending and "state_kv" not in given:
        return f"pending is {pending} without a state; must be 0 at the start of a sequence"
    return None


compress_kv.check(_check)


def _sample(rng, dims):  # type: ignore[no-untyped-def]
    """A state in which `pending` tokens are filled, or none at all."""
    if rng.random() < 0.4:
        return {"state_kv": None, "state_gate": None, "pending": 0}
    m, before = dims["m"], dims["m"] * dims["overlap"]
    pending = int(rng.integers(0, m))
    state_kv, state_gate = rng.standard_normal((2, dims["B"], before + m, dims["W"]))
    state_kv[:, before + pending :], state_gate[:, before + pending :] = 0, -np.inf
    return {"state_kv": state_kv, "state_gate": state_gate, "pending": pending}


compress_kv.sample(_sample)


@op(
    "kv[B,S,W], gate[B,S,W], position_bias[m,W],"
    " dentries[B,(pending+S)//(m if m else 1),W//(1+overlap)], dnext_kv[B,(1+overlap)*m,W],"
    " dnext_gate[B,(1+overlap)*m,W], state_kv?[B,(1+overlap)*m,W],"
    " state_gate?[B,(1+overlap)*m,W] -> dkv[B,S,W], dgate[B,S,W],"
    " dposition_bias[m,W], dstate_kv[B,(1+overlap)*m,W], dstate_gate[B,(1+overlap)*m,W]",
    dtypes="kv: float; gate: kv | f32; position_bias: kv | f32; dentries: kv;"
    " dnext_kv: acc(kv); dnext_gate: acc(kv); state_kv: acc(kv); state_gate: acc(kv);"
    " dkv: kv; dgate: gate; dposition_bias: position_bias;"
    " dstate_kv: acc(kv); dstate_gate: acc(kv)",
    flops="16*B*S*W",
    accumulate="B*S//max(1,m)+2*m",
    batch="B",
    examples=[
        dict(B=2, S=11, W=16, m=4, overlap=True, pending=0),
        dict(B=2, S=19, W=8, m=8, overlap=False, pending=0),
        dict(B=1, S=4096, W=1024, m=4, overlap=True, pending=0),
    ],
)
def compress_kv_backward(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    dentries: Tensor,
    dnext_kv: Tensor,
    dnext_gate: Tensor,
    *,
    overlap: bool,
    state_kv: Tensor | None = None,
    state_gate: Tensor | None = None,
    pending: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dkv = p * dE, dgate = p * (kv - E) * dE, dbias = sum of dgate over blocks; p the weights.

    With overlap every token has two such terms, one for each half of its channels.  Gradients of
    the next state are passed on to the rows it was copied from.

    dentries [B, blocks, D], dnext_kv and dnext_gate [B, R, W]; the others as in compress_kv.
    Returns dkv, dgate, dposition_bias, dstate_kv, dstate_gate, new tensors in the dtypes of what
    they belong to; dstate_* is 0 for rows that were not used, and without a state.  Sums are
    float32 (float64 for float64) in a fixed order.
    Errors: those of compress_kv.
    Source: derived from arXiv:2606.19348, section 2.3; checked against finite differences.
    """
    rows = _Rows(kv, gate, position_bias, overlap, state_kv, state_gate, pending)
    m, before, width = rows.m, rows.before, rows.width
    # Rounded up to whole blocks, so that the gradient of the bias is one sum over blocks.
    padded = before + -(-(rows.count - before) // m) * m
    dvalues = rows.bias.new_zeros(rows.batch, padded, kv.shape[2])
    dgates = torch.zeros_like(dvalues)
    for start, stop in rows.tiles(copies=6):
        entry, weights, values = _pool(*rows.slots(start, stop))
        dvalue = weights * dentries[:, start:stop, None].to(rows.dtype)
        for whole, part in ((dvalues, dvalue), (dgates, dvalue * (values - entry[:, :, None]))):
            # Each half of a row's channels belongs to one entry only: written, never added.
            own = whole[:, before + start * m : before + stop * m].unflatten(1, (-1, m))
            own[..., kv.shape[2] - width :] = part[:, :, -m:]
            if overlap:
                past = whole[:, start * m : stop * m].unflatten(1, (-1, m))
                past[..., :width] = part[:, :, :m]
    first, last = rows.blocks * m, rows.count
    dvalues[:, first:last] += dnext_kv[:, : last - first]
    dgates[:, first:last] += dnext_gate[:, : last - first]

    dstate_kv = rows.bias.new_zeros(rows.batch, before + m, kv.shape[2])
    dstate_gate = torch.zeros_like(dstate_kv)
    if state_kv is not None:
        dstate_kv[:, : rows.head] = dvalues[:, : rows.head]
        dstate_gate[:, : rows.head] = dgates[:, : rows.head]
    dkv = kv.new_empty(kv.shape).copy_(dvalues[:, rows.head : rows.count])
    dgate = gate.new_empty(gate.shape).copy_(dgates[:, rows.head : rows.count])
    dgates[:, before : rows.head] = 0  # the bias of these was added by an earlier call
    dbias = dgates[:, before:].unflatten(1, (-1, m)).sum((0, 1))
    return dkv, dgate, dbias.to(position_bias.dtype), dstate_kv, dstate_gate


@compress_kv_backward.reference
def _(  # type: ignore[no-untyped-def]
    kv, gate, position_bias, dentries, dnext_kv, dnext_gate, overlap, state_kv, state_gate, pending
):
    batch, tokens, width = kv.shape
    m = position_bias.shape[0]
    channels = width // 2 if overlap else width
    before = m if overlap else 0
    head = before + pending
    shape = (batch, before + m, width)
    old_kv = np.zeros(shape) if state_kv is None else state_kv
    old_gate = np.full(shape, -np.inf) if state_gate is None else state_gate
    places = (pending + np.arange(tokens)) % m
    all_kv = np.concatenate([old_kv[:, :head], kv], 1)
    all_gate = np.concatenate([old_gate[:, :head], gate + position_bias[places]], 1)
    d_kv, d_gate = np.zeros_like(all_kv), np.zeros_like(all_gate)

    blocks = (pending + tokens) // m
    for b in range(batch):
        for i in range(blocks):
            for c in range(channels):
                # (row, channel) of every slot that entry i pools into its channel c
                slots = [(before + i * m + p, width - channels + c) for p in range(m)]
                if overlap:
                    slots += [(i * m + p, c) for p in range(m)]
                slots = [s for s in slots if all_gate[b][s] != -np.inf]
                if not slots:
                    continue
                g = np.array([all_gate[b][s] for s in slots])
                v = np.array([all_kv[b][s] for s in slots])
                p = np.exp(g - g.max())
                p /= p.sum()
                for s, weight, value in zip(slots, p, v, strict=True):
                    d_kv[b][s] += weight * dentries[b, i, c]
                    d_gate[b][s] += weight * (value - p @ v) * dentries[b, i, c]
    left = all_kv.shape[1] - blocks * m
    d_kv[:, blocks * m :] += dnext_kv[:, :left]
    d_gate[:, blocks * m :] += dnext_gate[:, :left]

    d_bias = np.zeros_like(position_bias)
    for s, place in enumerate(places):
        d_bias[place] += d_gate[:, head + s].sum(0)
    d_state_kv, d_state_gate = np.zeros(shape), np.zeros(shape)
    if state_kv is not None:
        d_state_kv[:, :head], d_state_gate[:, :head] = d_kv[:, :head], d_gate[:, :head]
    return d_kv[:, head:], d_gate[:, head:], d_bias, d_state_kv, d_state_gate


compress_kv_backward.check(_check)
compress_kv_backward.sample(_sample)


@_compress_kv.gradient(save="kv gate position_bias state_kv state_gate")
def _(saved, dentries, dnext_kv, dnext_gate):  # type: ignore[no-untyped-def]
    dkv, dgate, dbias, dstate_kv, dstate_gate = compress_kv_backward(
        saved.kv,
        saved.gate,
        saved.position_bias,
        dentries,
        dnext_kv,
        dnext_gate,
        overlap=saved.overlap,
        state_kv=saved.state_kv,
        state_gate=saved.state_gate,
        pending=saved.pending,
    )
    return {
        "kv": dkv,
        "gate": dgate,
        "position_bias": dbias,
        "state_kv": dstate_kv,
        "state_gate": dstate_gate,
    }
