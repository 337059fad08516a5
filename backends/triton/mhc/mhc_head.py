"""mhc_head: mhc_pre's passes, without post and comb."""

from __future__ import annotations

from torch import Tensor

from transom.kernels.mhc.mhc_head import mhc_head, mhc_head_backward
from transom.requires import at_most

from .._offer import floats, offer
from .mhc_pre import LARGEST, mixed, mixed_backward


@offer(mhc_head, *floats("x"), at_most("R", LARGEST))
def forward(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, rms_eps: float
) -> Tensor:
    """h = sum_j pre[j] * x[j]."""
    return mixed(x, fn, scale, base, 1, eps, rms_eps, 1.0, True)[0]


@offer(mhc_head_backward, *floats("x"), at_most("R", LARGEST))
def backward(
    dh: Tensor, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dfn, dscale, dbase)."""
    return mixed_backward(dh, None, None, x, fn, scale, base, 1, eps, rms_eps, 1.0)
