"""Gated activations h(gate, up) of the experts, with their clamps and gradients."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "swiglu_oai")
# gelu_tanh(g) = g/2 * (1 + tanh(c * (g + a * g**3))), Hendrycks & Gimpel 2016, arXiv:1606.08415.
GELU_A = 0.044715
GELU_C = math.sqrt(2.0 / math.pi)


def gated(
    both: Tensor, activation: str, limit: float | None, interleaved: bool, alpha: float
) -> Tensor:
    """h[R,I] of gate and up, which stand side by side (or alternate) in both[R,2I]; a new tensor of
    the same dtype.

    f(min(gate, L)) * clamp(up, -L, L), or for "swiglu_oai" (up + 1) * gate * sigmoid(alpha * gate).
    Without the limit nothing is clamped.  NaN stays NaN.
    """
    gate, up = _split(both, interleaved)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu_oai":
        up = up + 1.0
    return _value_and_slope(gate, activation, alpha, slope=False)[0] * up


def gated_backward(
    dh: Tensor, both: Tensor, activation: str, limit: float | None, interleaved: bool, alpha: float
) -> Tensor:
    """Gradient of `gated` in both, [R,2I] in its layout; zero strictly beyond a clamp."""
    gate, up = _split(both, interleaved)
    g, u = gate, up
    if limit is not None:
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    value, slope = _value_and_slope(g, activation, alpha, slope=True)
    dgate = dh * (u + 1.0 if activation == "swiglu_oai" else u) * slope
    dup = dh * value
    if limit is not None:
        dgate = dgate.masked_fill(gate > limit, 0.0)
        dup = dup.masked_fill(up.abs() > limit, 0.0)
    if interleaved:
        return torch.stack((dgate, dup), -1).flatten(-2)
    return torch.cat((dgate, dup), -1)


def _split(both: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return both[..., ::2], both[..., 1::2]
    half = both.shape[-1] // 2
    return both[..., :half], both[..., half:]


def _value_and_slope(
    g: Tensor, activation: str, alpha: float, slope: bool
) -> tuple[Tensor, Tensor]:
    # Written out of exp, erf and tanh: torch's silu, sigmoid and gelu(tanh) round the last elements
    # of an array differently from the others on CPUs (torch 2.13, AVX-512), and a row must not
    # depend on where it stands.
    if activation in ("silu", "swiglu_oai"):
        a = 1.0 if activation == "silu" else alpha
        one_plus = 1.0 + torch.exp(-a * g)
        value = g / one_plus
        if not slope:
            return value, value
        sigmoid = 1.0 / one_plus
        return value, sigmoid * (1.0 + a * g * (1.0 - sigmoid))
    if activation == "gelu":
        below = 0.5 * (1.0 + torch.erf(g * math.sqrt(0.5)))
        density = torch.exp(-0.5 * g * g) / math.sqrt(2.0 * math.pi) if slope else g
        return g * below, below + g * density
    if activation == "gelu_tanh":
        t = torch.tanh(GELU_C * (g + GELU_A * g * g * g))
        inner = GELU_C * (1.0 + 3.0 * GELU_A * g * g) if slope else g
        return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * inner
    return g.clamp_min(0.0), (g > 0).to(g.dtype)


def reference_gated(
    gate: np.ndarray, up: np.ndarray, activation: str, limit: float | None, alpha: float
) -> np.ndarray:
    """`gated` in float64, gate and up apart."""
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    if activation == "swiglu_oai":
        return (up + 1) * gate * _sigmoid(alpha * gate)
    return _reference_value(gate, activation) * up


def _reference_value(g: np.ndarray, activation: str) -> np.ndarray:
    if activation == "silu":
        return g * _sigmoid(g)
    if activation == "gelu":
        return g * 0.5 * (1 + _erf(g / math.sqrt(2)))
    if activation == "gelu_tanh":
        return g * 0.5 * (1 + np.tanh(GELU_C * (g + GELU_A * g**3)))
    return np.maximum(g, 0)


def reference_gated_backward(
    dh: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    activation: str,
    limit: float | None,
    alpha: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `reference_gated` in gate and up."""
    g = gate if limit is None else np.minimum(gate, limit)
    u = up if limit is None else np.clip(up, -limit, limit)
    if activation == "swiglu_oai":
        s = _sigmoid(alpha * g)
        value, slope, u = g * s, s + alpha * g * s * (1 - s), u + 1
    else:
        value = _reference_value(g, activation)
        if activation == "silu":
            s = _sigmoid(g)
            slope = s + g * s * (1 - s)
        elif activation == "gelu":
            slope = 0.5 * (1 + _erf(g / math.sqrt(2))) + g * np.exp(-g * g / 2) / math.sqrt(
                2 * math.pi
            )
        elif activation == "gelu_tanh":
            t = np.tanh(GELU_C * (g + GELU_A * g**3))
            slope = 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * GELU_C * (1 + 3 * GELU_A * g * g)
        else:
            slope = (g > 0).astype(float)
    dgate, dup = dh * u * slope, dh * value
    if limit is not None:
        dgate, dup = np.where(gate > limit, 0, dgate), np.where(np.abs(up) > limit, 0, dup)
    return dgate, dup


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -z))


_erf = np.vectorize(math.erf, otypes=[float])
