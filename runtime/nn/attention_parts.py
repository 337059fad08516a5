"""Parts that attention layers are put together from: norm, compressor, indexer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels.attention.compress_kv import CompressState, compress_kv
from .expected import expect
from .rotary import Angles, Rotary
from .untouched import plain


class Where(TypedDict):
    """Device and dtype of new parameters; None: torch's default."""

    device: torch.device | None
    dtype: torch.dtype | None


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """x weight^T of a linear layer in float32 (float64 if x is), also where autocast would take a
    lower dtype; what the layer itself answers, widened, if it is no plain nn.Linear any more."""
    if not plain(layer):
        return wide(layer(x))
    kind, weight = x.device.type, cast(Tensor, layer.weight)
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return functional.linear(wide(x), wide(weight))
    return functional.linear(wide(x), wide(weight))


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) over the last dim, in float32 (float64 for float64)."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x**2) + eps) over the last dim, float32 inside, rounded once.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype, new memory."""
        expect("RMSNorm", "x", x, "... size", size=self.weight.shape[0])
        return (rms_normalize(x, self.eps) * self.weight).to(x.dtype)


class Compressor(nn.Module):
    """entries = rope(RMSNorm(compress_kv(wkv x, wgate x))), entry i roped at its start, i m.

    hidden   width of x; width: of an entry, D
    ratio    m, tokens an entry stands for
    overlap  an entry also pools the block before (CSA), else its own only (HCA)
    rotary   how entries are roped
    Projections, softmax, norm and state are float32 (float64 for float64).
    Source: DeepSeek-V4 report, arXiv:2606.19348, section 2.3.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        ratio: int,
        rotary: Rotary,
        eps: float,
        *,
        overlap: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ratio, self.overlap, self.rotary = ratio, overlap, rotary
        channels = width * (1 + overlap)
        self.wkv = nn.Linear(hidden, channels, bias=False, device=device, dtype=dtype)
        self.wgate = nn.Linear(hidden, channels, bias=False, device=device, dtype=dtype)
        bias = torch.zeros(ratio, channels, device=device, dtype=dtype)
        self.position_bias = nn.Parameter(bias)
        self.norm = RMSNorm(width, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: CompressState | None) -> tuple[Tensor, CompressState]:
        """Tokens x [B, S, hidden] after `state` -> the entries they complete (x's dtype), state."""
        kv = wide_linear(x, self.wkv)
        gate = wide_linear(x, self.wgate)
        bias = wide(self.position_bias)
        entries, after = compress_kv(kv, gate, bias, overlap=self.overlap, state=state)
        first = 0 if state is None else state.position // self.ratio * self.ratio
        angles = self.rotary.angles(first, entries.shape[1], step=self.ratio, device=x.device)
        return self.rotary.turn(self.norm(entries), angles).to(x.dtype), after


@dataclass(frozen=True)
class IndexShape:
    """Numbers of a lightning indexer: its heads, their width, and how many keys a query keeps."""

    heads: int
    dim: int
    top_k: int


class Indexer(nn.Module):
    """What the lightning indexer asks with: q = rope(wq qr), weights = wproj x / sqrt(heads dim).

    The score's normalisation stands in the weights, which are float32 (float64 for float64).
    Source: DeepSeek-V3.2 report, arXiv:2512.02556, eq. 1.
    """

    def __init__(
        self,
        hidden: int,
        q_rank: int,
        shape: IndexShape,
        rotary: Rotary,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.rotary = shape, rotary
        size = shape.heads * shape.dim
        self.wq = nn.Linear(q_rank, size, bias=False, device=device, dtype=dtype)
        self.wproj = nn.Linear(hidden, shape.heads, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, qr: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """x [B, S, hidden], qr [B, S, q_rank] -> q [B, S, heads, dim], weights [B, S, heads]."""
        q = self.wq(qr).unflatten(-1, (self.shape.heads, self.shape.dim))
        weights = wide_linear(x, self.wproj)
        return self.rotary.turn(q, angles), weights * (self.shape.heads * self.shape.dim) ** -0.5


class TokenKeys(nn.Module):
    """One indexer key for every token: rope(LayerNorm(wk x)), the norm with bias, in float32.

    Source: DeepSeek-V3.2 report, arXiv:2512.02556, section 2.1.
    """

    def __init__(
        self,
        hidden: int,
        dim: int,
        rotary: Rotary,
        *,
        eps: float = 1e-6,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.wk = nn.Linear(hidden, dim, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """x [B, S, hidden] -> keys [B, S, dim] in x's dtype."""
        norm, key = self.norm, wide(self.wk(x))
        if plain(norm, nn.LayerNorm):
            weight, bias = wide(norm.weight), wide(norm.bias)
            key = functional.layer_norm(key, norm.normalized_shape, weight, bias, norm.eps)
        else:
            key = norm(key)
        return self.rotary.turn(key.to(x.dtype), angles)
