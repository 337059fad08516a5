"""Device functions that kernels share, in the Triton of 3.2: products, number formats, activations.

No 64-bit high product, no float8 pointers (their bytes are decoded here), no float atomics.
"""

from __future__ import annotations

import triton.language as tl
from triton import jit

from . import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


# What the interpreter does wrong with bfloat16 (triton 3.9) stands here and nowhere else: kernels
# load it, take it to float32 at once, and let `narrow` and `dot` do the rest.


@jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 rounded to DTYPE, ties to even; what every kernel stores its results with."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # it cuts the low bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@jit
def column(d, D, RAGGED: tl.constexpr):
    """Column numbers to form the addresses of gathered rows with, see _launch.ragged."""
    if RAGGED:
        d = tl.minimum(d, D - 1)
    return d


@jit
def bfloat16_probe(x, y, n, B: tl.constexpr):
    at = tl.arange(0, B)
    v = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * 1.0078125 + 0.00390625
    tl.store(y + at, narrow(v, y.dtype.element_ty), mask=at < n)


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, summed in float32; a and b of one dtype."""
    if INTERPRETED:  # it multiplies the bits; products of float32 are the same numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    return tl.dot(a, b, acc)


@jit
def mixture(weights, values, acc, PRECISION: tl.constexpr):
    """acc + weights @ values, weights float32.

    Weights beside 16-bit values are taken as the sum of two 16-bit terms: one would round the
    result a second time. Both products run on the tensor cores.
    """
    if values.dtype == tl.float32:
        acc = dot(weights, values, acc, PRECISION)
    else:
        high = narrow(weights, values.dtype)
        low = narrow(weights - high.to(tl.float32), values.dtype)
        acc = dot(low, values, dot(high, values, acc, PRECISION), PRECISION)
    return acc


# Both small floats have few exponents: a code moved to float32's place, with its bias added, is the
# value t of a normal number; a subnormal code's is 2*t less its smallest normal. No step meets a
# subnormal float32, which a processor may be set to flush.


@jit
def e4m3(code):
    """The value of an E4M3FN byte as float32; 0x7F and 0xFF are NaN."""
    bits = code.to(tl.int32)
    t = (((bits & 127) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where((bits & 120) != 0, t, 2.0 * t - 0.015625)
    value = tl.where((bits & 127) == 127, float("nan"), value)
    return tl.where((bits & 128) != 0, -value, value)


@jit
def e2m1(code):
    """The value of the low four bits as float32: 0, .5, 1, 1.5, 2, 3, 4, 6 and negatives."""
    bits = code.to(tl.int32)
    t = (((bits & 7) << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    value = tl.where((bits & 6) != 0, t, 2.0 * t - 1.0)
    return tl.where((bits & 8) != 0, -value, value)


@jit
def scale_of(stored):
    """A stored scale as float32: itself, or 2^(byte-127) of an E8M0 byte; 255 is NaN."""
    if stored.dtype == tl.float32:
        return stored
    bits = stored.to(tl.int32)
    bits = tl.where(bits == 0, 1 << 22, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


@jit
def _small_code(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    # The magnitude's code: nearest, ties to even, saturating; x is no NaN.
    magnitude = tl.minimum(tl.abs(x), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    drop: tl.constexpr = 23 - MANTISSA
    # Half of the dropped range, less one where the kept bits are even: a tie then carries to the
    # even code only.
    half: tl.constexpr = (1 << (drop - 1)) - 1
    kept = (bits + half + ((bits >> drop) & 1)) >> drop
    normal = kept - ((127 - BIAS) << MANTISSA)
    # One unit of float32 beside this constant is one code of the subnormals.
    beside: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    first: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    subnormal = (magnitude + beside).to(tl.int32, bitcast=True) - first
    smallest: tl.constexpr = 2.0 ** (1 - BIAS)
    return tl.where(magnitude < smallest, subnormal, normal)


@jit
def e4m3_code(x, usable):
    """float32 as the nearest E4M3FN code, int32: ties to even, saturating; 0 where not usable."""
    code = _small_code(tl.where(x == x, x, 0.0), 3, 7, 448.0)
    sign = tl.where(x.to(tl.int32, bitcast=True) < 0, 128, 0)
    return tl.where(usable, code | sign, 0)


@jit
def e2m1_code(x, usable):
    """float32 as the nearest E2M1 code, int32: ties to even, saturating; 0 where not usable."""
    code = _small_code(tl.where(x == x, x, 0.0), 1, 1, 6.0)
    sign = tl.where(x.to(tl.int32, bitcast=True) < 0, 8, 0)
    return tl.where(usable, code | sign, 0)


@jit
def e8m0_byte(x):
    """float32 >= 2^-126 as the byte of the least power of two not below, int32; NaN is 255."""
    bits = x.to(tl.int32, bitcast=True)
    up = tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    return tl.where(x == x, tl.minimum((bits >> 23) + up, 255), 255)


@jit
def rounded(x):
    """x to the nearest integer, ties to even, for |x| < 2^22: beside this constant one unit of
    float32 is 1."""
    return (x + 12582912.0) - 12582912.0


@jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without a quotient of infinities."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@jit
def gate_value(g, alpha, ACTIVATION: tl.constexpr):
    """f(g) of a gated activation; NaN stays NaN."""
    if ACTIVATION == "silu":
        return g * sigmoid(g)
    if ACTIVATION == "swiglu_oai":
        return g * sigmoid(alpha * g)
    if ACTIVATION == "gelu":
        return g * (0.5 * (1.0 + tl.erf(g * 0.7071067811865476)))
    if ACTIVATION == "gelu_tanh":
        return 0.5 * g * (1.0 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))
    return tl.where(g < 0, 0.0, g)


@jit
def gate_slope(g, alpha, ACTIVATION: tl.constexpr):
    """df/dg of `gate_value`."""
    if ACTIVATION == "silu":
        s = sigmoid(g)
        return s * (1.0 + g * (1.0 - s))
    if ACTIVATION == "swiglu_oai":
        s = sigmoid(alpha * g)
        return s * (1.0 + alpha * g * (1.0 - s))
    if ACTIVATION == "gelu":
        density = tl.exp(-0.5 * g * g) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * density
    if ACTIVATION == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * g * g)
        return 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * inner
    return tl.where(g > 0, 1.0, tl.where(g == g, 0.0, g))


@jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)
