"""DeepSeek-V3.2 of transformers through the operators: latent attention, indexer, routing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from . import dsa
from .patching import Family, Replacement
from .slots import SLOTS, covered


class DeepseekV32Attention(hf.DeepseekV32Attention):
    """Latent attention over the tokens that the indexer selects, and only those."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the original; without `Slots` (see slots.py) it is the original."""
        slots = kwargs.pop(SLOTS, None)
        if not covered(slots, "DeepseekV32Attention"):
            return super().forward(
                hidden_states,
                position_embeddings,
                attention_mask,
                past_key_values,
                position_ids,
                **kwargs,
            )
        # The indexer of V3.2 rotates halves, its attention pairs.
        output, _ = dsa.attend(
            self,
            hidden_states,
            position_embeddings,
            slots,
            past_key_values,
            None,
            hf.apply_rotary_pos_emb_interleave,
            hf.apply_rotary_pos_emb,
        )
        return output, None


class DeepseekV32TopkRouter(hf.DeepseekV32TopkRouter):
    """Grouped sigmoid routing: `route`."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the original: logits, weights, ids."""
        return dsa.route_groups(self, hidden_states)


FAMILY = Family(
    replacements=(
        Replacement(
            hf.DeepseekV32Attention,
            DeepseekV32Attention,
            dsa.operators,
            lambda module: dsa.refuse(module, hf.DeepseekV32Indexer),
        ),
        Replacement(
            hf.DeepseekV32TopkRouter,
            DeepseekV32TopkRouter,
            lambda module: "route",
            lambda module: None,
        ),
    ),
    base=hf.DeepseekV32Model,
    attention=hf.DeepseekV32Attention,
    mixes=True,
)
