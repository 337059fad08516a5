"""Sums of rows into numbered rows, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor


def add_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """into[index[i]] += rows[i] for i = 0, 1, ...; rows with a negative index are skipped.

    into    [R, D], changed in place; any float dtype, the one of rows. Sums are kept in this dtype:
            pass float32 (or wider) and round once afterwards.
    index   [n], int32 or int64, below R.
    rows    [n, D]. What stands in a skipped row is not read into any sum, not even NaN or Inf.
    The same inputs give the same bits on every run, with any number of threads: on the CPU the
    additions happen one after the other in order of i; elsewhere they are sorted by row first,
    which keeps a fixed order within a row.
    Source: semantics of torch's index_add_ (CPU) and of index_put_ with accumulate=True (sorted on
    accelerators).
    """
    if index.shape[0] == 0 or into.numel() == 0:
        return
    skipped = index < 0
    if into.device.type == "cpu":
        if skipped.any():
            kept = (~skipped).nonzero()[:, 0]
            index, rows = index[kept], rows.index_select(0, kept)
        # index_put_ splits its rows between threads on the CPU and adds them in any order.
        into.index_add_(0, index, rows)
        return
    # A multiplication by zero would let NaN through, so skipped rows are replaced by zeros;
    # filtering them out would need their number, which is a synchronisation. The zeros are spread
    # over all rows, since a device adds what goes to one row one after the other.
    rows = rows.masked_fill(skipped[:, None], 0)
    spread = torch.arange(index.shape[0], device=index.device) % into.shape[0]
    into.index_put_((torch.where(skipped, spread, index.long()),), rows, accumulate=True)
