"""Weights as kernels read them: where a matrix lies, and how its codes become numbers.

A kernel multiplies rows with a weight that it sees as [E, out, depth]; for a gradient the host
swaps the strides, and a quantised weight's blocks with them. Codes are exact in every float dtype,
so a scale that is one for a step of the depth is multiplied with the sum, not with the codes, and
nothing is rounded to the rows' dtype. Where the scale changes within a step, codes are scaled
before and the product is one of float32 (or of bfloat16, if scales are powers of two: exact too).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from transom.op import Weight
from transom.weights.layout import parse_spec, parts

from .._language import dot, e2m1, e4m3, narrow, scale_of
from .._launch import arch_of, gathers_whole_rows, ragged

WHOLE = 1 << 30
"""The block of a scale that serves a whole row or column."""

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Read(NamedTuple):
    """A weight as arguments of a kernel, and the constants that say how it is read."""

    arguments: tuple[Any, ...]
    """values, scales, zeros, then strides of expert, out and depth of the values and the scales."""
    FORMAT: str
    BLOCK_O: int
    BLOCK_D: int
    SCALING: str
    """none | after | before: what is multiplied by the scale, the sum of a step or the codes."""
    COMPUTE: Any
    PACKED: str
    """The dimension along which two codes share a byte: none | depth | out."""
    PRECISION: str

    def constants(self, suffix: str = "") -> dict[str, Any]:
        """By the kernel's names."""
        return {f"{n}{suffix}": getattr(self, n) for n in self._fields[1:]}

    def ragged(self, x: Tensor, size: int, step: int, gathered: bool) -> bool:
        """True if columns of x's rows must be clamped, of `size` a `step` at a time: of gathered
        rows, and where every other one is read."""
        packed = self.PACKED == "depth" and gathers_whole_rows(x)
        return packed or (gathered and ragged(x, size, step))

    @property
    def narrow(self) -> bool:
        """True if it is multiplied in bfloat16: float32 rows are then given as two of them."""
        return self.COMPUTE is tl.bfloat16


def precision(a: torch.dtype, b: torch.dtype, like: Tensor) -> str:
    """How float32 is multiplied, where there is tf32. Two float32 inputs: as
    torch.set_float32_matmul_precision asks. A narrow one that meets float32 loses nothing: by three
    products of tf32."""
    if not arch_of(like).startswith("sm_"):
        return "ieee"
    if a == b == torch.float32:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32x3"


def read(weight: Weight, x: Tensor, depth: int, *, transposed: bool = False) -> Read:
    """How kernels multiply rows in the dtype of `x` with `weight`, `depth` elements a step.

    transposed   the depth is along the weight's rows: for the gradient in x
    """
    turn = (0, 2, 1) if transposed else (0, 1, 2)
    if isinstance(weight, Tensor):
        same = weight.dtype == x.dtype
        strides = tuple(weight.stride(i) for i in turn)
        return Read(
            (weight, None, None, *strides, 0, 0, 0),
            "plain",
            WHOLE,
            WHOLE,
            "none",
            DTYPES[x.dtype] if same else tl.float32,
            "none",
            precision(x.dtype, weight.dtype, x),
        )
    values, scales, zeros, spec = parts(weight)
    if zeros is not None and zeros.stride() != scales.stride():  # kernels have one set of them
        scales, zeros = scales.contiguous(), zeros.contiguous()
    name, rows, columns = parse_spec(spec)
    blocks = (rows or WHOLE, columns or WHOLE)
    block_o, block_d = blocks[::-1] if transposed else blocks
    exact = x.dtype == torch.bfloat16 and scales.dtype == torch.uint8
    after = block_d % depth == 0 and not exact
    return Read(
        (values, scales, zeros, *(t.stride(i) for t in (values, scales) for i in turn)),
        name,
        block_o,
        block_d,
        "after" if after else "before",
        DTYPES[x.dtype] if after or exact else tl.float32,
        ("out" if transposed else "depth") if name in ("int4", "mxfp4") else "none",
        precision(x.dtype, torch.float32 if after else torch.uint8, x),
    )


@jit
def _value(code, FORMAT: tl.constexpr):
    """A code's number as float32, its low four bits if it has no more."""
    if FORMAT == "fp8":
        return e4m3(code)
    if FORMAT == "mxfp4":
        return e2m1(code)
    if FORMAT == "int4":
        return (code & 15).to(tl.float32)
    return code.to(tl.float32)


@jit
def _scaled(
    code,
    scales,
    zeros,
    o,
    d,
    k0,
    s_o,
    s_d,
    FORMAT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALING: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """[depth, out] of codes -> the numbers that are multiplied. `scales` and `zeros` are those of
    the expert; every index lies inside the weight."""
    value = _value(code, FORMAT)
    if SCALING == "before":
        at = (o // BLOCK_O)[None, :] * s_o + (d // BLOCK_D)[:, None] * s_d
        if FORMAT == "int4":
            value -= tl.load(zeros + at).to(tl.float32)
        value *= scale_of(tl.load(scales + at))
    elif FORMAT == "int4":
        at = (o // BLOCK_O) * s_o + (k0 // BLOCK_D) * s_d
        value -= tl.load(zeros + at).to(tl.float32)[None, :]
    return narrow(value, COMPUTE)


@jit
def add_product(
    acc,
    x,
    low,
    row,
    inside_r,
    x_k,
    weight,
    scales,
    zeros,
    e,
    o,
    inside_o,
    k0,
    K,
    last_o,
    w_e,
    w_o,
    w_d,
    s_e,
    s_o,
    s_d,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALING: tl.constexpr,
    COMPUTE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """acc[r, o] + sum over the step's d of x[row[r] + d] * weight[e, o, d].

    low       with SPLIT: where the low parts of the rows lie, so far behind the high ones
    row       places of the rows' first elements
    RAGGED    columns of the rows are clamped (see Read.ragged)
    last_o    the weight's last out
    """
    here = weight + e * w_e
    if FORMAT == "plain":
        d = k0 + tl.arange(0, BK)
        w_mask = inside_o[None, :]
        if not EVEN:
            w_mask = w_mask & (d < K)[:, None]
        b = tl.load(here + o[None, :] * w_o + d[:, None] * w_d, mask=w_mask, other=0.0)
        b = b.to(COMPUTE)
        a = _rows_at(x, row, inside_r, d, K, x_k, COMPUTE, EVEN, RAGGED)
        acc = dot(a, b, acc, PRECISION)
        if SPLIT:
            a = _rows_at(x + low, row, inside_r, d, K, x_k, COMPUTE, EVEN, RAGGED)
            acc = dot(a, b, acc, PRECISION)
    else:
        acc = _add_codes(
            acc,
            x,
            low,
            row,
            inside_r,
            x_k,
            here,
            scales + e * s_e,
            zeros,
            e * s_e,
            o,
            k0,
            K,
            last_o,
            w_o,
            w_d,
            s_o,
            s_d,
            BK,
            FORMAT,
            BLOCK_O,
            BLOCK_D,
            SCALING,
            COMPUTE,
            PACKED,
            PRECISION,
            SPLIT,
            EVEN,
            RAGGED,
        )
    return acc


@jit
def _rows_at(
    x, row, inside_r, d, K, x_k, COMPUTE: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr
):
    if RAGGED:
        return _clamped_rows_at(x, row, inside_r, d, K, x_k, COMPUTE)
    mask = inside_r[:, None]
    if not EVEN:
        mask = mask & (d < K)[None, :]
    return tl.load(x + row[:, None] + d[None, :] * x_k, mask=mask, other=0.0).to(COMPUTE)


@jit
def _every_other_at(
    x, row, inside_r, d, K, x_k, COMPUTE: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr
):
    """`_rows_at` of every other d. A mask on these is not enough: Ascend's lowering of it reads as
    many elements as there are to K, not half as many, and one behind them. So places are clamped,
    and values selected.
    """
    if EVEN and not RAGGED:
        return _rows_at(x, row, inside_r, d, K, x_k, COMPUTE, EVEN, False)
    return _clamped_rows_at(x, row, inside_r, d, K, x_k, COMPUTE)


@jit
def _clamped_rows_at(x, row, inside_r, d, K, x_k, COMPUTE: tl.constexpr):
    at = x + tl.where(inside_r, row, 0)[:, None] + tl.minimum(d, K - 1)[None, :] * x_k
    return tl.where(inside_r[:, None] & (d < K)[None, :], tl.load(at).to(COMPUTE), 0.0)


@jit
def _add_codes(
    acc,
    x,
    low,
    row,
    inside_r,
    x_k,
    weight,
    scales,
    zeros,
    s_at,
    o,
    k0,
    K,
    last_o,
    w_o,
    w_d,
    s_o,
    s_d,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALING: tl.constexpr,
    COMPUTE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """`add_product` of codes; weight and scales are the expert's, zeros lie at s_at of all."""
    # Codes are read from places clamped into the weight: what x is multiplied with there is zero.
    o = tl.minimum(o, last_o)
    here = zeros
    if FORMAT == "int4":
        here = zeros + s_at
    if SCALING == "after":
        total = tl.zeros_like(acc)
    else:
        total = acc
    if PACKED == "depth":  # a byte holds an even d and the next: two products of half the depth
        place = k0 // 2 + tl.arange(0, BK // 2)
        if not EVEN:
            place = tl.minimum(place, K // 2 - 1)
        codes = tl.load(weight + o[None, :] * w_o + place[:, None] * w_d)
        for odd in tl.static_range(2):
            d = k0 + 2 * tl.arange(0, BK // 2) + odd
            kept = d
            if not EVEN:
                kept = tl.minimum(d, K - 1)
            b = _scaled(
                codes >> (4 * odd),
                scales,
                here,
                o,
                kept,
                k0,
                s_o,
                s_d,
                FORMAT,
                BLOCK_O,
                BLOCK_D,
                SCALING,
                COMPUTE,
            )
            a = _every_other_at(x, row, inside_r, d, K, x_k, COMPUTE, EVEN, RAGGED)
            total = dot(a, b, total, PRECISION)
            if SPLIT:
                a = _every_other_at(x + low, row, inside_r, d, K, x_k, COMPUTE, EVEN, RAGGED)
                total = dot(a, b, total, PRECISION)
    else:
        d = k0 + tl.arange(0, BK)
        kept = d
        if not EVEN:
            kept = tl.minimum(d, K - 1)
        if PACKED == "out":
            codes = tl.load(weight + (o // 2)[None, :] * w_o + kept[:, None] * w_d)
            codes = codes >> (4 * (o % 2))[None, :].to(tl.uint8)
        else:
            codes = tl.load(weight + o[None, :] * w_o + kept[:, None] * w_d)
        b = _scaled(
            codes, scales, here, o, kept, k0, s_o, s_d, FORMAT, BLOCK_O, BLOCK_D, SCALING, COMPUTE
        )
        a = _rows_at(x, row, inside_r, d, K, x_k, COMPUTE, EVEN, RAGGED)
        total = dot(a, b, total, PRECISION)
        if SPLIT:
            a = _rows_at(x + low, row, inside_r, d, K, x_k, COMPUTE, EVEN, RAGGED)
            total = dot(a, b, total, PRECISION)
    if SCALING == "after":
        at = (o // BLOCK_O) * s_o + (k0 // BLOCK_D) * s_d
        total = acc + total * scale_of(tl.load(scales + at))[None, :]
    return total
