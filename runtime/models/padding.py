"""What an attention module needs to know about a call: which slots of the sequence hold a token.

A transformers model turns its attention mask into a dense [B, 1, S, N] tensor before the layers
run. Causality and the window follow from the positions alone, so all that is left to say is one bit
a token. A hook in front of the base model's forward says it (`Slots`), or says why this call is not
covered (`Uncovered`): then the attention modules run their original forward, with the dense mask
that the model makes as ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SLOTS = "transom_slots"
"""The keyword under which the layers hand `Slots` or `Uncovered` on to their attention."""


@dataclass(frozen=True)
class Slots:
    """`past` tokens before this call; valid[B, past + S]: False for padding; None: no padding."""

    past: int
    valid: Tensor | None = None
    masked: bool = False
    """True if the layers are handed a dense mask as well, for those that run the original."""
    kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the layers of this call compute once for all of them."""
    _packed: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    def last(self, count: int, device: torch.device) -> Tensor | None:
        """valid[B, count] of the last `count` slots, or None if no slot is padding."""
        return (
            None if self.valid is None else self.valid[:, self.valid.shape[1] - count :].to(device)
        )

    def own(self) -> Tensor | None:
        """valid[B, S] of the call's own tokens; None if all are, as a single one always is."""
        if self.valid is None or self.valid.shape[1] == self.past + 1:
            return None
        return self.valid[:, self.past :]

    def packed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """order[B, N]: slots, tokens in front; visible[B, S]: tokens up to each query's own slot.

        Only for calls with padding: with keys in this order a query sees a prefix of them.
        """
        if self.valid is None:
            raise ValueError("Slots.packed: no slot is padding; nothing to pack")
        if not self._packed:
            order = torch.argsort((~self.valid).to(torch.int8), dim=1, stable=True)
            self._packed.append((order, self.valid.cumsum(1)[:, self.past :]))
        order, visible = self._packed[0]
        return order.to(device), visible.to(device)

    def unpacked(self, places: Tensor) -> Tensor:
        """The slots [B, S, K] int32 of places [B, S, K] in the order of `packed`; -1 stays."""
        order, _ = self.packed(places.device)
        slot = order.gather(1, places.clamp_min(0).flatten(1).long()).view_as(places)
        return torch.where(places < 0, -1, slot).to(torch.int32)


@dataclass(frozen=True)
class Uncovered:
    """Why this call runs Hugging Face's own attention: what was seen; what is covered."""

    reason: str


def read_slots(
    module: nn.Module, given: dict[str, Any], expected: tuple[type, ...]
) -> Slots | Uncovered:
    """`Slots` of one call of the base model `module`, or the first reason why it is not covered.

    expected  the classes of the layers of its cache, if it is given one
    """
    tokens = (
        given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    )
    if tokens is None:
        return Uncovered("neither input_ids nor inputs_embeds was given; one is expected")
    settings: Any = module.config
    asked = given.get("output_attentions")
    if getattr(settings, "output_attentions", False) if asked is None else asked:
        return Uncovered(
            "output_attentions is on; sparse attention has no attention matrix to return"
        )
    if module.training and settings.attention_dropout:
        return Uncovered(
            f"attention_dropout is {settings.attention_dropout} in training; only 0 is covered"
        )
    if settings._attn_implementation not in ("eager", "sdpa"):
        return Uncovered(
            f"the attention chosen is {settings._attn_implementation!r}; covered: eager, sdpa"
        )
    cache = given.get("past_key_values")
    reason = _uncovered_cache(cache, expected)
    if reason:
        return Uncovered(reason)
    past = 0 if cache is None else int(cache.get_seq_length())
    total = past + tokens.shape[1]
    mask = given.get("attention_mask")
    if mask is None:
        positions = given.get("position_ids")
        if positions is not None and positions.ndim == 3:
            # Of images too: [4, B, S] with the text's first, or [3, B, S] without.
            positions = None if positions.shape[0] == 3 else positions[0]
        if cache is None and positions is not None and _restarts(positions):
            return Uncovered(
                "position_ids don't count up by one (packed sequences); covered: one sequence a row"
            )
        return Slots(past)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        seen = (
            f"has {mask.ndim} dims" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        )
        return Uncovered(f"attention_mask {seen}; covered: [B, tokens], one bit a token")
    if mask.shape[1] != total:
        return Uncovered(f"attention_mask has {mask.shape[1]} slots; the sequence has {total}")
    valid = mask.to(device=tokens.device, dtype=torch.bool)
    # One look at the values a call, as transformers itself takes it; not while tracing, where it
    # would break the graph.
    if not torch.compiler.is_compiling() and bool(valid.all()):
        return Slots(past)
    return Slots(past, valid)


def _restarts(positions: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return positions.shape[-1] > 1 and bool((positions.diff(dim=-1) != 1).any())


def cache_layers(settings: Any) -> tuple[type, ...]:
    """The classes of the layers of the cache that `generate` makes for a model of this config."""
    from transformers import cache_utils as hf

    kinds, _ = hf.get_layer_types_and_kwargs(settings)
    return tuple(hf.DYNAMIC_LAYER_TYPE_MAPPING[k] for k in kinds[: settings.num_hidden_layers])


def _uncovered_cache(cache: Any, expected: tuple[type, ...]) -> str | None:
    """The sentence why this cache is not covered, or None."""
    if cache is None:
        return None
    from transformers.cache_utils import Cache, DynamicCache

    if type(cache) not in (Cache, DynamicCache):
        return f"the cache is a {type(cache).__name__}; covered: DynamicCache"
    if len(cache.layers) < len(expected):
        return (
            f"the cache has {len(cache.layers)} layers and the model {len(expected)}; "
            "make it with DynamicCache(config=...)"
        )
    for i, kind in enumerate(expected):
        if type(cache.layers[i]) is not kind:
            name = type(cache.layers[i]).__name__
            return f"layer {i} of the cache is a {name}; covered: DynamicCache(config=...)"
    return None
