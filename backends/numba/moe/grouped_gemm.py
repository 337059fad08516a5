"""grouped_gemm: an expert's rows side by side, in tiles with the rows of its weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.kernels.moe.grouped_gemm import grouped_gemm
from transom.op import Weight

from .._arrays import array, floats, scratch
from .._pool import threads
from .._product import LANES
from .._quant import stored_contiguously
from ._rows import BLOCK, few_rows, pack_rows, room_for, rows_into, segments, weight_of


@grouped_gemm.impl(requires=(*floats("x"), stored_contiguously("weight")))
def numba(x: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """y[r] = weight[e] @ x[r], e the first expert with offsets[e] > r."""
    (M, K), N = x.shape, weight.shape[1]
    y = torch.empty((M, N), dtype=x.dtype)
    ends, few = offsets.tolist(), few_rows()
    whole = x.dtype == torch.float32
    groups = segments(ends, M, few, (K, 0 if whole else N), config.workspace_bytes() // 4)
    room, _ = room_for(groups, few, (K, 0))
    used = threads(M * N * K // 16)
    work = scratch(used, BLOCK, K), scratch(used, BLOCK, LANES)
    given, stored, order = array(x), weight_of(weight), np.arange(M)
    none, no_bias = np.empty(0, np.float32), np.empty((0, 0), np.float32)
    for parts in groups:
        first, last = int(parts[0, 1]), int(parts[-1, 1] + parts[-1, 2])
        sums = y if whole else torch.empty((last - first, N))
        pack_rows(parts, few, given, order, 1, room, used)
        places = order if whole else order - first
        rows_into(
            parts, few, stored, (N, K, False), room, 3, places, no_bias, none, array(sums), work
        )
        if not whole:
            y[first:last] = sums
    y[max(0, ends[-1] if ends else 0) :] = 0
    return y
