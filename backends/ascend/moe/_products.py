"""Grouped products by the vendor's operator, in whatever sizes its limits allow."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.requires import at_most, contiguous, dtype

from .._vendor import call, not_empty, same_dtype

GROUPS = 1024
"""Experts that npu_grouped_matmul takes, of one weight tensor."""
INNER = 65535
"""The largest innermost dim of its matrices: below 65536."""

LIMITS = (
    dtype("weight", torch.bfloat16, torch.float16, torch.float32),
    at_most("E", GROUPS),
    at_most("N", INNER),
    at_most("K", INNER),
    not_empty("M", "N", "K", "E"),
    contiguous("weight"),
)


def limits(rows: str) -> tuple[object, ...]:
    """Of a product of the tensor `rows` with a weight."""
    return (*LIMITS, same_dtype(rows, "weight"), contiguous(rows))


def grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y[r] = x[r] @ weight[e], weight [E, K, N]; rows behind offsets[-1] are zero.

    The operator wants the last end to be the number of rows. So the rows that no expert has go
    through the last expert, and are replaced afterwards, NaN or not.
    """
    rows, ends = len(x), offsets.to(torch.int64)
    closed = torch.cat([ends[:-1], ends.new_full((1,), rows)])
    # split_item 3: one result; group_type 0: rows are grouped; group_list_type 0: by their ends
    (y,) = call(
        "npu_grouped_matmul",
        [x],
        [weight],
        group_list=closed,
        split_item=3,
        group_type=0,
        group_list_type=0,
    )
    owned = torch.arange(rows, device=x.device)[:, None] < ends[-1]
    return torch.where(owned, y, 0)
