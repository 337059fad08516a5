"""Reading a weight: a tile or chosen rows, decoded to a float dtype; nothing else is touched."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import decode_e2m1, decode_e4m3, decode_e8m0, unpack_nibbles
from .layout import Stored, parse_spec, parts


def weight_tile(
    weight: Tensor | Stored, index: int | None, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """weight[index][start:stop] as [stop-start, K] of `dtype`; index None: the weight is 2-D.

    Reads nothing but that tile. A plain tensor that already has `dtype` comes back as a view.
    """
    if isinstance(weight, Tensor):
        return (weight if index is None else weight[index])[start:stop].to(dtype)
    values, scales, zeros, spec = parts(weight)
    if index is not None:
        values, scales = values[index], scales[index]
        zeros = None if zeros is None else zeros[index]
    return decode_rows(values, scales, zeros, spec, start, stop, dtype)


def gather_rows(weight: Tensor | Stored, index: Tensor, dtype: torch.dtype) -> Tensor:
    """weight[index] of a 2-D weight, as a new [n, K] of `dtype`; `index` [n] is int64."""
    if isinstance(weight, Tensor):
        return weight.index_select(0, index).to(dtype)
    values, scales, zeros, spec = parts(weight)
    _, rows, columns = parse_spec(spec)
    if rows == 0:
        block = torch.zeros_like(index)
    else:
        block = index if rows == 1 else torch.div(index, rows, rounding_mode="floor")
    return _decode(
        values.index_select(0, index),
        scales.index_select(0, block),
        None if zeros is None else zeros.index_select(0, block),
        spec,
        columns,
        dtype,
    )


def decode_rows(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    spec: str,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows start:stop of the second last dimension, decoded; leading dimensions pass through."""
    _, rows, columns = parse_spec(spec)
    return _decode(
        values[..., start:stop, :],
        _grid_rows(scales, rows, start, stop),
        None if zeros is None else _grid_rows(zeros, rows, start, stop),
        spec,
        columns,
        dtype,
    )


def _decode(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    spec: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """values [..., n, stored K] times scales [..., n or 1, grid] -> [..., n, K]."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scale = (decode_e8m0(scales) if scales.dtype == torch.uint8 else scales).to(work)
    if spec.startswith("int8"):
        decoded = values.to(work)
    elif spec.startswith("fp8"):
        decoded = decode_e4m3(values).to(work)
    elif spec.startswith("int4"):
        decoded = unpack_nibbles(values).to(work)
    else:
        decoded = decode_e2m1(unpack_nibbles(values)).to(work)
    k = decoded.shape[-1]
    whole = columns == 0 or columns >= k
    if not whole and k % columns == 0:  # no grid of the size of the tile
        blocks: Tensor = decoded.unflatten(-1, (k // columns, columns))
        if zeros is not None:
            blocks = blocks - zeros.to(work).unsqueeze(-1)
        return (blocks * scale.unsqueeze(-1)).flatten(-2).to(dtype)
    if not whole:
        scale = scale.repeat_interleave(columns, -1)[..., :k]
        zeros = None if zeros is None else zeros.repeat_interleave(columns, -1)[..., :k]
    if zeros is not None:
        decoded = decoded - zeros.to(work)
    return (decoded * scale).to(dtype)


def _grid_rows(grid: Tensor, rows: int, start: int, stop: int) -> Tensor:
    """The rows of a grid of scales for rows start:stop of the weight, one each (or one for all)."""
    if rows == 1:
        return grid[..., start:stop, :]
    if rows == 0:
        return grid
    first = start // rows
    near = grid[..., first : -(-stop // rows), :].repeat_interleave(rows, -2)
    return near[..., start - first * rows : stop - first * rows, :]
