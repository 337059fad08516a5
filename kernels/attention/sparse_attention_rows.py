"""sparse_attention over a cache of packed rows, which are decoded where they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from transom.declare import op

from .cache_rows import WIDTH, decode, decode_reference, row_bytes_check, sample_rows
from .sparse_attention import attention_check, attention_reference, attention_sample, forward


@op(
    "q[B,S,H,512], rows[B,N,R], indices?[B,S,L], visible?[B,S], local_kv?[B,M,512], sink?[H],"
    " local_valid?[B,M] -> o[B,S,H,v_dim], lse[B,S,H]",
    dtypes="q: float; rows: u8; indices: index; visible: index; local_kv: q; sink: q | f32;"
    " local_valid: bool; o: q; lse: acc(q)",
    flops="2*B*S*H*(512+v_dim)*((L if L > 0 else N)+window)",
    bytes="B*S*H*(512+v_dim)*size.q+B*R*(min(N, S*L) if L > 0 else N)"
    "+B*512*min(M, S+window)*size.q+4*B*S*(L+H)",
    accumulate="512+(L if L > 0 else N)+window",
    autocast="low: q local_kv",
    batch="B",
    examples=[
        dict(B=2, S=3, H=3, N=9, R=584, L=4, M=7, window=3, v_dim=8, scale=0.05),
        dict(B=1, S=2, H=2, N=6, R=288, v_dim=512, scale=0.05),
        # DeepSeek-V4-Flash, CSA decode over 64 k tokens of cache.
        dict(B=1, S=1, H=64, N=16384, R=584, L=512, M=128, window=128, v_dim=512, scale=512**-0.5),
    ],
)
def sparse_attention_rows(
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
    """o and lse of sparse_attention with kv = unpack_cache_rows(rows).

    rows  [B,N,R], uint8, R = 584 or 288 (see `pack_cache_rows`). Only rows that a query sees are
          decoded, a tile at a time.
    The rest as in sparse_attention, which calls this for a kv of bytes; scale and v_dim are given
    and the lse is always returned. No gradient. Raises ValueError for other R.
    *Source:* contracts of DeepSeek-V4 and V4.1 caches.
    """
    return forward(
        q, rows, indices, visible, local_kv, window, sink, scale, v_dim, local_valid, _read
    )


def _read(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return decode(rows).to(dtype)


@sparse_attention_rows.check
def _(given: set[str], window: int, v_dim: int, R: int, S: int, M: int | None = None) -> str | None:
    return row_bytes_check(R) or attention_check(given, window, v_dim, WIDTH, S, M)


@sparse_attention_rows.reference
def _(
    q: np.ndarray,
    rows: np.ndarray,
    indices: np.ndarray | None,
    visible: np.ndarray | None,
    local_kv: np.ndarray | None,
    window: int,
    sink: np.ndarray | None,
    scale: float,
    v_dim: int,
    local_valid: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    kv = decode_reference(rows)
    return attention_reference(
        q, kv, indices, visible, local_kv, window, sink, scale, v_dim, local_valid
    )


@sparse_attention_rows.sample
def _(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    shape = (dims["B"], dims["N"], dims["R"])
    return attention_sample(rng, dims) | {"rows": sample_rows(rng, shape)}
