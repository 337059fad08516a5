"""E4M3 and E2M1 rounding and E8M0 scales in NumPy, from the formats' tables: for references."""

from __future__ import annotations

import numpy as np


def values_of(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Every magnitude of a small float by code, from sign-free exponent and mantissa fields."""
    bias = 2 ** (exponent_bits - 1) - 1
    codes = np.arange(2 ** (exponent_bits + mantissa_bits))
    e, m = codes >> mantissa_bits, (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    return np.where(e == 0, m * 2.0 ** (1 - bias), (1 + m) * 2.0 ** (e - bias))


E4M3 = values_of(4, 3)[:127]  # 127 is NaN
E2M1 = values_of(2, 1)


def nearest_code(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The code of the table's value nearest to |x|: ties to the even code, saturating, NaN is 0."""
    middles = (table[1:] + table[:-1]) / 2
    below = np.searchsorted(middles, np.abs(x), side="left")
    above = np.searchsorted(middles, np.abs(x), side="right")
    return np.where(np.isnan(x), 0, np.where(below % 2 == 0, below, above))


def power_above(x: np.ndarray) -> np.ndarray:
    """The E8M0 byte of the least power of two at or above x; 255 where x is NaN or Inf."""
    mantissa, exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))
    byte = exponent + 127 - (mantissa == 0.5)
    return np.where(np.isfinite(x), byte, 255).astype(np.uint8)


def power_of(byte: np.ndarray) -> np.ndarray:
    """2^(byte-127); NaN for 255."""
    return np.where(byte == 255, np.nan, np.exp2(byte.astype(np.float64) - 127))
