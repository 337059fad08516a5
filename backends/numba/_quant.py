"""Quantised weights and rows of key caches inside kernels: codes, decoded to float32 group by
group."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba.core import types
from numba.extending import overload

from transom.facts import Facts
from transom.kernels.attention.cache_rows import BLOCK, GROUP, PLAIN, V4, WIDTH
from transom.requires import Requirement, condition
from transom.weights import QuantizedWeight
from transom.weights.layout import parse_spec, parts

from ._arrays import array
from ._compile import STRICT, part, strict
from ._numbers import bits_of, float_of

INT8, INT4, FP8, MXFP4 = range(4)
_FORMATS = {"int8": INT8, "int4": INT4, "fp8": FP8, "mxfp4": MXFP4}


class Codes(NamedTuple):
    """A quantised weight as kernels take it; a row of values has one row of scales for `rows` rows
    (0: for all), and a scale for `columns` columns (0: for all)."""

    values: np.ndarray
    """[E, N, bytes of a row], uint8 whatever the format."""
    scales: np.ndarray
    """[E, grid rows, grid columns], float32, or uint8 as E8M0."""
    zeros: np.ndarray
    """As scales, uint8; of int4 only, else empty."""
    format: int
    rows: int
    columns: int

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Codes:
        """The codes of a matrix, or of a stack of them."""
        values, scales, zeros, spec = parts(weight)
        name, rows, columns = parse_spec(spec)
        if values.dim() == 2:
            values, scales = values[None], scales[None]
            zeros = None if zeros is None else zeros[None]
        none = torch.empty((0, 0, 0), dtype=torch.uint8) if zeros is None else zeros
        return cls(
            array(values.view(torch.uint8)),
            array(scales),
            array(none),
            _FORMATS[name],
            rows,
            columns,
        )


def stored_contiguously(*weights: str) -> Requirement:
    """The parts of these weights, where they are quantised, are contiguous."""

    def test(f: Facts) -> str | None:
        for name in weights:
            for item in f.parts.get(name, ())[:3] if isinstance(f.dtypes.get(name), str) else ():
                if item is not None and not _contiguous(item[1], item[2]):
                    return (
                        f"{name} holds parts that are not contiguous; supported: contiguous parts; "
                        "quantise it anew, or make values and scales contiguous"
                    )
        return None

    return condition(
        f"parts of {', '.join(weights)} contiguous", tuple(f"layout:{n}" for n in weights), test
    )


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return not all(shape)
        expected *= size
    return True


def _scale(code):
    """A scale as float32."""


@overload(_scale, jit_options=STRICT)
def _(code):
    if code == types.float32:
        return lambda code: code
    return lambda code: _from_e8m0(code)


@strict
def _from_e8m0(code):
    if code == 0:
        return float_of(np.int32(1 << 22))
    if code == 255:
        return float_of(np.int32(0x7FC00000))
    return float_of(np.int32(code) << np.int32(23))


@part
def decode_row(codes, expert, row, out):
    """out[k] = element k of a row, float32."""
    values, scales, zeros, format, rows, columns = codes
    line = values[expert, row]
    at = 0 if rows == 0 else row // rows
    K = out.shape[0]
    step = K if columns == 0 else columns
    for first in range(0, K, max(1, step)):
        last = min(first + step, K)
        group = first // step
        scale, part_ = _scale(scales[expert, at, group]), out[first:last]
        if format == INT4:
            zero = np.int32(zeros[expert, at, group])
            _decode_int4(line, first, scale, zero, part_)
        elif format == MXFP4:
            _decode_e2m1(line, first, scale, part_)
        elif format == FP8:
            _decode_e4m3(line[first:last], scale, part_)
        else:
            some = line[first:last]
            for i in range(last - first):
                part_[i] = np.float32(np.int8(some[i])) * scale


@part
def _decode_int4(line, first, scale, zero, out):
    n = out.shape[0]
    if first % 2 == 0 and n % 2 == 0:
        some = line[first // 2 : (first + n) // 2]
        for i in range(n // 2):
            code = np.int32(some[i])
            out[2 * i] = np.float32((code & np.int32(15)) - zero) * scale
            out[2 * i + 1] = np.float32((code >> np.int32(4)) - zero) * scale
        return
    for i in range(n):
        code = np.int32(line[(first + i) // 2]) >> np.int32(4 * ((first + i) % 2))
        out[i] = np.float32((code & np.int32(15)) - zero) * scale


# Both small floats have few exponents: a code moved to float32's place, with its bias added, is the
# value t of a normal number; a subnormal code's is 2*t less its smallest normal. No step meets a
# subnormal float32, which a processor may be set to flush.


@part
def _decode_e2m1(line, first, scale, out):
    some = line[first // 2 : (first + out.shape[0]) // 2]
    for i in range(some.shape[0]):
        code = np.int32(some[i])
        out[2 * i] = _e2m1(code) * scale
        out[2 * i + 1] = _e2m1(code >> np.int32(4)) * scale


@strict
def _e2m1(code):
    """The value of the lower nibble."""
    t = float_of(((code & np.int32(7)) << np.int32(22)) + np.int32(126 << 23))
    value = t if (code & np.int32(6)) != 0 else np.float32(2) * t - np.float32(1)
    return float_of(bits_of(value) | ((code & np.int32(8)) << np.int32(28)))


@part
def _decode_e4m3(line, scale, out):
    for i in range(line.shape[0]):
        out[i] = _e4m3(np.int32(line[i])) * scale


@strict
def _e4m3(code):
    t = float_of(((code & np.int32(127)) << np.int32(20)) + np.int32(120 << 23))
    value = t if (code & np.int32(120)) != 0 else np.float32(2) * t - np.float32(2.0**-6)
    value = np.float32(np.nan) if (code & np.int32(127)) == np.int32(127) else value
    return float_of(bits_of(value) | ((code & np.int32(128)) << np.int32(24)))


@part
def decode_cache_row(line, out):
    """out [512] = a key from its row of 584 or 288 bytes, which `pack_cache_rows` describes."""
    if line.shape[0] == V4:
        for block in range(PLAIN // BLOCK):
            low, high = block * BLOCK, (block + 1) * BLOCK
            scale = _from_e8m0(line[V4 - 8 + block])
            _decode_e4m3(line[low:high], scale, out[low:high])
        rotated, rest = line[PLAIN : V4 - 8], out[PLAIN:]
        for i in range(rest.shape[0]):
            code = np.int32(rotated[2 * i]) | np.int32(rotated[2 * i + 1]) << np.int32(8)
            rest[i] = float_of(code << np.int32(16))
        return
    for group in range(WIDTH // GROUP):
        scale = _e4m3(np.int32(line[WIDTH // 2 + group]))
        low = group * GROUP
        _decode_e2m1(line[low // 2 : (low + GROUP) // 2], 0, scale, out[low : low + GROUP])
