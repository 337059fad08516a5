"""FBGEMM's table-batched embeddings, its inference class, one row for each index (no pooling)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cases import PLAIN, Case
from ..measure import Candidate, Function
from .torch_ import _rows

Values = Mapping[str, Any]


def probe() -> str | None:
    """It must load beside this torch."""
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError) as error:
        return f"fbgemm_gpu cannot be imported: {' '.join(str(error).split())[:200]}"
    return None


def candidates(case: Case, values: Values) -> list[Candidate]:
    """The lookup of plain rows, a copy of the table in its own layout."""
    if case.op != "hashed_embedding" or case.format != PLAIN or case.dtype not in ("f32", "f16"):
        return []
    if values["table"].shape[0] >= 1 << 31:
        return []
    note = "transom's hash; table-batched embedding of the rows"
    held = float(values["table"].nbytes)
    return [Candidate("fbgemm TBE", "fbgemm", _prepare, note, held)]


def _prepare(v: Values) -> Function:
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
        IntNBitTableBatchedEmbeddingBagsCodegen,
    )

    table = v["table"]
    kind = SparseType.FP32 if table.dtype == torch.float32 else SparseType.FP16
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", *table.shape, kind, EmbeddingLocation.HOST)],
        pooling_mode=PoolingMode.NONE,
        output_dtype=kind,
        device="cpu",
        row_alignment=1,
    )
    module.fill_random_weights()
    ((held, _),) = module.split_embedding_weights()
    held.view(table.dtype)[:, : table.shape[1]].copy_(table)

    def call(v: Values) -> Tensor:
        rows = _rows(v)
        y = module(rows, torch.tensor([0, rows.numel()], dtype=rows.dtype))
        return y.view(*v["tokens"].shape, -1)

    return call
