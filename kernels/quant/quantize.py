"""transom.quantize: a weight in int8, int4, fp8 or mxfp4."""

from __future__ import annotations

from torch import Tensor

from transom.weights import QuantizedWeight, checked_group

from .fp8 import quantize_fp8, quantize_fp8_e8m0
from .int4 import quantize_int4
from .int8 import quantize_int8
from .mxfp4 import quantize_mxfp4


def quantize(
    weight: Tensor,
    format: str,
    *,
    group: int | tuple[int, int] | None = None,
    scale_format: str | None = None,
) -> QuantizedWeight:
    """`weight` in `format`: w ~ value(code) * scale, one scale for each block.

    weight        [..., N, K], any float dtype, on any device; K even for int4 and mxfp4.
    format        "int8" | "int4" | "fp8" | "mxfp4".
    group         (rows, columns) of a block, or an int g: (g, g) for fp8, (1, g) for the others;
                  0 or -1 is the whole extent. None: int8 a scale a row, int4 (1, 128), fp8
                  (128, 128), mxfp4 (1, 32). int8 and int4 take (1, columns), fp8 any block, mxfp4
                  only its own.
    scale_format  fp8: "f32" (default) or "e8m0", powers of two that never clip. The other formats
                  have one each: int8 and int4 "f32", mxfp4 "e8m0".
    Returns a QuantizedWeight, new memory; no gradient flows through it. Rounding is to nearest,
    ties to even; the exact rules are those of quantize_int8, quantize_int4, quantize_fp8,
    quantize_fp8_e8m0 and quantize_mxfp4, the operators that it calls. A block that holds NaN or Inf
    dequantises to NaN everywhere. Raises ValueError and TypeError in one line.
    Source: the operators' own.
    """
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        seen = str(getattr(weight, "dtype", type(weight).__name__)).removeprefix("torch.")
        raise TypeError(f"quantize: weight is {seen}; expected a floating-point tensor")
    if weight.ndim < 2:
        raise ValueError(f"quantize: weight has shape {list(weight.shape)}; expected [..., N, K]")
    rows, columns = checked_group(format, group, "quantize")
    kinds = {"fp8": ("f32", "e8m0"), "mxfp4": ("e8m0",)}.get(format, ("f32",))
    if scale_format is not None and scale_format not in kinds:
        raise ValueError(
            f"quantize: scale_format is {scale_format!r}; {format} has {' or '.join(kinds)}"
        )
    if format in ("int8", "int4") and rows != 1:
        raise ValueError(f"quantize: group is {rows}x{columns}; {format} has groups of 1xcolumns")
    weight = weight.detach()
    n, k = weight.shape[-2:]
    block = {"rows": rows or max(n, 1), "columns": columns or max(k, 1)}
    zeros = None
    if format == "int8":
        values, scales = quantize_int8(weight, group=block["columns"])
    elif format == "int4":
        values, scales, zeros = quantize_int4(weight, group=block["columns"])
    elif format == "mxfp4":
        values, scales = quantize_mxfp4(weight)
    elif scale_format == "e8m0":
        values, scales = quantize_fp8_e8m0(weight, **block)
    else:
        values, scales = quantize_fp8(weight, **block)
    return QuantizedWeight(format, values, scales, zeros, group=(rows, columns))
