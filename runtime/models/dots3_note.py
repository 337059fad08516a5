"""dots3-note of transformers through the operators: indexed, window and full layers of own dims."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.dots3_note import modeling_dots3_note as hf

from . import dsa
from .padding import Slots
from .patching import Family
from .untouched import attends_instead_of, instead_of


class Dots3NoteTextAttention(hf.Dots3NoteTextAttention):
    """Latent attention over selected tokens, a window or all, with a gate for each head."""

    _transom_original = hf.Dots3NoteTextAttention

    @attends_instead_of(hf.Dots3NoteTextAttention)
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        *,
        slots: Slots,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original."""
        call = dsa.Call(position_embeddings, slots, past_key_values)
        z = self.q_a_layernorm(self.q_a_proj(hidden_states)) * self.q_lora_scale
        q = dsa.heads(self.q_b_proj(z), self.qk_head_dim)
        latent, k = dsa.latents(self, hidden_states)
        latent, k = latent * self.kv_lora_scale, self.k_rope_only_layernorm(k)
        pairs = hf.apply_rotary_pos_emb_interleave
        q, keys = dsa.rotated(self, q, latent, k, pairs, call)
        if self.indexer is not None:
            o = dsa.attend(self, q, keys, dsa.select(self.indexer, hidden_states, z, pairs, call))
        else:
            o = dsa.attend_window(self, q, keys, self.sliding_window or keys.shape[1], slots)
        o = o * self.g_proj(hidden_states).unsqueeze(-1).sigmoid()
        return self.o_proj(o.flatten(2)), None


class Dots3NoteTextTopkRouter(hf.Dots3NoteTextTopkRouter):
    """Routing by groups: `route`."""

    _transom_original = hf.Dots3NoteTextTopkRouter
    forward = instead_of(hf.Dots3NoteTextTopkRouter)(dsa.route_groups)


FAMILY = Family(
    replacements=(
        dsa.attention(Dots3NoteTextAttention, hf.Dots3NoteTextIndexer),
        dsa.routing(Dots3NoteTextTopkRouter),
    ),
    base=hf.Dots3NoteTextModel,
    attention=hf.Dots3NoteTextAttention,
    mixes=True,
    masks=("indexed_attention", "sliding_attention", "full_attention"),
)
