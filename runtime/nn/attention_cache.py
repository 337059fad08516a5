"""What a sparse attention layer keeps of the tokens it has seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.attention.compress_kv import CompressState
from .expected import expect


@dataclass(frozen=True)
class AttentionCache:
    """The rows and states of one layer after `position` tokens of B sequences.

    position     tokens seen; the next token stands here
    local        [B, up to window - 1, D]: the latest raw tokens, roped; None without a window
    entries      [B, N, D]: compressed entries, or every token's latent row; None for window layers
    keys         [B, N, Di]: the indexer's key of every entry; None without an indexer
    state        the compressor's open block; None where nothing is compressed
    index_state  the same of the indexer's own compressor

    Never written to: a layer returns a new one, so an older cache stays what it was, and rolling a
    sequence back is using the older one.
    """

    position: int
    local: Tensor | None = None
    entries: Tensor | None = None
    keys: Tensor | None = None
    state: CompressState | None = None
    index_state: CompressState | None = None

    def reorder(self, index: Tensor) -> AttentionCache:
        """The cache whose sequence b is this one's sequence `index[b]` (index[B'], as in beams)."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, index)

        return AttentionCache(
            self.position,
            rows(self.local),
            rows(self.entries),
            rows(self.keys),
            None if self.state is None else self.state.reorder(index),
            None if self.index_state is None else self.index_state.reorder(index),
        )

    def check(
        self, batch: int, *, local: int, entries: int, keys: int, states: tuple[bool, bool]
    ) -> None:
        """ValueError unless this is the cache of `batch` sequences of a layer with rows, entries
        and keys of these widths (0: it has none) and these two states."""
        what = "SparseAttention"
        if self.position < 0:
            raise ValueError(f"{what}: cache.position is {self.position}; must be at least 0")
        for name, width in (("local", local), ("entries", entries), ("keys", keys)):
            rows: Tensor | None = getattr(self, name)
            if rows is not None and not width:
                raise ValueError(f"{what}: cache.{name} is given; a layer of this form has none")
            expect(what, f"cache.{name}", rows, "B N width", B=batch, width=width)
        for name, kept in zip(("state", "index_state"), states, strict=True):
            state: CompressState | None = getattr(self, name)
            if state is not None and not kept:
                raise ValueError(f"{what}: cache.{name} is given; a layer of this form has none")
            if state is not None:
                expect(what, f"cache.{name}", state.kv, "B rows channels", B=batch)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held."""
        held = (self.local, self.entries, self.keys, self.state, self.index_state)
        return sum(x.nbytes for x in held if x is not None)
