"""Number formats of few bits as bytes: E4M3, E2M1, E8M0, packed nibbles.

Everything is integer arithmetic and float32, so that any device computes the same bits whether or
not it knows a float8 dtype.

*Source:* OCP 8-bit Floating Point 1.0 (E4M3); OCP Microscaling Formats 1.0 (E2M1, E8M0).
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> uint8 [..., K] of 0..15, the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., K] of 0..15, K even -> uint8 [..., K/2], the even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_words(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """int32 [..., n] -> uint8 [..., 8*n] of 0..15; element j of a word is its nibble order[j]."""
    nibbles = [((words >> 4 * nibble) & 15).to(torch.uint8) for nibble in order]
    return torch.stack(nibbles, -1).flatten(-2)


def decode_e4m3(codes: Tensor) -> Tensor:
    """uint8 codes of E4M3FN -> float32, exactly; 0x7F and 0xFF are NaN."""
    # The code's bits become a float16 of 2^-8 the value: its subnormals convert exactly everywhere.
    # Sign extension also fills bit 14 with the sign; the four exponent bits end at bit 13.
    signed = codes.view(torch.int8).to(torch.int16)
    half = ((signed << 7) & ~0x4000).view(torch.float16)
    return (half.float() * 256).masked_fill((codes & 0x7F) == 0x7F, float("nan"))


def encode_e4m3(x: Tensor) -> Tensor:
    """float32 -> uint8 codes of E4M3FN: nearest, ties to the even code, saturating; NaN stays."""
    return _encode(x, mantissa=3, bias=7, largest=E4M3_MAX, sign=0x80, nan=0x7F)


def decode_e2m1(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 of E2M1 -> float32 {0, .5, 1, 1.5, 2, 3, 4, 6} and negatives, exactly."""
    bits = codes.to(torch.int16)
    half = (((bits & 8) << 12) | ((bits & 7) << 9)).view(torch.float16)  # 2^-14 of the value
    return half.float() * 16384


def encode_e2m1(x: Tensor) -> Tensor:
    """float32 -> uint8 codes of E2M1: nearest, ties to the even code, saturating; NaN becomes 0."""
    return _encode(x, mantissa=1, bias=1, largest=E2M1_MAX, sign=8, nan=0)


def decode_e8m0(codes: Tensor) -> Tensor:
    """uint8 bytes -> float32 2^(byte-127), exactly; byte 0 is the subnormal 2^-127, 255 is NaN."""
    bits = codes.to(torch.int32) << 23
    bits = bits.masked_fill(codes == 0, 1 << 22).masked_fill(codes == 255, 0x7FC00000)
    return bits.view(torch.float32)


def encode_e8m0(x: Tensor) -> Tensor:
    """float32 >= 2^-126 -> uint8 byte of the least power of two not below; NaN and Inf are 255."""
    bits = x.contiguous().view(torch.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).clamp(max=255).to(torch.uint8)


def _encode(x: Tensor, mantissa: int, bias: int, largest: float, sign: int, nan: int) -> Tensor:
    magnitude = x.abs().clamp(max=largest).contiguous()
    bits = magnitude.view(torch.int32)
    drop = 23 - mantissa
    # Half of the dropped range, less one where the kept bits are even: a tie then carries to the
    # even code only.
    kept = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
    normal = kept - ((127 - bias) << mantissa)
    smallest = 2.0 ** (1 - bias)
    # torch.round takes ties to even
    subnormal = torch.round(magnitude * (2.0**mantissa / smallest)).to(torch.int32)
    code = torch.where(magnitude < smallest, subnormal, normal)
    code = torch.where(torch.isnan(x), nan, code)
    return torch.where(torch.signbit(x), code | sign, code).to(torch.uint8)
