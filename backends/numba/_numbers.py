"""Numbers inside kernels: bfloat16 and float16 as codes, exp.

numba has neither type. A bfloat16 array comes in as uint16 and a float16 array as int16, so that
the array's type says which it is; `wide` reads an element as float32 and `narrow` rounds to one, to
nearest, ties to even. All of it is arithmetic on bits that compilers turn into vector code.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from ._compile import STRICT, strict


@intrinsic
def bits_of(typingctx, x):
    """The bits of a float32, as int32."""
    if x != types.float32:
        return None

    def generate(context, builder, signature, values):
        return builder.bitcast(values[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def float_of(typingctx, bits):
    """The float32 of these int32 bits."""
    if not isinstance(bits, types.Integer):
        return None

    def generate(context, builder, signature, values):
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.int32), generate


def wide(code):
    """An element as float32."""


def narrow(x, like):
    """The float32 x as an element of the type of `like`, an array."""


@overload(wide, jit_options=STRICT)
def _wide(code):
    if code == types.float32:
        return lambda code: code
    if code == types.uint16:
        return lambda code: float_of(np.int32(np.uint32(code) << np.uint32(16)))
    if code == types.int16:
        return _from_half
    return None


@overload(narrow, jit_options=STRICT)
def _narrow(x, like):
    if like.dtype == types.float32:
        return lambda x, like: x
    if like.dtype == types.uint16:
        return _to_bfloat
    if like.dtype == types.int16:
        return _to_half
    return None


def _from_half(code):
    # The magnitude's bits, moved to float32's place, are 2^-112 of the value; subnormals included,
    # since the product with 2^112 normalises them.
    magnitude = (np.int32(code) & np.int32(0x7FFF)) << np.int32(13)
    sign = (np.int32(code) & np.int32(0x8000)) << np.int32(16)
    if magnitude >= np.int32(0x7C00 << 13):  # Inf, NaN
        return float_of(magnitude | np.int32(0x70000000) | sign)
    scaled = float_of(magnitude) * np.float32(2.0**112)
    return float_of(bits_of(scaled) | sign)


def _to_bfloat(x, like):
    bits = bits_of(x)
    if (bits & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000):  # NaN: stays one when it is cut
        return np.uint16((bits >> np.int32(16)) | np.int32(0x40))
    half = np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
    return np.uint16((bits + half) >> np.int32(16))


def _to_half(x, like):
    bits = bits_of(x)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    magnitude = bits & np.int32(0x7FFFFFFF)
    if magnitude > np.int32(0x7F800000):
        return np.int16(sign | np.int32(0x7E00))
    if magnitude >= np.int32(0x477FF000):  # 65520 and more round to Inf
        return np.int16(sign | np.int32(0x7C00))
    if magnitude < np.int32(0x38800000):
        # Added to 0.5, whose last place is 2^-24, the value is rounded as a subnormal is.
        sum_ = float_of(magnitude) + np.float32(0.5)
        return np.int16(sign | (bits_of(sum_) - np.int32(0x3F000000)))
    odd = (magnitude >> np.int32(13)) & np.int32(1)
    return np.int16(sign | ((magnitude - np.int32(0x38000000) + np.int32(0xFFF) + odd) >> 13))


@strict
def exp(x):
    """e**x of a float32, within 2 units in the last place; 0 below -104, Inf above 88.73, NaN for
    NaN.

    As in csrc/cpu/base/vector.h: n = round(x / ln 2), a polynomial (Cephes' expf) on the rest,
    times 2^n in two factors.
    """
    y = np.float32(89.0) if x > np.float32(89.0) else x
    y = np.float32(-104.0) if y < np.float32(-104.0) else y
    n = np.floor(y * np.float32(1.44269504) + np.float32(0.5))
    r = (y - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)
    p = r * np.float32(1.9875691500e-4) + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = np.int32(n) if n == n else np.int32(0)
    half = power >> np.int32(1)
    low = float_of((half + np.int32(127)) << np.int32(23))
    return p * low * float_of((power - half + np.int32(127)) << np.int32(23))


@strict
def sigmoid(x):
    """1 / (1 + e**-x) of a float32."""
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


@intrinsic
def prefetch(typingctx, row, i):
    """Begin to load the cache line of row[i]; row is a C array of one dim."""
    if not isinstance(row, types.Array):
        return None

    def generate(context, builder, signature, values):
        array = context.make_array(row)(context, builder, values[0])
        place = builder.bitcast(builder.gep(array.data, [values[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, word, word, word])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(hint, [place, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(row, types.int64), generate
