"""Blocks of a matrix that share one scale, and tiles of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from transom import config

# float32 and int32 temporaries that quantising a tile keeps alive at once, at most.
TEMPORARIES = 16


def to_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """[b, n, k] -> [b, ceil(n/rows), rows, ceil(k/columns), columns], edges padded with zeros.

    A zero changes neither the largest magnitude of a block nor a range that must hold zero.
    """
    n, k = x.shape[-2:]
    if n % rows or k % columns:
        x = pad(x, (0, -k % columns, 0, -n % rows))
    return x.unflatten(-1, (x.shape[-1] // columns, columns)).unflatten(
        -3, (x.shape[-2] // rows, rows)
    )


def from_blocks(blocks: Tensor, n: int, k: int) -> Tensor:
    """The inverse of `to_blocks`: [b, N', rows, K', columns] -> [b, n, k]."""
    return blocks.flatten(-2).flatten(-3, -2)[..., :n, :k]


def over_tiles(
    weight: Tensor,
    rows: int,
    columns: int,
    outputs: Sequence[Tensor],
    quantise: Callable[[Tensor], tuple[Tensor, ...]],
) -> None:
    """Write quantise(tile) into `outputs`, tile by tile of `weight` [..., N, K] in float32.

    Tiles are whole multiples of `rows` rows, one at least. An output has N rows, or one for each
    `rows` of them.
    """
    n, k = weight.shape[-2:]
    if weight.numel() == 0:
        return
    source = weight.reshape(-1, n, k)
    targets = [out.view(-1, *out.shape[-2:]) for out in outputs]
    band = rows * -(-k // columns) * columns  # elements of `rows` rows with their padding
    bands = max(1, config.workspace_bytes() // (4 * TEMPORARIES * band))
    step = min(bands, -(-n // rows)) * rows
    matrices = max(1, bands // -(-n // rows))
    for first in range(0, source.shape[0], matrices):
        for start in range(0, n, step):
            stop = min(start + step, n)
            tile = source[first : first + matrices, start:stop].to(torch.float32)
            for target, part in zip(targets, quantise(tile), strict=True):
                per = 1 if target.shape[-2] == n else rows
                target[first : first + matrices, start // per : -(-stop // per)] = part
