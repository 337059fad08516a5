"""Engram: a memory that n-grams of tokens look up by hash, gated into the residual streams.

Two forms. "demo" is the paper's and the January demo's: one key projection per stream and one value
projection, with bias, and a short convolution. "v4.1" is DeepSeek-V4.1-Flash's: one projection to
all keys and the value, no bias, no convolution, blocked positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import transom

from ..dtypes import accumulator
from ..weights import QuantizedWeight, Weight, advise_huge_pages, weight_args, weight_from
from .engram_hash import EngramHash, engram_hashes
from .expected import expect, expect_bool
from .token_map import build_token_map, token_map_checksum

__all__ = [
    "Engram",
    "EngramCache",
    "EngramHash",
    "build_token_map",
    "engram_hashes",
    "token_map_checksum",
]

FORMS = ("demo", "v4.1")


@dataclass
class EngramCache:
    """What an Engram layer keeps between the chunks of a sequence; a new one stands at the start.

    lookback  the last n-1 ids *after compression* [B,n-1], oldest first, -1 before the start or
              where blocked
    conv      the last normalised rows of the short convolution [B,(kernel-1)*dilation,R*D] ("demo"
              form only)

    A forward pass replaces the tensors and never writes into them, so `copy()` is free: keep one to
    roll back speculative tokens.
    """

    lookback: Tensor | None = None
    conv: Tensor | None = None

    def copy(self) -> EngramCache:
        """A cache at the same place, which later passes with this one do not change."""
        return EngramCache(self.lookback, self.conv)

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, as beam search asks for."""
        if self.lookback is not None:
            self.lookback = self.lookback.index_select(0, index)
        if self.conv is not None:
            self.conv = self.conv.index_select(0, index)


class Engram(nn.Module):
    """y[j] = x[j] + v[j] (+ SiLU(conv(norm(v[j])))), v[j] = g[j] * value.

    Value and keys, which decide the gates g, are projections of what the n-grams look up that end
    at the token.

    hidden, streams  D and R of the residual streams x [B,S,R,D]
    hashed           the layer's entry of `engram_hashes`
    column           width of a table row; a lookup is (n-1)*heads rows side by side
    vocab            raw ids are 0..vocab-1; others count as blocked
    token_map        int32 [vocab], raw id -> compressed id; None: raw ids are hashed as they are
    checksum         what `token_map_checksum(token_map)` must be; None: not compared
    pad              raw id hashed before the start of a sequence and from a blocked position on
    form             "demo" or "v4.1"
    gate_eps         of both norms of the gate: 1e-20 in V4.1
    conv_kernel, conv_dilation, conv_eps
                     of the short convolution; the dilation defaults to the largest n-gram
    table, wkv       weights to use instead of new ones: tensors, or QuantizedWeights (inference);
                     wkv "v4.1" only
    sparse_gradient  the table's gradient is a sparse tensor
    huge_pages       a new table in the host's memory asks Linux for pages of 2 MiB, in which random
                     rows are found up to twice as fast; a given table is left as it is, see
                     `advise_huge_pages`

    The convolution starts at zero, so that a new "demo" block adds g*value alone.  Raises
    ValueError for a table that does not fit, and for a token map whose length, checksum or number
    of compressed ids is not the expected one: a wrong tokenizer would rehash everything in silence.

    *Source:* Engram, arXiv 2601.07372; DeepSeek-V4.1-Flash.
    """

    multipliers: Tensor
    moduli: Tensor
    offsets: Tensor
    token_map: Tensor | None

    def __init__(
        self,
        hidden: int,
        streams: int,
        *,
        hashed: EngramHash,
        column: int,
        vocab: int,
        token_map: Tensor | None,
        pad: int,
        form: str,
        gate_eps: float,
        checksum: int | None = None,
        conv_kernel: int = 4,
        conv_dilation: int | None = None,
        conv_eps: float = 1e-5,
        table: Weight | None = None,
        wkv: Weight | None = None,
        sparse_gradient: bool = False,
        huge_pages: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"Engram: form is {form!r}; expected one of {', '.join(FORMS)}")
        if not 0 <= pad < vocab:
            raise ValueError(f"Engram: pad is {pad}; must be a raw id in 0..{vocab - 1}")
        self.hidden, self.streams, self.column, self.vocab = hidden, streams, column, vocab
        self.form, self.gate_eps, self.sparse_gradient = form, gate_eps, sparse_gradient
        self.ngram = hashed.multipliers.shape[0]
        self.conv_eps = conv_eps
        self.conv_dilation = self.ngram if conv_dilation is None else conv_dilation
        for name in ("multipliers", "moduli", "offsets"):
            self.register_buffer(name, getattr(hashed, name).to(device), persistent=False)
        self.pad, self.checksum = self._take_map(token_map, checksum, hashed.ids, pad, device)
        made: dict[str, Any] = dict(device=device, dtype=dtype)
        width = hashed.moduli.numel() * column
        self.table = _weight("table", (hashed.rows, column), table, made, huge_pages)
        if form == "v4.1":
            self.wkv = _weight("wkv", ((streams + 1) * hidden, width), wkv, made)
        else:
            if wkv is not None:
                raise ValueError("Engram: wkv is given; the demo form has separate projections")
            self.keys = nn.ModuleList(nn.Linear(width, hidden, **made) for _ in range(streams))
            self.value = nn.Linear(width, hidden, **made)
            self.conv_norm = nn.Parameter(torch.ones(streams, hidden, **made))
            self.conv = nn.Parameter(torch.zeros(streams * hidden, conv_kernel, **made))
        self.x_norm = nn.Parameter(torch.ones(streams, hidden, **made))
        self.key_norm = nn.Parameter(torch.ones(streams, hidden, **made))

    def _take_map(
        self,
        token_map: Tensor | None,
        checksum: int | None,
        ids: int | None,
        pad: int,
        device: torch.device | str | None,
    ) -> tuple[int, int | None]:
        """Register the map; (the pad id after compression, the map's checksum)."""
        if token_map is None:
            if ids is not None and ids < self.vocab:
                raise ValueError(
                    f"Engram: the hashes were drawn for {ids} ids, and without a token_map"
                    f" {self.vocab} raw ids are hashed; give the token_map, or draw the hashes for"
                    " as many ids"
                )
            self.register_buffer("token_map", None)
            return pad, None
        if tuple(token_map.shape) != (self.vocab,):
            raise ValueError(
                f"Engram: token_map has shape {list(token_map.shape)}; expected [{self.vocab}],"
                " one entry for each raw id"
            )
        if token_map.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"Engram: token_map is {str(token_map.dtype)[6:]}; expected int32 or int64"
            )
        if token_map.numel() and int(token_map.min()) < 0:
            raise ValueError(f"Engram: token_map has {int(token_map.min())}; ids must be >= 0")
        seen = token_map_checksum(token_map)
        if checksum is not None and seen != checksum:
            raise ValueError(_other_map(seen, checksum))
        count = int(token_map.max()) + 1 if token_map.numel() else 0
        if ids is not None and count != ids:
            raise ValueError(
                f"Engram: token_map has {count} compressed ids; the hashes were drawn for {ids};"
                " use the tokenizer that the table was trained with"
            )
        self.register_buffer("token_map", token_map.to(device, torch.int32))
        return int(token_map[pad]), seen

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "token_map")
        if given is not None and self.token_map is not None:
            seen = token_map_checksum(given)
            if seen != self.checksum:
                raise ValueError(_other_map(seen, self.checksum))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def compress(self, tokens: Tensor) -> Tensor:
        """Raw ids -> compressed ids, -1 (blocked) for ids outside 0..vocab-1."""
        known = (tokens >= 0) & (tokens < self.vocab)
        if self.token_map is None:
            return torch.where(known, tokens, -1)
        mapped = self.token_map[tokens.clamp(0, self.vocab - 1)]
        return torch.where(known, mapped, -1)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        *,
        blocked: Tensor | None = None,
        cache: EngramCache | None = None,
    ) -> Tensor:
        """x [B,S,R,D] with what the tokens [B,S] (raw ids) look up; rows hold one sequence each.

        blocked  bool [B,S], True at image spans, padding and other positions that are no text: no
                 n-gram reads them, and x is returned bit for bit there
        cache    the tokens come right after those of the last call with this cache; None: they
                 start the sequence
        """
        cache = EngramCache() if cache is None else cache
        self._check(x, tokens, blocked, cache)
        ids = self.compress(tokens)
        if blocked is not None:
            ids = torch.where(blocked, -1, ids)
        looked_up = transom.hashed_embedding(
            ids,
            self.table,
            multipliers=self.multipliers,
            moduli=self.moduli,
            offsets=self.offsets,
            pad=self.pad,
            lookback=cache.lookback,
            sparse_gradient=self.sparse_gradient,
        ).to(x.dtype)
        cache.lookback = self._lookback(ids, cache.lookback)
        key, value = self._project(looked_up)
        wide = accumulator(x.dtype)
        gate: dict[str, Any] = dict(eps=self.gate_eps, mask=None if blocked is None else ~blocked)
        weight = (self.x_norm.to(wide) * self.key_norm.to(wide)).to(wide)
        if self.form == "v4.1":
            return transom.engram_gate(x, key, value, weight, **gate)
        v = transom.engram_gate(x, key, value, weight, residual=False, **gate)
        rows = _rms_norm(v, self.conv_norm, self.conv_eps).flatten(2)
        z, cache.conv = transom.short_conv(
            rows, self.conv, dilation=self.conv_dilation, state=cache.conv
        )
        y = (x.to(wide) + v.to(wide) + z.view_as(v).to(wide)).to(x.dtype)
        return y if blocked is None else torch.where(blocked[:, :, None, None], x, y)

    def _check(self, x: Tensor, tokens: Tensor, blocked: Tensor | None, cache: EngramCache) -> None:
        expect("Engram", "x", x, "B S streams hidden", streams=self.streams, hidden=self.hidden)
        batch, length = x.shape[:2]
        expect("Engram", "tokens", tokens, "B S", B=batch, S=length)
        expect("Engram", "blocked", blocked, "B S", B=batch, S=length)
        expect_bool("Engram", "blocked", blocked)
        kept = dict(B=batch, kept=self.ngram - 1)
        expect("Engram", "cache.lookback", cache.lookback, "B kept", **kept)
        if cache.conv is not None and self.form == "demo":
            rows = (self.conv.shape[1] - 1) * self.conv_dilation
            width = self.streams * self.hidden
            expect(
                "Engram", "cache.conv", cache.conv, "B rows width", B=batch, rows=rows, width=width
            )

    def _project(self, looked_up: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B,S,R,D] and the value [B,S,D] that the streams share."""
        if self.form == "demo":
            return torch.stack([key(looked_up) for key in self.keys], 2), self.value(looked_up)
        if isinstance(self.wkv, QuantizedWeight):
            values, scales, zeros, spec = weight_args(self.wkv)
            assert scales is not None
            one = weight_from(
                values[None], scales[None], None if zeros is None else zeros[None], spec
            )
            flat = looked_up.flatten(0, 1)
            ends = torch.full((1,), flat.shape[0], dtype=torch.int32, device=flat.device)
            both = transom.grouped_gemm(flat, one, ends).view(*looked_up.shape[:2], -1)
        else:
            both = nn.functional.linear(looked_up, self.wkv)
        key, value = both.split((self.streams * self.hidden, self.hidden), dim=-1)
        return key.unflatten(-1, (self.streams, self.hidden)), value

    def _lookback(self, ids: Tensor, before: Tensor | None) -> Tensor:
        """The last n-1 ids of the sequence so far."""
        keep = self.ngram - 1
        if before is None:
            before = ids.new_full((ids.shape[0], keep), -1)
        newest = ids[:, max(0, ids.shape[1] - keep) :]
        return torch.cat((before.to(ids.dtype), newest), 1)[:, -keep:]

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return (
            f"form={self.form}, hidden={self.hidden}, streams={self.streams},"
            f" n-grams 2..{self.ngram}, {self.moduli.numel()} columns of {self.column},"
            f" {self.table.shape[0]:,} rows"
        )


def _weight(
    name: str,
    shape: tuple[int, int],
    given: Weight | None,
    made: dict[str, Any],
    huge_pages: bool = False,
) -> nn.Parameter | QuantizedWeight:
    """`given` as it is held by a module, or new normal weights."""
    if given is None:
        weight = nn.Parameter(torch.empty(shape, **made))
        if huge_pages:
            advise_huge_pages(weight)  # before it is filled: no page is in use yet
        nn.init.normal_(weight, std=0.02)
        return weight
    if tuple(given.shape) != shape:
        raise ValueError(f"Engram: {name} has shape {list(given.shape)}; expected {list(shape)}")
    if isinstance(given, (QuantizedWeight, nn.Parameter)):
        return given
    return nn.Parameter(given, requires_grad=given.is_floating_point())


def _rms_norm(v: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = v.to(accumulator(v.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(v.dtype)


def _other_map(seen: int, expected: int | None) -> str:
    return (
        f"Engram: token_map has checksum {seen}; expected {expected};"
        " use the tokenizer that the table was trained with"
    )
