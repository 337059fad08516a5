"""Hyper-connections around any sublayer: R residual streams, mixed by learned weights."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor, nn

import transom

from .expected import expect

NEAR_ONE = 8.0
"""A logit whose sigmoid, and whose softmax against zeros, is 1 to about 1e-3."""


class _Mixing(nn.Module):
    """fn, scale and base stay float32 when the model is cast: bfloat16 mixes let streams drift."""

    fn: nn.Parameter
    scale: nn.Parameter
    base: nn.Parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Mixing:
        if recurse:
            for child in self.children():
                child._apply(fn)

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = moved.dtype in (torch.float32, torch.float64)
            return moved if wide else tensor.to(moved.device)

        return super()._apply(kept, recurse=False)  # type: ignore[no-untyped-call]


class HyperConnection(_Mixing):
    """y[k] = post[k] * sublayer(sum_j pre[j]*x[j]) + sum_j comb[j,k]*x[j], weights made from x.

    sublayer    any module that takes [..., D] first and returns [..., D], alone or as the first of
                a tuple
    hidden      D; streams R, the number of residual streams
    iterations, eps, rms_eps, post_scale
                as for `transom.mhc_pre`
    Parameters: fn [(2+R)*R, R*D], scale [3], base [(2+R)*R], float32 always.  They start where the
    block is a plain residual to about 1e-3 for equal streams: pre = 1/R, post = 1, comb the
    identity.

    *Source:* mHC, arXiv 2512.24880; DeepSeek-V4, arXiv 2606.19348.
    """

    def __init__(
        self,
        sublayer: nn.Module,
        hidden: int,
        streams: int,
        *,
        iterations: int,
        eps: float,
        rms_eps: float,
        post_scale: float,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if hidden < 1 or streams < 1:
            raise ValueError(
                f"HyperConnection: hidden is {hidden}, streams is {streams}; both must be >= 1"
            )
        if not post_scale > 0:
            raise ValueError(f"HyperConnection: post_scale is {post_scale}; must be > 0")
        self.sublayer = sublayer
        self.hidden, self.streams = hidden, streams
        self.iterations, self.eps = iterations, eps
        self.rms_eps, self.post_scale = rms_eps, post_scale
        rows = (2 + streams) * streams
        made: Any = {"device": device, "dtype": torch.float32}
        self.fn = nn.Parameter(torch.empty(rows, streams * hidden, **made))
        self.scale = nn.Parameter(torch.empty(3, **made))
        self.base = nn.Parameter(torch.empty(rows, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain residual connection; the sublayer is left as it is."""
        R = self.streams
        nn.init.normal_(self.fn, std=0.02)
        nn.init.constant_(self.scale, 0.01)
        with torch.no_grad():
            self.base[:R] = _logit(1 / R)
            self.base[R : 2 * R] = _logit(1 / self.post_scale)
            self.base[2 * R :] = NEAR_ONE * torch.eye(R, device=self.base.device).flatten()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[..., R, D] -> [..., R, D]; further arguments go to the sublayer, its further results are
        passed on."""
        expect(
            "HyperConnection",
            "x",
            x,
            "... streams hidden",
            streams=self.streams,
            hidden=self.hidden,
        )
        h, post, comb = transom.mhc_pre(
            x,
            self.fn,
            self.scale,
            self.base,
            iterations=self.iterations,
            eps=self.eps,
            rms_eps=self.rms_eps,
            post_scale=self.post_scale,
        )
        result = self.sublayer(h, *args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if not isinstance(first, Tensor) or first.shape != h.shape:
            seen = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(
                f"HyperConnection: the sublayer gave {seen} for {list(h.shape)}; "
                "expected the shape that it was given"
            )
        if isinstance(result, tuple):
            return (transom.mhc_post(result[0], x, post, comb), *result[1:])
        return transom.mhc_post(result, x, post, comb)

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"hidden={self.hidden}, streams={self.streams}, iterations={self.iterations}"


class HyperConnectionHead(_Mixing):
    """h = sum_j pre[j] * x[j]: the streams after the last layer become one, without Sinkhorn.

    hidden D, streams R; eps, rms_eps as for `transom.mhc_head`.  Parameters: fn [R, R*D], scale
    [1], base [R], float32 always; they start near the mean of the streams.

    *Source:* DeepSeek-V4, arXiv 2606.19348.
    """

    def __init__(
        self,
        hidden: int,
        streams: int,
        *,
        eps: float,
        rms_eps: float,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if hidden < 1 or streams < 1:
            raise ValueError(
                f"HyperConnectionHead: hidden is {hidden}, streams is {streams}; both must be >= 1"
            )
        self.hidden, self.streams, self.eps, self.rms_eps = hidden, streams, eps, rms_eps
        made: Any = {"device": device, "dtype": torch.float32}
        self.fn = nn.Parameter(torch.empty(streams, streams * hidden, **made))
        self.scale = nn.Parameter(torch.empty(1, **made))
        self.base = nn.Parameter(torch.empty(streams, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near the mean of the streams."""
        nn.init.normal_(self.fn, std=0.02)
        nn.init.constant_(self.scale, 0.01)
        nn.init.constant_(self.base, _logit(1 / self.streams))

    def forward(self, x: Tensor) -> Tensor:
        """[..., R, D] -> [..., D]."""
        expect(
            "HyperConnectionHead",
            "x",
            x,
            "... streams hidden",
            streams=self.streams,
            hidden=self.hidden,
        )
        return transom.mhc_head(
            x, self.fn, self.scale, self.base, eps=self.eps, rms_eps=self.rms_eps
        )


def to_streams(x: Tensor, streams: int) -> Tensor:
    """[..., D] -> [..., R, D], new memory: every residual stream starts as the embedding's
    output."""
    expect("to_streams", "x", x, "... hidden")
    if streams < 1:
        raise ValueError(f"to_streams: streams is {streams}; must be at least 1")
    return x.unsqueeze(-2).repeat_interleave(streams, dim=-2)


def _logit(p: float) -> float:
    """The logit of p, within +-NEAR_ONE."""
    return NEAR_ONE if p >= 1 else max(-NEAR_ONE, min(NEAR_ONE, log(p / (1 - p))))
