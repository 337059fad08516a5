"""Weights as checkpoints hold them -> weights as operators read them, value for value.

Each reader answers what `QuantizedWeight` is made of, whose class methods of the same names they
are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import shown
from .codes import pack_nibbles, unpack_words
from .layout import dtype_and_shape


class Read(NamedTuple):
    """The arguments of QuantizedWeight."""

    format: str
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int | None = None


def from_mxfp4_blocks(blocks: Tensor, scales: Tensor) -> Read:
    """gpt-oss: blocks uint8 [..., N, G, 16] and E8M0 scales [..., N, G] -> [..., N, 32*G].

    The payload is a view. Note that transformers' own dequantisation returns the transpose.
    """
    if blocks.ndim < 3 or blocks.shape[-1] != 16:
        raise ValueError(
            f"from_mxfp4_blocks: blocks have shape {list(blocks.shape)}; expected [..., N, G, 16]"
        )
    return Read("mxfp4", blocks.flatten(-2), scales)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group: int | None = None) -> Read:
    """AWQ: w[k, n] = (q - z) * s, returned as the weight [..., N, K] in groups along K.

    qweight int32 [..., K, N/8] and qzeros int32 [..., K/group, N/8]: nibble i of a word is
    output channel (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight. scales float16, bfloat16 or float32
    [..., K/group, N]. `group` None is K divided by the rows of `scales`, -1 or 0 all of K.
    """
    order = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds channel 0, 1, 2, ...
    _need_words("from_awq", qweight=qweight, qzeros=qzeros)
    _need_matrices("from_awq", qweight=qweight, qzeros=qzeros, scales=scales)
    codes, zeros = unpack_words(qweight, order), unpack_words(qzeros, order)
    return _from_groups("from_awq", codes, zeros, scales, group)


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor | None,
    scales: Tensor,
    *,
    g_idx: Tensor | None = None,
    group: int | None = None,
    gptq_v2: bool = False,
    minus_one: str = "word",
) -> Read:
    """GPTQ of 4 bits: w[k, n] = (q - z) * s, as the weight [..., N, K] in groups along K.

    qweight    int32 [..., K/8, N]: nibble i of a word is input channel i of its eight
    qzeros     int32 [..., K/group, N/8], natural order; None or without elements: symmetric, z = 8
    scales     float16, bfloat16 or float32 [..., K/group, N]
    g_idx      the group of each input channel [K]. None, without elements, or all 0: channels in
               order; one that reorders the channels (desc_act) raises ValueError
    group      None is K divided by the rows of `scales`, -1 or 0 all of K
    gptq_v2    False: a zero point is stored minus one (checkpoint_format "gptq"); True: as it is
    minus_one  how the writer took the one off. "word": 0x11111111 off each word, with borrows
               (GPTQModel); "nibble": one off each nibble by itself, 0 becoming 15. Both store the
               same word unless it holds a zero point of 0 below its highest nibble.

    A zero point comes back as the writer had it, 0..15. (AutoGPTQ's own packing set all nibbles
    above a zero point of 0 as well: such words are spoiled in the file.)
    """
    order = (0, 1, 2, 3, 4, 5, 6, 7)
    if minus_one not in ("word", "nibble"):
        raise ValueError(f"from_gptq: minus_one is {shown(minus_one)}; expected 'word' or 'nibble'")
    _need_words("from_gptq", qweight=qweight, qzeros=qzeros)
    _need_matrices("from_gptq", qweight=qweight, scales=scales)
    codes = unpack_words(qweight.transpose(-1, -2), order).transpose(-1, -2)
    if qzeros is None or qzeros.numel() == 0:
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8, device=scales.device)
    else:
        _need_matrices("from_gptq", qzeros=qzeros)
        if gptq_v2:
            zeros = unpack_words(qzeros, order)
        elif minus_one == "word":
            zeros = unpack_words(qzeros + 0x11111111, order)  # int32 wraps, as the writer's did
        else:
            zeros = (unpack_words(qzeros, order) + 1) & 15
    if g_idx is not None and g_idx.numel():
        _need_order(g_idx, codes.shape[-2], scales.shape[-2], group)
    return _from_groups("from_gptq", codes, zeros, scales, group)


def fnuz_from_fn(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3FN codes and scales -> E4M3FNUZ codes and scales of the same values.

    For devices that compute in E4M3FNUZ (MI300). values uint8 of any shape, scales float32 or E8M0
    bytes. The same byte means half the value there, so scales double; 0x80, a negative zero here
    and NaN there, becomes 0; NaN becomes 0x80. Exact, except that an E8M0 scale of 2^127 has no
    double and becomes NaN.
    """
    nan = (values & 0x7F) == 0x7F
    return values.masked_fill(values == 0x80, 0).masked_fill(nan, 0x80), _doubled(scales, 1)


def fn_from_fnuz(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3FNUZ codes and scales -> E4M3FN codes and scales.

    values uint8 of any shape, scales float32 or E8M0 bytes. Exact when no code is 0x7F or 0xFF and
    no E8M0 scale is 2^-127: the bytes stay and the scales halve. The codes 0x7F and 0xFF (+-240)
    have no partner at half the scale; if there is one, or a scale that cannot halve, scales stay
    and values are re-encoded: exact from 2^-6 * scale upwards, below that rounded to a multiple of
    2^-9 * scale, ties to even. 0x80, NaN there, becomes 0x7F. Reads one boolean back from the
    device.
    """
    nan = values == 0x80
    magnitude = values & 0x7F
    stuck = (magnitude == 0x7F).any()
    if scales.dtype == torch.uint8:
        stuck = stuck | (scales == 0).any()
    if not bool(stuck):
        return values.masked_fill(nan, 0x7F), _doubled(scales, -1)
    # Half the value is one exponent less, or, below the smallest normal, half the code.
    half = torch.where(magnitude >= 16, magnitude - 8, (magnitude + ((magnitude >> 1) & 1)) >> 1)
    return (half | (values & 0x80)).masked_fill(nan, 0x7F), scales.clone()


def _from_groups(op: str, codes: Tensor, zeros: Tensor, scales: Tensor, group: int | None) -> Read:
    """codes [..., K, N], one an element, and zeros, scales [..., K/group, N] -> [..., N, K]."""
    k, groups = codes.shape[-2], scales.shape[-2]
    if group is None:
        if groups == 0 or k % groups:
            raise ValueError(
                f"{op}: K = {k} is no multiple of the {groups} groups of scales; expected a "
                "multiple; give group="
            )
        group = k // groups
    return Read(
        "int4",
        pack_nibbles(codes.transpose(-1, -2).contiguous()),
        scales.transpose(-1, -2).contiguous(),
        zeros.transpose(-1, -2).contiguous(),
        group,
    )


def _need_order(g_idx: Tensor, k: int, groups: int, group: int | None) -> None:
    """Raise ValueError if g_idx names anything but groups of neighbouring channels, in order."""
    if g_idx.shape[-1] != k:
        raise ValueError(
            f"from_gptq: g_idx has shape {list(g_idx.shape)}; expected [{k}], one group for each"
            " input channel"
        )
    size = k if group in (-1, 0) else group or -(-k // max(groups, 1))
    in_order = torch.div(torch.arange(k, device=g_idx.device), size, rounding_mode="floor")
    # Writers that don't reorder leave the buffer that they allocated, all 0, as often as not.
    if bool(g_idx.any()) and not torch.equal(g_idx.long(), in_order.expand_as(g_idx)):
        raise ValueError(
            "from_gptq: g_idx reorders the input channels (desc_act); expected channels in "
            "order; requantise with desc_act=False"
        )


def _need_words(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.int32:
            raise TypeError(
                f"{op}: {name} is {dtype_and_shape(tensor)}; expected int32 words of 8 nibbles"
            )


def _need_matrices(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            raise ValueError(
                f"{op}: {name} is {dtype_and_shape(tensor)}; expected at least two dimensions"
            )


def _doubled(scales: Tensor, times: int) -> Tensor:
    if scales.dtype != torch.uint8:
        return scales * 2.0**times
    moved = (scales.to(torch.int16) + times).clamp(0, 255).to(torch.uint8)
    return torch.where(scales == 255, scales, moved)
