"""A small operator with every feature of a declaration, for the tests of the registry."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.op import Weight


@op(
    "x[*B, D], weight[D], bias?[D] -> y[*B, D], rms[*B]",
    dtypes="x: float; weight, bias: x | f32; y: x; rms: acc(x)",
    flops="4*B*D",
    accumulate="D",
    autocast="low: x",
    batch="*B",
    examples=[dict(B=(2, 3), D=8), dict(B=(64,), D=4096)],
)
def scaled_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """y = x / rms * weight + bias, rms = sqrt(mean(x^2) + eps)."""
    f = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = torch.sqrt(f.square().mean(-1) + eps)
    y = f / rms[..., None] * weight
    return (y if bias is None else y + bias).to(x.dtype), rms


@scaled_norm.reference
def _(x, weight, bias, eps):
    rms = np.sqrt(np.mean(x * x, -1) + eps)
    return x / rms[..., None] * weight + (0 if bias is None else bias), rms


@scaled_norm.check
def _(eps, D):
    if eps < 0:
        return f"eps is {eps}; expected >= 0"
    if D == 0:
        return "D is 0; expected 1 or more"
    return None


@op(
    "dy[*B, D], x[*B, D], weight[D], rms[*B] -> dx[*B, D], dweight[D], dbias[D]",
    dtypes="dy, x: float; weight: x | f32; rms: acc(x); dx: x; dweight, dbias: weight",
    examples=[dict(B=(2, 3), D=8)],
    accumulate="B*D",
)
def scaled_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled_norm."""
    f, d = x.float() if x.dtype != torch.float64 else x, dy
    n = f / rms[..., None]
    g = d * weight
    dx = (g - n * (g * n).mean(-1, keepdim=True)) / rms[..., None]
    rows = (d * n).reshape(-1, x.shape[-1])
    dbias = d.reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), rows.sum(0).to(weight.dtype), dbias.to(weight.dtype)


@scaled_norm.gradient(save="x weight rms")
def _(saved, dy, drms):
    dx, dweight, dbias = scaled_norm_backward(dy, saved.x, saved.weight, saved.rms)
    return {"x": dx, "weight": dweight, "bias": dbias}


@op(
    "x[T,K], weight[N,K], index?[M] -> y[T,N]",
    dtypes="x: float; weight: x | f32 | quant; index: index; y: x",
    flops="2*T*K*N",
    accumulate="K",
    batch="T",
    examples=[dict(T=4, K=16, N=8, M=2)],
)
def scaled_linear(
    x: Tensor, weight: Weight, index: Tensor | None = None, *, mode: str = "plain"
) -> Tensor:
    """y = x @ weight^T, for the tests of weights, values and modes."""
    w = weight if isinstance(weight, Tensor) else weight.dequantize()
    return (x.to(torch.float32) @ w.to(torch.float32).t()).to(x.dtype)


@scaled_linear.check_values
def _(index, N):
    if index is not None and index.numel() and int(index.max()) >= N:
        return f"index holds {int(index.max())}; expected below N = {N}"
    return None


@scaled_linear.check
def _(mode):
    return None if mode in ("plain",) else f"mode is {mode!r}; expected plain"
