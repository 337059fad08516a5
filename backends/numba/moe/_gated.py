"""Gated activations h(gate, up) inside kernels, over rows of float32."""

from __future__ import annotations

import math

import numpy as np

from transom.kernels.moe._gated import ACTIVATIONS, GELU_A, GELU_C

from .._compile import part, strict
from .._numbers import exp

SILU, GELU, GELU_TANH, RELU, SWIGLU_OAI = range(len(ACTIVATIONS))
_ONE, _HALF, _ROOT_HALF = np.float32(1), np.float32(0.5), np.float32(math.sqrt(0.5))
_A, _C = np.float32(GELU_A), np.float32(GELU_C)


@strict
def _tanh(x):
    """tanh of a float32, to its unit roundoff absolutely."""
    return _ONE - np.float32(2) / (exp(np.float32(2) * x) + _ONE)


@part
def gate_rows(gate, up, form, out):
    """out = h(gate, up); form is (activation, limit or Inf, alpha). NaN stays NaN."""
    activation, limit, alpha = form
    n = gate.shape[0]
    for i in range(n):
        g, u = gate[i], up[i]
        gate[i] = limit if g > limit else g
        u = limit if u > limit else u
        up[i] = -limit if u < -limit else u
    if activation == SILU:
        for i in range(n):
            out[i] = gate[i] / (_ONE + exp(-gate[i])) * up[i]
    elif activation == SWIGLU_OAI:
        for i in range(n):
            out[i] = gate[i] / (_ONE + exp(-alpha * gate[i])) * (up[i] + _ONE)
    elif activation == GELU:
        for i in range(n):
            below = _HALF * (_ONE + np.float32(math.erf(gate[i] * _ROOT_HALF)))
            out[i] = gate[i] * below * up[i]
    elif activation == GELU_TANH:
        for i in range(n):
            g = gate[i]
            out[i] = _HALF * g * (_ONE + _tanh(_C * (g + _A * g * g * g))) * up[i]
    else:
        for i in range(n):
            g = gate[i]
            out[i] = (np.float32(0) if g < 0 else g) * up[i]
