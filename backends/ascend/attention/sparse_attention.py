"""sparse_attention of latent rows of 512 + 64 by npu_sparse_flash_attention."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.facts import Facts
from transom.kernels.attention.sparse_attention import sparse_attention
from transom.requires import absent, condition, dtype, one_of

from .._vendor import call, not_empty, offer

LATENT, ROPE = 512, 64
"""The vendor's operator takes a row in these two parts, of these sizes only."""


def _selected(f: Facts) -> str | None:
    return None if "indices" in f.dtypes else "indices are not given; supported: calls with"


def _worth(f: Facts) -> str | None:
    rows, read = f.dims["N"], f.dims["S"] * f.dims.get("L", 0)
    if rows <= read:
        return None
    return f"N = {rows} rows would be copied and {read} read; supported: N at most S*L"


@offer(
    sparse_attention,
    dtype("q", torch.bfloat16, torch.float16),
    one_of("D", LATENT + ROPE),
    one_of("v_dim", LATENT),
    one_of("H", 1, 2, 4, 8, 16, 32, 64, 128),
    condition("with indices", ("given:indices",), _selected),
    not_empty("B", "S", "N", "L"),
    absent("visible", "local_kv", "sink", "local_valid"),
    condition("N <= S*L", ("N", "S", "L"), _worth),
)
def forward(
    q: Tensor,
    kv: Tensor,
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
    """Rows are cut into their two parts, which copies them. The vendor wants valid entries first
    and all others -1; a query that has none is ours to answer."""
    valid = (indices >= 0) & (indices < kv.shape[1])
    order = torch.argsort(~valid, dim=-1, stable=True)
    packed = torch.where(valid, indices, -1).gather(-1, order).to(torch.int32)
    rows = kv[:, :, None]
    key = rows[..., :LATENT].contiguous()
    o, largest, total = call(
        "npu_sparse_flash_attention",
        q[..., :LATENT].contiguous(),
        key,
        key,
        packed[:, :, None].contiguous(),
        scale,
        query_rope=q[..., LATENT:].contiguous(),
        key_rope=rows[..., LATENT:].contiguous(),
        sparse_block_size=1,
        layout_query="BSND",
        layout_kv="BSND",
        sparse_mode=0,
        attention_mode=2,
        return_softmax_lse=True,
    )
    empty = ~valid.any(-1)
    lse = (largest + total.log()).squeeze(1)
    o = torch.where(empty[..., None, None], 0, o)
    return o, torch.where(empty[..., None], -torch.inf, lse.float())
