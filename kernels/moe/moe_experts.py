"""The experts of a mixture: gate and up, activation, down, weighted sum over a token's slots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.kernels._extremes import extremes
from transom.op import Weight
from transom.ranges import satisfied_by

from ._gated import ACTIVATIONS, gated, gated_backward, reference_gated, reference_gated_backward
from .grouped_gemm import accumulator, row_steps, segments, times_weight, times_weight_transposed

POSITIONS = ("after", "before")

_SHAPES = (
    "ids[T,K], weights[T,K], gate_up[E,2*I,D], down[E,D,I], gate_up_bias?[E,2*I], down_bias?[E,D]"
)
_EXAMPLES: list[dict[str, Any]] = [
    dict(T=6, D=32, I=16, E=4, K=2),
    dict(T=1, D=2048, I=768, E=128, K=8),  # Qwen3-30B-A3B, one token
    dict(T=512, D=2880, I=2880, E=8, K=4, activation="swiglu_oai", limit=7.0, interleaved=True),
    dict(T=512, D=4096, I=2048, E=16, K=6, limit=10.0),  # DeepSeek-V4-Flash, one of 16 ranks
]


@op(
    f"x[T,D], {_SHAPES} -> y[T,D]",
    dtypes="x: float; ids: index; weights: float; gate_up, down: x | f32 | quant;"
    " gate_up_bias, down_bias: x | f32; y: x",
    flops="6*T*K*D*I",
    bytes="min(E, T*K)*(2*I*D*size.gate_up + D*I*size.down)"
    " + 2*T*D*size.x + T*K*(size.ids + size.weights)",
    accumulate="D + I + K",
    autocast="low: x",
    batch="T",
    examples=_EXAMPLES,
)
def moe_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Weight,
    down: Weight,
    *,
    activation: str = "silu",
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_position: str = "after",
    interleaved: bool = False,
    alpha: float = 1.702,
) -> Tensor:
    """y[t] = sum over slots s of weights[t,s] * (down[e] @ h(gate_up[e] @ x[t] + b) + b').

    e = ids[t,s]; b and b' are gate_up_bias[e] and down_bias[e], if given.

    ids           -1: an empty slot; it adds nothing and its weight is not read (NaN there never
                  matters).  Anything outside 0..E-1 is skipped where values are not checked.  A
                  repeated id counts in each slot.
    weights       routing weights, any float dtype.
    gate_up       rows 0..I-1 give the gate, rows I..2I-1 up; `interleaved`: even rows the gate, odd
                  rows up.  Any strides (transposed storage is not copied); a QuantizedWeight is
                  dequantised by tiles.
    activation    h(gate, up) with f(gate) * up for f = "silu", "gelu" (erf), "gelu_tanh", "relu",
                  or "swiglu_oai": (up + 1) * gate * sigmoid(alpha * gate).
    limit         L > 0: first gate = min(gate, L), up = clamp(up, -L, L); a value of exactly L
                  passes its gradient, NaN stays NaN.
    weight_position   "after": the weight multiplies the down product and its bias, as in the
                  formula.  "before": it multiplies h, and the bias separately; equal but for
                  rounding.

    Returns a new [T,D] tensor in the dtype of x; products, activation and the sum over slots, which
    runs in slot order, are float32 (float64 for float64) and rounded once.  With x of 16 bits and
    int8, int4 or mxfp4 weights an implementation may round the rows of x and h first to 16-bit
    fixed point, as in `grouped_gemm`.  A token without experts gets zero.  Temporaries stay within
    the workspace (TRANSOM_WORKSPACE_MB) or those of one token.  Under
    torch.use_deterministic_algorithms(True) a token's bits do not depend on the other tokens of the
    batch.

    Raises ValueError for ids outside -1..E-1, unknown names, or a limit that is not > 0.

    *Source:* op contracts 5.1 to 5.3; DeepSeek-V4, arXiv 2606.19348 (clamped SwiGLU); gpt-oss
    (swiglu_oai).
    """
    acc = accumulator(x.dtype)
    T, D = x.shape
    K = ids.shape[1]
    y = x.new_zeros(T, D)
    for first, last in _token_steps(T, K * D * acc.itemsize):
        out = x.new_zeros((last - first) * K, D, dtype=acc)
        part, w = x[first:last], weights[first:last].reshape(-1).to(acc)
        for e, pair in _pairs(ids[first:last], gate_up, acc):
            rows = part.index_select(0, pair // K).to(acc)
            h = gated(
                _with_bias(times_weight(rows, gate_up, e), gate_up_bias, e),
                activation,
                limit,
                interleaved,
                alpha,
            )
            scale = w.index_select(0, pair)[:, None]
            if weight_position == "before":
                product = times_weight(h * scale, down, e)
                if down_bias is not None:
                    product += scale * down_bias[e].to(acc)
            else:
                product = _with_bias(times_weight(h, down, e), down_bias, e) * scale
            out.index_copy_(0, pair, product)
        y[first:last] = _sum_over_slots(out.view(last - first, K, D))
    return y


def _token_steps(T: int, bytes_per_token: int) -> Iterator[tuple[int, int]]:
    """Pieces of the tokens whose expanded rows fit a quarter of the workspace (one always does)."""
    step = max(1, config.workspace_bytes() // 4 // max(1, bytes_per_token))
    for first in range(0, T, step):
        yield first, min(T, first + step)


def _pairs(ids: Tensor, gate_up: Weight, acc: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(expert, numbers t*K + s of some of its slots), expert by expert, slots in order."""
    E, twice, D = gate_up.shape
    order, ends = _sorted_pairs(ids, E)
    for e, start, stop in segments(ends, order.numel()):
        # rows, gate and up, their gradient, activation and its gradient, product
        for a, b in row_steps(start, stop, (3 * D + 4 * twice) * acc.itemsize):
            yield e, order[a:b]


def _sorted_pairs(ids: Tensor, E: int) -> tuple[Tensor, list[int]]:
    """Slot numbers sorted by expert, stably, and the inclusive end of each expert among them."""
    flat = ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < E), flat, E)
    expert, order = torch.sort(flat, stable=True)
    ends = torch.searchsorted(expert, torch.arange(E, device=ids.device), right=True)
    return order, ends.tolist()


def _with_bias(rows: Tensor, bias: Tensor | None, e: int) -> Tensor:
    return rows if bias is None else rows + bias[e].to(rows.dtype)


def _sum_over_slots(rows: Tensor) -> Tensor:
    """rows[T,K,D] added over K, one slot after the other, so that the order never depends on T."""
    total = rows.new_zeros(rows.shape[0], rows.shape[2])
    for slot in range(rows.shape[1]):
        total = total + rows[:, slot]
    return total


def reference_moe_experts(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    activation: str,
    limit: float | None,
    gate_up_bias: np.ndarray | None,
    down_bias: np.ndarray | None,
    weight_position: str,
    interleaved: bool,
    alpha: float,
) -> np.ndarray:
    """`moe_experts` in float64, slot by slot."""
    y = np.zeros(x.shape)
    for t in range(ids.shape[0]):
        for e, w in zip(ids[t], weights[t], strict=True):
            if e < 0:
                continue
            both = gate_up[e] @ x[t]
            if gate_up_bias is not None:
                both = both + gate_up_bias[e]
            gate, up = (both[::2], both[1::2]) if interleaved else np.split(both, 2)
            product = down[e] @ reference_gated(gate, up, activation, limit, alpha)
            y[t] += w * (product if down_bias is None else product + down_bias[e])
    return y


moe_experts.reference(reference_moe_experts)


def _fault(activation: str, limit: float | None, weight_position: str) -> str | None:
    if activation not in ACTIVATIONS:
        return f"activation is {activation!r}; must be one of {', '.join(map(repr, ACTIVATIONS))}"
    if limit is not None and not limit > 0:
        return f"limit is {limit}; must be > 0 or None"
    if weight_position not in POSITIONS:
        known = ", ".join(map(repr, POSITIONS))
        return f"weight_position is {weight_position!r}; must be one of {known}"
    return None


@satisfied_by("-1 <= ids <= E - 1")
def _ids_fault(ids: Tensor, E: int) -> str | None:
    low, high = extremes(ids) if ids.numel() else (-1, -1)
    if low < -1:
        return f"ids holds {low}; must be in -1..E-1 = -1..{E - 1}"
    if high >= E:
        return f"ids holds {high}; must be in -1..E-1 = -1..{E - 1}; an empty slot is -1"
    return None


def _sample(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    """Some empty slots and repeated ids; weights that keep the size of what they multiply."""
    T, K, E, D, width = (dims[n] for n in ("T", "K", "E", "D", "I"))
    return {
        "ids": rng.integers(-1, E, (T, K)),
        "weights": rng.random((T, K)),
        "gate_up": rng.standard_normal((E, 2 * width, D)) / max(1, D) ** 0.5,
        "down": rng.standard_normal((E, D, width)) / max(1, width) ** 0.5,
    }


moe_experts.check(_fault)
moe_experts.check_values(_ids_fault)
moe_experts.sample(_sample)


@moe_experts.gradient(save="x ids weights gate_up down gate_up_bias down_bias")
def _(saved: Any, dy: Tensor) -> dict[str, Tensor | None]:
    form = {
        "activation": saved.activation,
        "limit": saved.limit,
        "weight_position": saved.weight_position,
        "interleaved": saved.interleaved,
        "alpha": saved.alpha,
    }
    out: dict[str, Tensor | None] = {}
    call = (dy, saved.x, saved.ids, saved.weights, saved.gate_up, saved.down)
    biases = {"gate_up_bias": saved.gate_up_bias, "down_bias": saved.down_bias}
    if any(saved.needs(n) for n in ("x", "weights", *biases)):
        out["x"], out["weights"], *dbiases = moe_experts_backward(*call, **biases, **form)
        for (name, bias), gradient in zip(biases.items(), dbiases, strict=True):
            out[name] = None if bias is None else gradient.to(bias.dtype)
    if saved.needs("gate_up") or saved.needs("down"):
        out["gate_up"], out["down"] = moe_experts_backward_experts(
            *call, gate_up_bias=saved.gate_up_bias, **form
        )
    return out


@op(
    f"dy[T,D], x[T,D], {_SHAPES} -> dx[T,D], dweights[T,K], dgate_up_bias[E,2*I], ddown_bias[E,D]",
    dtypes="dy: float; x: dy; ids: index; weights: float; gate_up, down: dy | f32 | quant;"
    " gate_up_bias, down_bias: dy | f32; dx: dy; dweights: weights;"
    " dgate_up_bias, ddown_bias: acc(dy)",
    flops="10*T*K*D*I",
    bytes="min(E, T*K)*(2*I*D*size.gate_up + D*I*size.down) + 3*T*D*size.x + E*(2*I+D)*4",
    accumulate="D + I + K + T",
    examples=_EXAMPLES,
)
def moe_experts_backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Weight,
    down: Weight,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
    weight_position: str = "after",
    interleaved: bool = False,
    alpha: float = 1.702,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `moe_experts` in x, in the routing weights and in the two biases; works with
    quantised weights.

    With g = down[e].T @ dy[t]: dweights[t,s] = g . h (+ dy . down_bias[e]), and dx[t] is the sum
    over slots, in slot order, of gate_up[e].T @ dh(w * g).  The activations are computed again, not
    kept.

    Returns new tensors: dx as dy, dweights as weights, and the gradients of the biases, [E,2*I] and
    [E,D], in float32 (float64 for float64) whether or not there are biases; zero for experts
    without rows.  Empty slots: zero.

    *Source:* op contracts 5.4.
    """
    acc = accumulator(dy.dtype)
    T, D = x.shape
    K = ids.shape[1]
    dx, dweights = (
        torch.zeros_like(dy, memory_format=torch.contiguous_format),
        weights.new_zeros(T, K),
    )
    dgate_up_bias = dy.new_zeros(gate_up.shape[:2], dtype=acc)
    ddown_bias = dy.new_zeros(down.shape[:2], dtype=acc)
    for first, last in _token_steps(T, K * D * acc.itemsize):
        out = dy.new_zeros((last - first) * K, D, dtype=acc)
        dw = dy.new_zeros((last - first) * K, dtype=acc)
        part, dpart = x[first:last], dy[first:last]
        w = weights[first:last].reshape(-1).to(acc)
        for e, pair in _pairs(ids[first:last], gate_up, acc):
            rows = part.index_select(0, pair // K).to(acc)
            drows = dpart.index_select(0, pair // K).to(acc)
            scale = w.index_select(0, pair)[:, None]
            both = _with_bias(times_weight(rows, gate_up, e), gate_up_bias, e)
            h = gated(both, activation, limit, interleaved, alpha)
            dh = times_weight_transposed(drows, down, e)
            dot = (dh * h).sum(1)
            if down_bias is not None:
                dot = dot + (drows * down_bias[e].to(acc)).sum(1)
            dw.index_copy_(0, pair, dot)
            dboth = gated_backward(dh * scale, both, activation, limit, interleaved, alpha)
            out.index_copy_(0, pair, times_weight_transposed(dboth, gate_up, e))
            dgate_up_bias[e] += dboth.sum(0)
            ddown_bias[e] += (drows * scale).sum(0)
        dx[first:last] = _sum_over_slots(out.view(last - first, K, D))
        dweights[first:last] = dw.view(last - first, K)
    return dx, dweights, dgate_up_bias, ddown_bias


@moe_experts_backward.reference
def _(
    dy: np.ndarray,
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    gate_up_bias: np.ndarray | None,
    down_bias: np.ndarray | None,
    activation: str,
    limit: float | None,
    weight_position: str,
    interleaved: bool,
    alpha: float,
) -> tuple[np.ndarray, ...]:
    dx, dweights = np.zeros(x.shape), np.zeros(weights.shape)
    dgate_up_bias, ddown_bias = np.zeros(gate_up.shape[:2]), np.zeros(down.shape[:2])
    for t, s, e, both, h, slope in _reference_slots(
        x, ids, gate_up, gate_up_bias, activation, limit, interleaved, alpha
    ):
        g = down[e].T @ dy[t]
        dweights[t, s] = g @ h + (0 if down_bias is None else dy[t] @ down_bias[e])
        dboth = weights[t, s] * slope(g)
        dx[t] += gate_up[e].T @ dboth
        dgate_up_bias[e] += dboth
        ddown_bias[e] += weights[t, s] * dy[t]
    return dx, dweights, dgate_up_bias, ddown_bias


def _reference_slots(
    x: np.ndarray,
    ids: np.ndarray,
    gate_up: np.ndarray,
    bias: np.ndarray | None,
    activation: str,
    limit: float | None,
    interleaved: bool,
    alpha: float,
) -> Iterator[tuple[Any, ...]]:
    """(t, s, e, gate and up, h, gradient of h -> that of gate and up) of every used slot."""
    for t, s in zip(*np.nonzero(ids >= 0), strict=True):
        e = ids[t, s]
        both = gate_up[e] @ x[t] + (0 if bias is None else bias[e])
        index = np.arange(both.size)
        g_at, u_at = (index[::2], index[1::2]) if interleaved else np.split(index, 2)
        gate, up = both[g_at], both[u_at]
        h = reference_gated(gate, up, activation, limit, alpha)

        def slope(
            dh: np.ndarray,
            gate: np.ndarray = gate,
            up: np.ndarray = up,
            g_at: np.ndarray = g_at,
            u_at: np.ndarray = u_at,
            size: int = both.size,
        ) -> np.ndarray:
            out = np.zeros(size)
            out[g_at], out[u_at] = reference_gated_backward(dh, gate, up, activation, limit, alpha)
            return out

        yield t, s, e, both, h, slope


moe_experts_backward.check(_fault)
moe_experts_backward.check_values(_ids_fault)
moe_experts_backward.sample(_sample)


@op(
    "dy[T,D], x[T,D], ids[T,K], weights[T,K], gate_up[E,2*I,D], down[E,D,I], gate_up_bias?[E,2*I]"
    " -> dgate_up[E,2*I,D], ddown[E,D,I]",
    dtypes="dy: float; x: dy; ids: index; weights: float; gate_up, down: dy | f32;"
    " gate_up_bias: dy | f32;"
    " dgate_up: gate_up; ddown: down",
    flops="12*T*K*D*I",
    accumulate="T*K + D + I",
    examples=_EXAMPLES,
)
def moe_experts_backward_experts(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
    weight_position: str = "after",
    interleaved: bool = False,
    alpha: float = 1.702,
) -> tuple[Tensor, Tensor]:
    """Gradients of `moe_experts` in gate_up and down: sums of outer products over the rows of each
    expert.

    ddown[e] = sum w * outer(dy, h), dgate_up[e] = sum outer(dh(w * down[e].T @ dy), x).  The
    activations are computed again, by tiles of rows.

    Returns new tensors of the shapes and dtypes of the weights; sums are float32 (float64 for
    float64), in slot order, and rounded once (beyond the workspace that takes one expert's gradient
    in float32).  An expert without rows gets exactly zero.

    *Source:* op contracts 5.2 (layout "k-grouped") and 5.4.
    """
    acc = accumulator(dy.dtype)
    K = ids.shape[1]
    dgate_up = torch.zeros(gate_up.shape, dtype=gate_up.dtype, device=dy.device)
    ddown = torch.zeros(down.shape, dtype=down.dtype, device=dy.device)
    w = weights.reshape(-1).to(acc)
    totals: dict[int, tuple[Tensor, Tensor]] = {}
    for e, pair in _pairs(ids, gate_up, acc):
        if e not in totals:
            _store(totals, dgate_up, ddown)
            totals[e] = dgate_up[e].to(acc), ddown[e].to(acc)
        rows = x.index_select(0, pair // K).to(acc)
        drows = dy.index_select(0, pair // K).to(acc) * w.index_select(0, pair)[:, None]
        both = _with_bias(times_weight(rows, gate_up, e), gate_up_bias, e)
        dh = times_weight_transposed(drows, down, e)
        dboth = gated_backward(dh, both, activation, limit, interleaved, alpha)
        totals[e][0].addmm_(dboth.t(), rows)
        totals[e][1].addmm_(drows.t(), gated(both, activation, limit, interleaved, alpha))
    _store(totals, dgate_up, ddown)
    return dgate_up, ddown


def _store(totals: dict[int, tuple[Tensor, Tensor]], dgate_up: Tensor, ddown: Tensor) -> None:
    """Round the sums of the expert at hand into the gradients and forget them."""
    for e, (total_gate_up, total_down) in totals.items():
        for into, total in ((dgate_up[e], total_gate_up), (ddown[e], total_down)):
            if into.dtype != total.dtype:  # else the sum was kept in place
                into.copy_(total)
    totals.clear()


@moe_experts_backward_experts.reference
def _(
    dy: np.ndarray,
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    gate_up_bias: np.ndarray | None,
    activation: str,
    limit: float | None,
    weight_position: str,
    interleaved: bool,
    alpha: float,
) -> tuple[np.ndarray, ...]:
    dgate_up, ddown = np.zeros(gate_up.shape), np.zeros(down.shape)
    for t, s, e, _, h, slope in _reference_slots(
        x, ids, gate_up, gate_up_bias, activation, limit, interleaved, alpha
    ):
        dgate_up[e] += np.outer(weights[t, s] * slope(down[e].T @ dy[t]), x[t])
        ddown[e] += weights[t, s] * np.outer(dy[t], h)
    return dgate_up, ddown


moe_experts_backward_experts.check(_fault)
moe_experts_backward_experts.check_values(_ids_fault)
moe_experts_backward_experts.sample(_sample)
