"""sparse_attention_rows: sparse_attention, with rows decoded into the tile they are copied to."""

from __future__ import annotations

from torch import Tensor

from transom.kernels.attention.sparse_attention_rows import sparse_attention_rows
from transom.requires import at_most, last_dim_contiguous

from .._arrays import floats
from .sparse_attention import attention


@sparse_attention_rows.impl(
    requires=(*floats("q"), last_dim_contiguous("rows", "local_kv"), at_most("N", 2**31 - 1))
)
def numba(
    q: Tensor,
    rows: Tensor,
    indices: Tensor | None = None,
    *,
    visible: Tensor | None = None,
    local_kv: Tensor | None = None,
    window: int = 0,
    sink: Tensor | None = None,
    scale: float,
    v_dim: int,
    local_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse of sparse_attention over the keys that the rows hold."""
    return attention(q, rows, indices, visible, local_kv, window, sink, scale, v_dim, local_valid)
