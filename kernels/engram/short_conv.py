"""The Engram demo's short convolution: depthwise, causal, dilated, with the rows before the chunk
as state."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.dtypes import accumulator
from transom.kernels import _bounds as bounds

_EXAMPLES = [
    dict(B=2, S=5, C=4, K=4, dilation=3),
    dict(B=1, S=4096, C=10240, K=4, dilation=3),
    dict(B=64, S=1, C=10240, K=4, dilation=3),
]


@op(
    "v[B,S,C], weight[C,K], state?[B,(K-1)*dilation,C] -> y[B,S,C], new_state[B,(K-1)*dilation,C]",
    dtypes="v: float; weight: v | f32; state: v; y: v; new_state: v",
    flops="B*S*C*(2*K + 5)",
    accumulate="K",
    batch="B",
    examples=_EXAMPLES,
)
def short_conv(
    v: Tensor, weight: Tensor, *, dilation: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y[b,s,c] = SiLU(z[b,s,c]), z[b,s,c] = sum_i weight[c,i] * v[b, s-(K-1-i)*dilation, c].

    The Engram block is `v + short_conv(rms_norm(v))`: norm and sum stay with the caller, so that
    the rows which this operator reads are the rows which it keeps.

    v         normalised rows, [B,S,C], C all channels of all streams.
    weight    [C,K], the last tap meets the current row, as in torch.nn.Conv1d.
    dilation  rows between two taps; 1 to 2^16.
    state     [B,(K-1)*dilation,C], the rows before this chunk, oldest first; absent: zeros, the
              start of a sequence.

    Returns (y, new_state): new_state is what the next chunk takes as `state`, the last
    (K-1)*dilation rows of state and v together.  Sums are float32 (float64 for float64); y is
    rounded once.

    *Source:* Engram, arXiv 2601.07372, section 3 (kernel 4, dilation = the largest n-gram).
    """
    w = weight.to(accumulator(v.dtype))
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for at in _blocks(v, weight, dilation, 6):
        z, _ = _convolved(v, w, dilation, state, at)
        y[at[0], :, at[1]] = torch.nn.functional.silu(z).to(v.dtype)
    reach = (weight.shape[1] - 1) * dilation
    return y, _rows(v, state, v.shape[1], reach)


@op(
    "dy[B,S,C], dnew_state[B,(K-1)*dilation,C], v[B,S,C], weight[C,K], state?[B,(K-1)*dilation,C]"
    " -> dv[B,S,C], dweight[C,K], dstate[B,(K-1)*dilation,C]",
    dtypes="dy: v; dnew_state: v; v: float; weight: v | f32; state: v;"
    " dv: v; dweight: acc(v); dstate: v",
    flops="B*S*C*(6*K + 8)",
    accumulate="max(2*K, B*S)",
    examples=_EXAMPLES,
)
def short_conv_backward(
    dy: Tensor,
    dnew_state: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    dilation: int,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dv, dweight, dstate) of `short_conv`; z is computed again.

    dz = dy * sigmoid(z) * (1 + z*(1 - sigmoid(z))); every row, of state or v, gets sum_i
    weight[c,i] * dz of the rows that read it by tap i, and its own gradient as a row of new_state;
    dweight[c,i] = sum dz * the row read. dweight is float32 (float64 for float64), summed in a
    fixed order; dstate is zero-sized if nothing is kept.

    *Source:* derived from the formula of `short_conv`.
    """
    S, K = v.shape[1], weight.shape[1]
    reach = (K - 1) * dilation
    w = weight.to(accumulator(v.dtype))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    dstate = torch.empty_like(dnew_state, memory_format=torch.contiguous_format)
    dweight = torch.zeros(w.shape, dtype=w.dtype, device=w.device)
    for at in _blocks(v, weight, dilation, 10):
        batch, channels = at
        z, rows = _convolved(v, w, dilation, state, at)
        sigmoid = torch.sigmoid(z)
        dz = dy[batch, :, channels].to(w.dtype) * sigmoid * (1 + z * (1 - sigmoid))
        drows = torch.zeros_like(rows)
        drows[:, S:] = dnew_state[batch, :, channels]
        for i in range(K):
            read = slice(i * dilation, i * dilation + S)
            drows[:, read] += dz * w[channels, i]
            dweight[channels, i] += (dz * rows[:, read]).sum((0, 1))
        dstate[batch, :, channels] = drows[:, :reach].to(v.dtype)
        dv[batch, :, channels] = drows[:, reach:].to(v.dtype)
    return dv, dweight, dstate


def _blocks(v: Tensor, weight: Tensor, dilation: int, copies: int) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and channels: both are independent, so a block holds all rows and nothing is
    carried over."""
    B, S, C = v.shape
    column = (S + (weight.shape[1] - 1) * dilation) * accumulator(v.dtype).itemsize * copies
    fit = max(1, config.workspace_bytes() // max(1, column))
    width = max(1, min(C, fit))
    height = max(1, min(B, fit // width))
    for b in range(0, B, height):
        for c in range(0, C, width):
            yield slice(b, min(b + height, B)), slice(c, min(c + width, C))


def _convolved(
    v: Tensor, w: Tensor, dilation: int, state: Tensor | None, at: tuple[slice, slice]
) -> tuple[Tensor, Tensor]:
    """(z, the rows of state and v together) of one block, in the accumulator's dtype."""
    batch, channels = at
    S, K = v.shape[1], w.shape[1]
    part = v[batch, :, channels]
    kept = None if state is None else state[batch, :, channels]
    rows = _rows(part, kept, S, S + (K - 1) * dilation).to(w.dtype)
    z = torch.zeros(part.shape, dtype=w.dtype, device=v.device)
    for i in range(K):
        z += rows[:, i * dilation : i * dilation + S] * w[channels, i]
    return z, rows


def _rows(v: Tensor, state: Tensor | None, stop: int, count: int) -> Tensor:
    """The `count` rows before position `stop`, new memory; those before position 0 come from the
    state."""
    older = max(0, count - stop)
    newer = v[:, stop - (count - older) : stop]
    if older == 0:
        return newer.clone(memory_format=torch.contiguous_format)
    if state is None:
        before = v.new_zeros((v.shape[0], older, v.shape[2]))
    else:
        before = state[:, state.shape[1] - older :]
    return torch.cat((before, newer), dim=1)


@short_conv.gradient(save="v weight state")
def _(saved, dy, dnew_state):
    dv, dweight, dstate = short_conv_backward(
        dy, dnew_state, saved.v, saved.weight, dilation=saved.dilation, state=saved.state
    )
    return {"v": dv, "weight": dweight.to(saved.weight.dtype), "state": dstate}


@short_conv.reference
def _(v, weight, dilation, state):
    (B, S, C), K = v.shape, weight.shape[1]
    reach = (K - 1) * dilation
    kept = np.zeros((B, reach, C)) if state is None else state
    rows = np.concatenate([kept, v], axis=1)
    z = np.zeros((B, S, C))
    for s in range(S):
        for i in range(K):
            z[:, s] += weight[:, i] * rows[:, reach + s - (K - 1 - i) * dilation]
    return z / (1 + np.exp(-z)), rows[:, S:]


@short_conv_backward.reference
def _(dy, dnew_state, v, weight, dilation, state):
    (B, S, C), K = v.shape, weight.shape[1]
    reach = (K - 1) * dilation
    kept = np.zeros((B, reach, C)) if state is None else state
    rows = np.concatenate([kept, v], axis=1)
    drows, dweight = np.zeros_like(rows), np.zeros_like(weight)
    drows[:, S:] = dnew_state
    for s in range(S):
        taps = [s + i * dilation for i in range(K)]
        z = sum(weight[:, i] * rows[:, tap] for i, tap in enumerate(taps))
        sigmoid = 1 / (1 + np.exp(-z))
        dz = dy[:, s] * sigmoid * (1 + z * (1 - sigmoid))
        for i, tap in enumerate(taps):
            drows[:, tap] += weight[:, i] * dz
            dweight[:, i] += (dz * rows[:, tap]).sum(0)
    return drows[:, reach:], dweight, drows[:, :reach]


def _rules(K: int, dilation: int) -> str | None:
    if K < 1:
        return f"weight has K = {K} taps; must be >= 1"
    if dilation < 1:
        return f"dilation is {dilation}; must be >= 1"
    return bounds.above(bounds.DILATION, dilation=dilation)


for _op in (short_conv, short_conv_backward):
    _op.check(_rules)
