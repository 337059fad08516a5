"""lightning_indexer by npu_lightning_indexer."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.attention.lightning_indexer import lightning_indexer
from transom.requires import at_most, contiguous, dtype, multiple_of, one_of

from .._vendor import call, not_empty, offer, same_dtype

SELECTED = 2048
PAGE = 16
"""A page of keys is a multiple of it, and 1024 at most."""


@offer(
    lightning_indexer,
    dtype("q", torch.bfloat16, torch.float16),
    same_dtype("q", "weights"),
    one_of("H", 64),
    one_of("D", 128),
    at_most("top_k", SELECTED),
    multiple_of("N", PAGE),
    not_empty("B", "S", "N"),
    contiguous("q", "k", "weights"),
)
def forward(q: Tensor, k: Tensor, weights: Tensor, top_k: int, *, visible: Tensor) -> Tensor:
    """Each query is a sequence of its own, so that it has its own number of visible keys; all of a
    batch share their keys' pages."""
    B, S, H, D = q.shape
    N = k.shape[1]
    page = next(n for n in (1024, 512, 256, 128, 64, 32, 16) if N % n == 0)
    table = torch.arange(B * N // page, dtype=torch.int32, device=q.device).view(B, 1, -1)
    seen = visible.clamp(0, N).to(torch.int32).reshape(B * S)
    found, _ = call(
        "npu_lightning_indexer",
        q.view(B * S, H, D),
        k.view(B * N // page, page, 1, D),
        weights.view(B * S, H),
        actual_seq_lengths_query=torch.arange(1, B * S + 1, dtype=torch.int32, device=q.device),
        actual_seq_lengths_key=seen,
        block_table=table.expand(B, S, -1).reshape(B * S, -1),
        layout_query="TND",
        layout_key="PA_BSND",
        sparse_count=top_k,
        sparse_mode=0,
    )
    found = found.view(B * S, top_k)
    # what lies behind the visible keys, whatever the vendor left there, is -1 and goes last
    kept = torch.arange(top_k, device=q.device) < seen[:, None]
    last = torch.iinfo(torch.int32).max
    found = torch.where(kept & (found >= 0), found, last).sort(-1).values
    return torch.where(found == last, -1, found).to(torch.int32).view(B, S, top_k)
