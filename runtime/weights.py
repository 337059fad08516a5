"""Weights: a plain tensor or a quantised one, read tile by tile.

A `QuantizedWeight` is a module that owns its payload, its scales and, for int4, its zero points as
buffers. It is accepted wherever a weight is, moves with `.to(device)`, keeps its bytes when a model
is cast, and travels through `state_dict` and safetensors together with a description of its format.

The description is one short string, the *spec*: `<format>:<rows>x<columns>`, for example
`int4:1x64` or `fp8:128x128`. Rows and columns are the size of the block that shares one scale; 0
stands for the whole extent, so that `int8:1x0` is one scale for each row. Blocks at the lower and
right edge may be partial: the grid of scales is the ceiling of the division. Whether scales are
float32 or E8M0 bytes is told by their dtype (float32 or uint8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .codes import decode_e2m1, decode_e4m3, decode_e8m0, pack_nibbles, unpack_nibbles, unpack_words

FORMATS = ("int8", "int4", "fp8", "mxfp4")
DEFAULT_GROUP = {"int8": (1, 0), "int4": (1, 128), "fp8": (128, 128), "mxfp4": (1, 32)}
# One pass of `dequantize` decodes about this many elements, so that its float32 temporaries stay
# near 16 MiB.
TILE_ELEMENTS = 1 << 20


class QuantizedWeight(nn.Module):
    """w[..., n, k] = value(values[..., n, k]) * scale(scales[..., n // rows, k // columns]).

    values  int8: int8 [..., N, K]; fp8: uint8 codes of E4M3FN [..., N, K]; int4 and mxfp4: uint8
            [..., N, K/2], the low nibble holds the even element. Stored as bytes, so that casting a
            model never rounds a payload.
    scales  [..., ceil(N/rows), ceil(K/columns)], float32, or uint8 E8M0 of value 2^(byte-127),
            where 255 is NaN. int8 and int4 take float32, mxfp4 takes E8M0, fp8 takes either.
    zeros   uint8, shape of `scales`, int4 only: value = nibble - zero. GPTQ's zero points reach 16.

    Constructing takes tensors as checkpoints hold them and converts no value: float8_e4m3fn,
    float8_e8m0fnu, float4_e2m1fn_x2 and (for packed formats) int8 payloads are viewed as bytes;
    float16 and bfloat16 scales are widened to float32, which is exact. `group` is (rows, columns)
    or an int for (1, columns); 0 is the whole extent; None is int8 (1, 0), int4 (1, 128), fp8 (128,
    128), mxfp4 (1, 32). `scale_format` ("f32" or "e8m0") states what the caller believes the scales
    to be; a contradiction raises. With float32 arithmetic that flushes subnormals to zero, a scale
    of byte 0 (2^-127) reads as 0.

    Raises ValueError for unknown formats, groups and shapes that disagree, TypeError for dtypes.
    Source: OCP Microscaling Formats 1.0 (E2M1, E8M0); OCP 8-bit floating point 1.0 (E4M3).
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: str
    requires_grad = False
    """Quantised weights have no gradient; asked of every argument of a call."""

    def __init__(
        self,
        format: str,
        values: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        group: int | tuple[int, int] | None = None,
        scale_format: str | None = None,
    ) -> None:
        super().__init__()
        rows, columns = checked_group(format, group)
        values = _stored_values(format, values)
        scales = _stored_scales(format, scales, scale_format)
        zeros = _stored_zeros(format, zeros)
        if values.ndim < 2:
            raise ValueError(
                f"QuantizedWeight: values have shape {list(values.shape)}; expected [..., N, K]"
            )
        *lead, n, k = logical_shape(values.shape, format)
        grid = [*lead, grid_size(n, rows), grid_size(k, columns)]
        for name, tensor in (("scales", scales), ("zeros", zeros)):
            if tensor is None:
                continue
            if list(tensor.shape) != grid:
                raise ValueError(
                    f"QuantizedWeight: {name} have shape {list(tensor.shape)}; {format} weight "
                    f"{[*lead, n, k]} in groups of {rows}x{columns} needs {grid}"
                )
            if tensor.device != values.device:
                raise ValueError(
                    f"QuantizedWeight: {name} are on {tensor.device}; values are on {values.device}"
                )
        self.spec = f"{format}:{rows}x{columns}"
        # Checkpoint loaders hand out Parameters, of which float ones would ask for gradients.
        self.register_buffer("values", values.detach())
        self.register_buffer("scales", scales.detach())
        self.register_buffer("zeros", None if zeros is None else zeros.detach())

    # What it is

    @property
    def format(self) -> str:
        """ "int8", "int4", "fp8" or "mxfp4"."""
        return self.spec.partition(":")[0]

    @property
    def group(self) -> tuple[int, int]:
        """(rows, columns) of the block that shares one scale; 0 is the whole extent."""
        return parse_spec(self.spec)[1:]

    @property
    def scale_format(self) -> str:
        """ "f32" or "e8m0"."""
        return "e8m0" if self.scales.dtype == torch.uint8 else "f32"

    @property
    def shape(self) -> torch.Size:
        """The logical shape [..., N, K], in elements."""
        return torch.Size(logical_shape(self.values.shape, self.spec))

    @property
    def ndim(self) -> int:
        """The number of logical dimensions."""
        return self.values.ndim

    @property
    def device(self) -> torch.device:
        """Where the payload lies."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of payload, scales and zero points together."""
        return sum(t.numel() * t.element_size() for t in self._buffers.values() if t is not None)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a plan for this weight depends on: everything but the values."""
        values, scales, _, spec = _parts(self)
        return spec, values.shape, values.stride(), values.device, scales.dtype, scales.stride()

    def is_contiguous(self) -> bool:
        """True if payload, scales and zero points are."""
        return all(t is None or t.is_contiguous() for t in self._buffers.values())

    def stride(self, dim: int) -> int:
        """The payload's stride, in stored elements."""
        return self.values.stride(dim)

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        rows, columns = self.group
        return (
            f"{self.format} {list(self.shape)}, one {self.scale_format} scale for each "
            f"{rows or 'all'}x{columns or 'all'}, {self.nbytes:,} bytes, {self.device}"
        )

    # What it holds

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The logical weight [..., N, K] as a new tensor of `dtype`.

        Products are float32 (float64 when `dtype` is) and rounded once to `dtype`. A NaN scale,
        which is what quantising a block with NaN or Inf gives, and the NaN codes of fp8 come out as
        NaN. Temporaries are bounded.
        """
        values, scales, zeros, spec = _parts(self)
        shape = self.shape
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        tile = max(1, TILE_ELEMENTS // shape[-1])
        if torch.compiler.is_compiling() or tile >= shape[-2] and shape.numel() <= TILE_ELEMENTS:
            # A transposed payload's strides survive elementwise operations: contiguous() ends them.
            return _decode_rows(values, scales, zeros, spec, 0, shape[-2], dtype).contiguous()
        out = torch.empty(shape, dtype=dtype, device=self.device)
        flat = out.view(-1, *shape[-2:])
        for index, expert in enumerate(self._matrices()):
            for start in range(0, shape[-2], tile):
                stop = min(start + tile, shape[-2])
                flat[index, start:stop] = weight_tile(expert, None, start, stop, dtype)
        return out

    def select(self, index: int) -> QuantizedWeight:
        """The weight at `index` of the first dimension, sharing memory with this one."""
        values, scales, zeros, spec = _parts(self)
        return _assemble(
            values[index], scales[index], None if zeros is None else zeros[index], spec
        )

    def _matrices(self) -> list[QuantizedWeight]:
        """Every [N, K] matrix of the leading dimensions, sharing memory."""
        if self.ndim == 2:
            return [self]
        return [matrix for i in range(self.shape[0]) for matrix in self.select(i)._matrices()]

    # How it moves and travels

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        # Casting a model (.half(), .to(bfloat16)) must not touch it: a rounded scale is another
        # weight.
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_extra_state(self) -> Tensor:
        """The spec as uint8 text, a tensor because safetensors stores nothing else."""
        return torch.tensor(list(self.spec.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to restore: `_load_from_state_dict` compared it before anything was written."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch would copy f32 scales into an E8M0 buffer, or int4 bytes into mxfp4, without a word.
        name = prefix.rstrip(".") or "the weight"
        text = state_dict.get(prefix + "_extra_state")
        if text is not None:
            seen = bytes(text.tolist()).decode(errors="replace")
            if seen != self.spec:
                raise ValueError(
                    f"load_state_dict: {name} was saved as {seen}; this model holds {self.spec}; "
                    "quantise the model in the same format before loading"
                )
        for part, own in self._buffers.items():
            given = state_dict.get(prefix + part)
            if given is None or own is None:
                continue
            stored = _stored_values(self.format, given) if part == "values" else given
            if part == "scales":
                stored = _stored_scales(self.format, given, self.scale_format)
            if stored.shape != own.shape or stored.dtype != own.dtype:
                raise ValueError(
                    f"load_state_dict: {name}.{part} is {_seen(stored)}; expected {_seen(own)}"
                )
            if stored is not given:
                state_dict[prefix + part] = stored
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Wire formats: repacked once, value for value

    @classmethod
    def from_mxfp4_blocks(cls, blocks: Tensor, scales: Tensor) -> QuantizedWeight:
        """gpt-oss: blocks uint8 [..., N, G, 16] and E8M0 scales [..., N, G] -> [..., N, 32*G].

        The payload is a view. Note that transformers' own dequantisation returns the transpose.
        """
        if blocks.ndim < 3 or blocks.shape[-1] != 16:
            raise ValueError(
                f"from_mxfp4_blocks: blocks have shape {list(blocks.shape)}; "
                "expected [..., N, G, 16]"
            )
        return cls("mxfp4", blocks.flatten(-2), scales)

    @classmethod
    def from_awq(
        cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group: int | None = None
    ) -> QuantizedWeight:
        """AWQ: w[k, n] = (q - z) * s, returned as the weight [..., N, K] in groups along K.

        qweight int32 [..., K, N/8] and qzeros int32 [..., K/group, N/8]: nibble i of a word is
        output channel (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight. scales float16, bfloat16 or float32
        [..., K/group, N]. `group` None is K divided by the rows of `scales`.
        """
        order = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds channel 0, 1, 2, ...
        _need_words("from_awq", qweight=qweight, qzeros=qzeros)
        codes, zeros = unpack_words(qweight, order), unpack_words(qzeros, order)
        return cls._from_groups("from_awq", codes, zeros, scales, group)

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        *,
        g_idx: Tensor | None = None,
        group: int | None = None,
    ) -> QuantizedWeight:
        """GPTQ (v1): w[k, n] = (q - (z + 1)) * s, as the weight [..., N, K] in groups along K.

        qweight int32 [..., K/8, N]: nibble i of a word is input channel i of its eight. qzeros
        int32 [..., K/group, N/8], natural order, stored minus one. scales float16, bfloat16 or
        float32 [..., K/group, N]. A `g_idx` that reorders the input channels (desc_act) raises
        ValueError.
        """
        order = (0, 1, 2, 3, 4, 5, 6, 7)
        _need_words("from_gptq", qweight=qweight, qzeros=qzeros)
        codes = unpack_words(qweight.transpose(-1, -2), order).transpose(-1, -2)
        zeros = unpack_words(qzeros, order) + 1
        if g_idx is not None:
            k = codes.shape[-2]
            size = group or -(-k // max(scales.shape[-2], 1))
            expected = torch.div(torch.arange(k, device=g_idx.device), size, rounding_mode="floor")
            if not torch.equal(g_idx.long(), expected.expand_as(g_idx)):
                raise ValueError(
                    "from_gptq: g_idx reorders the input channels (desc_act); expected channels in "
                    "order; requantise with desc_act=False"
                )
        return cls._from_groups("from_gptq", codes, zeros, scales, group)

    @classmethod
    def _from_groups(
        cls, op: str, codes: Tensor, zeros: Tensor, scales: Tensor, group: int | None
    ) -> QuantizedWeight:
        """codes [..., K, N], one an element, and zeros, scales [..., K/group, N] -> [..., N, K]."""
        k, groups = codes.shape[-2], scales.shape[-2]
        if group is None:
            if groups == 0 or k % groups:
                raise ValueError(
                    f"{op}: K = {k} is no multiple of the {groups} groups of scales; expected a "
                    "multiple; give group="
                )
            group = k // groups
        return cls(
            "int4",
            pack_nibbles(codes.transpose(-1, -2).contiguous()),
            scales.transpose(-1, -2).contiguous(),
            zeros.transpose(-1, -2).contiguous(),
            group=group,
        )


Weight: TypeAlias = Tensor | QuantizedWeight


def replace_weight(module: nn.Module, name: str, weight: Weight) -> None:
    """module.name = weight, also where torch refuses: a QuantizedWeight where a Parameter stood.

    Raises AttributeError if `module` has nothing of that name.
    """
    if not hasattr(module, name):
        raise AttributeError(
            f"replace_weight: {type(module).__name__} has no {name!r}; expected a parameter's name"
        )
    delattr(module, name)
    setattr(module, name, weight)


# Reading a weight


def weight_tile(
    weight: Weight, index: int | None, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """weight[index][start:stop] as [stop-start, K] of `dtype`; index None: the weight is 2-D.

    Reads nothing but that tile. A plain tensor that already has `dtype` comes back as a view.
    """
    if isinstance(weight, Tensor):
        return (weight if index is None else weight[index])[start:stop].to(dtype)
    values, scales, zeros, spec = _parts(weight)
    if index is not None:
        values, scales = values[index], scales[index]
        zeros = None if zeros is None else zeros[index]
    return _decode_rows(values, scales, zeros, spec, start, stop, dtype)


def gather_rows(weight: Weight, index: Tensor, dtype: torch.dtype) -> Tensor:
    """weight[index] of a 2-D weight, as a new [n, K] of `dtype`; `index` [n] is int64."""
    if isinstance(weight, Tensor):
        return weight.index_select(0, index).to(dtype)
    values, scales, zeros, spec = _parts(weight)
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


def weight_args(weight: Weight) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    """(values, scales, zeros, spec): how a weight crosses a torch schema; a tensor has spec ""."""
    return _parts(weight) if isinstance(weight, QuantizedWeight) else (weight, None, None, "")


def weight_from(values: Tensor, scales: Tensor | None, zeros: Tensor | None, spec: str) -> Weight:
    """The weight that `weight_args` took apart, sharing its memory; nothing is checked again."""
    if not spec:
        return values
    assert scales is not None
    return _assemble(values, scales, zeros, spec)


def logical_shape(values_shape: Sequence[int], spec: str) -> tuple[int, ...]:
    """The shape in elements of a payload of that shape (sizes may be symbolic); "" is a tensor."""
    if spec.startswith(("int4", "mxfp4")):
        return (*values_shape[:-1], values_shape[-1] * 2)
    return tuple(values_shape)


def parse_spec(spec: str) -> tuple[str, int, int]:
    """ "fp8:128x64" -> ("fp8", 128, 64)."""
    format, _, group = spec.partition(":")
    rows, _, columns = group.partition("x")
    return format, int(rows), int(columns)


def grid_size(extent: int, block: int) -> int:
    """How many blocks cover `extent` elements; a block of 0 is the whole extent."""
    return -(-extent // block) if block else min(extent, 1)


# Inside


def checked_group(
    format: str, group: int | tuple[int, int] | None, caller: str = "QuantizedWeight"
) -> tuple[int, int]:
    """(rows, columns) of `group` for `format`, with the format's default for None.

    Raises ValueError if there is no such format or the format has no such group.
    """
    if format not in FORMATS:
        raise ValueError(f"{caller}: format is {format!r}; expected one of {', '.join(FORMATS)}")
    if group is None:
        return DEFAULT_GROUP[format]
    rows, columns = (1, group) if isinstance(group, int) else group
    if rows < 0 or columns < 0:
        raise ValueError(f"{caller}: group is {group}; expected sizes >= 0 (0: the whole extent)")
    if format == "mxfp4" and (rows, columns) != (1, 32):
        raise ValueError(f"{caller}: group is {rows}x{columns}; mxfp4 has one scale for each 1x32")
    return rows, columns


def _assemble(values: Tensor, scales: Tensor, zeros: Tensor | None, spec: str) -> QuantizedWeight:
    """A QuantizedWeight from its parts, in a microsecond or two.

    nn.Module.__init__ and register_buffer would cost more than the rest of an operator's dispatch.
    The empty tables of hooks are shared between all weights made here: they are views for one call,
    nobody hooks them.
    """
    weight = object.__new__(QuantizedWeight)
    state = weight.__dict__
    state.update(_MODULE_STATE)
    state["_parameters"] = {}
    state["_modules"] = {}
    state["_buffers"] = {"values": values, "scales": scales, "zeros": zeros}
    state["spec"] = spec
    return weight


_MODULE_STATE = nn.Module().__dict__


def _parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None, str]:
    held: dict[str, Any] = weight._buffers  # nn.Module.__getattr__ is three times as slow
    return held["values"], held["scales"], held["zeros"], weight.spec


def _decode_rows(
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


def _stored_values(format: str, values: Tensor) -> Tensor:
    """The payload as bytes, viewed, never converted."""
    stored = torch.int8 if format == "int8" else torch.uint8
    same_bytes = {
        "int8": (),
        "fp8": ("float8_e4m3fn",),
        "int4": ("int8",),
        "mxfp4": ("int8", "float4_e2m1fn_x2"),
    }
    if values.dtype != stored:
        name = str(values.dtype).removeprefix("torch.")
        if name not in same_bytes[format]:
            hint = "; convert with fn_from_fnuz" if name == "float8_e4m3fnuz" else ""
            expected = " or ".join((str(stored).removeprefix("torch."), *same_bytes[format]))
            raise TypeError(
                f"QuantizedWeight: values are {name}; {format} expects {expected}{hint}"
            )
        return values.view(stored)
    return values


def _stored_scales(format: str, scales: Tensor, scale_format: str | None) -> Tensor:
    """float32, or E8M0 bytes as uint8."""
    if scale_format not in (None, "f32", "e8m0"):
        raise ValueError(f"QuantizedWeight: scale_format is {scale_format!r}; expected f32 or e8m0")
    name = str(scales.dtype).removeprefix("torch.")
    if name == "float8_e8m0fnu":
        scales = scales.view(torch.uint8)
    elif scales.dtype in (torch.float16, torch.bfloat16):
        scales = scales.float()
    seen = {torch.uint8: "e8m0", torch.float32: "f32"}.get(scales.dtype)
    allowed = {"mxfp4": ("e8m0",), "fp8": ("f32", "e8m0")}.get(format, ("f32",))
    if scale_format is not None:
        allowed = tuple(kind for kind in allowed if kind == scale_format)
    if seen not in allowed:
        words = {"f32": "float32", "e8m0": "E8M0 bytes (uint8 or float8_e8m0fnu)"}
        if not allowed:
            raise ValueError(
                f"QuantizedWeight: scale_format is {scale_format}; {format} has none such"
            )
        hint = (
            "; unpack the four E8M0 bytes of each int32 into rows first"
            if scales.dtype == torch.int32
            else ""
        )
        raise TypeError(
            f"QuantizedWeight: scales are {name}; {format} expects "
            f"{' or '.join(words[kind] for kind in allowed)}{hint}"
        )
    return scales


def _stored_zeros(format: str, zeros: Tensor | None) -> Tensor | None:
    if (zeros is None) == (format == "int4"):
        raise ValueError(
            f"QuantizedWeight: zeros are {'missing' if zeros is None else 'given'}; "
            f"{format} has {'a zero point for each group' if zeros is None else 'none'}"
        )
    if zeros is not None and zeros.dtype != torch.uint8:
        raise TypeError(
            f"QuantizedWeight: zeros are {str(zeros.dtype).removeprefix('torch.')}; expected uint8"
        )
    return zeros


def _seen(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _need_words(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{op}: {name} is {_seen(tensor)}; expected int32 words of 8 nibbles")
