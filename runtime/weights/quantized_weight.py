"""The quantised weight as a module, and how a weight crosses a torch schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from . import checkpoints
from .layout import (
    check_grid,
    checked_group,
    dtype_and_shape,
    logical_shape,
    parse_spec,
    parts,
    stored_scales,
    stored_values,
    stored_zeros,
)
from .tiles import decode_rows, weight_tile

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
    zeros   uint8, shape of `scales`, int4 only: value = nibble - zero.

    Constructing takes tensors as checkpoints hold them and converts no value: float8_e4m3fn,
    float8_e8m0fnu, float4_e2m1fn_x2 and (for packed formats) int8 payloads are viewed as bytes;
    float16 and bfloat16 scales are widened to float32, which is exact. `group` is (rows, columns)
    or an int g: (g, g) for fp8, (1, g) for the others; 0 or -1 is the whole extent; None is int8
    (1, 0), int4 (1, 128), fp8 (128, 128), mxfp4 (1, 32). `scale_format` ("f32" or "e8m0") states
    what the caller believes the scales to be; a contradiction raises. With float32 arithmetic that
    flushes subnormals to zero, a scale of byte 0 (2^-127) reads as 0.

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
        values = stored_values(format, values)
        scales = stored_scales(format, scales, scale_format)
        zeros = stored_zeros(format, zeros)
        check_grid("QuantizedWeight:", values, scales, zeros, format, rows, columns)
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
        values, scales, zeros, spec = parts(self)
        stored = tuple(
            part if part is None else (part.shape, part.stride(), part.dtype, part.device)
            for part in (values, scales, zeros)
        )
        return spec, stored

    def is_contiguous(self) -> bool:
        """True if payload, scales and zero points are."""
        return all(t is None or t.is_contiguous() for t in self._buffers.values())

    def is_pinned(self) -> bool:
        """True if payload, scales and zero points lie in pinned host memory."""
        return all(t is None or t.is_pinned() for t in self._buffers.values())

    def pin_memory(self) -> QuantizedWeight:
        """The same weight in pinned host memory, where a device can read it in place; itself if it
        is there."""
        if self.is_pinned():
            return self
        values, scales, zeros, spec = parts(self)
        return _assemble(
            values.pin_memory(),
            scales.pin_memory(),
            None if zeros is None else zeros.pin_memory(),
            spec,
        )

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
        values, scales, zeros, spec = parts(self)
        shape = self.shape
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        tile = max(1, TILE_ELEMENTS // shape[-1])
        if torch.compiler.is_compiling() or tile >= shape[-2] and shape.numel() <= TILE_ELEMENTS:
            # A transposed payload's strides survive elementwise operations: contiguous() ends them.
            return decode_rows(values, scales, zeros, spec, 0, shape[-2], dtype).contiguous()
        out = torch.empty(shape, dtype=dtype, device=self.device)
        flat = out.view(-1, *shape[-2:])
        for index, expert in enumerate(self._matrices()):
            for start in range(0, shape[-2], tile):
                stop = min(start + tile, shape[-2])
                flat[index, start:stop] = weight_tile(expert, None, start, stop, dtype)
        return out

    def select(self, index: int) -> QuantizedWeight:
        """The weight at `index` of the first dimension, sharing memory with this one."""
        values, scales, zeros, spec = parts(self)
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
            stored = stored_values(self.format, given) if part == "values" else given
            if part == "scales":
                stored = stored_scales(self.format, given, self.scale_format)
            if stored.shape != own.shape or stored.dtype != own.dtype:
                raise ValueError(
                    f"load_state_dict: {name}.{part} is {dtype_and_shape(stored)}; "
                    f"expected {dtype_and_shape(own)}"
                )
            if stored is not given:
                state_dict[prefix + part] = stored
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Wire formats: repacked once, value for value

    @classmethod
    def from_mxfp4_blocks(cls, blocks: Tensor, scales: Tensor) -> QuantizedWeight:
        """See checkpoints.from_mxfp4_blocks."""
        return cls._read(checkpoints.from_mxfp4_blocks(blocks, scales))

    @classmethod
    def from_awq(
        cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group: int | None = None
    ) -> QuantizedWeight:
        """See checkpoints.from_awq."""
        return cls._read(checkpoints.from_awq(qweight, qzeros, scales, group=group))

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor | None,
        scales: Tensor,
        *,
        g_idx: Tensor | None = None,
        group: int | None = None,
        gptq_v2: bool = False,
        minus_one: str = "word",
    ) -> QuantizedWeight:
        """See checkpoints.from_gptq."""
        return cls._read(
            checkpoints.from_gptq(
                qweight,
                qzeros,
                scales,
                g_idx=g_idx,
                group=group,
                gptq_v2=gptq_v2,
                minus_one=minus_one,
            )
        )

    @classmethod
    def _read(cls, found: checkpoints.Read) -> QuantizedWeight:
        return cls(found.format, found.values, found.scales, found.zeros, group=found.group)


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


# Through a torch schema


def weight_args(weight: Weight) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    """(values, scales, zeros, spec): how a weight crosses a torch schema; a tensor has spec ""."""
    return parts(weight) if isinstance(weight, QuantizedWeight) else (weight, None, None, "")


def weight_from(
    values: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    spec: str,
    what: str = "weight_from: the weight",
) -> Weight:
    """The weight that `weight_args` took apart, sharing its memory.

    Whether its parts fit each other is looked at where a plan is made of them (check_parts); here,
    that there are some: ValueError, which begins with `what`.
    """
    if not spec:
        if scales is not None or zeros is not None:
            raise ValueError(f"{what} has scales or zeros and no spec; expected both or neither")
        return values
    if scales is None:
        raise ValueError(
            f"{what} has the spec {spec[:60]!r} and no scales; expected both or neither"
        )
    return _assemble(values, scales, zeros, spec)


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
