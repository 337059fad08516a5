"""Products and functions that give a row the same bits wherever it stands and whatever stands near.

So a token has the same result alone and in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Rows of every product under torch.use_deterministic_algorithms: a matrix product of one fixed
# shape gives a row the same bits wherever it stands (measured with MKL on AVX-512, torch 2.13), one
# of a varying shape does not.
ROW_TILE = 32


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; under deterministic algorithms in tiles, so that rows do not depend on M."""
    rows = left.shape[0]
    if not torch.are_deterministic_algorithms_enabled() or rows == 0:
        return left @ right
    padded = functional.pad(left, (0, 0, 0, -rows % ROW_TILE))
    return torch.cat([tile @ right for tile in padded.split(ROW_TILE)])[:rows]


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    # torch.sigmoid rounds the last elements of an array differently from the others (its vector and
    # scalar code differ, torch 2.13 on AVX-512): equal numbers would not tie. exp has one code.
    return 1.0 / (1.0 + torch.exp(-x))
