"""Dtypes: their short names, groups, unit roundoffs, and the rules of a declaration.

A rule text reads `x: float; weight: x | f32 | quant; y: x`: alternatives are short names, groups,
another tensor's name (the same dtype), `acc(x)` (float64 if x is float64, else float32), or `quant`
(a QuantizedWeight).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

SHORT: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "fp8": torch.float8_e4m3fn,
}
GROUPS: dict[str, tuple[str, ...]] = {
    "float": ("f64", "f32", "bf16", "f16"),
    "index": ("i32", "i64"),
}
QUANTIZED = ("int8", "int4", "fp8", "mxfp4")

# Half the distance from 1 to the next number: the largest relative error of one rounding.
UNIT_ROUNDOFF: dict[torch.dtype, float] = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
}

Kind = torch.dtype | str
"""What a tensor argument holds: a torch dtype, or the format of a QuantizedWeight."""


def name(kind: Kind) -> str:
    """The dtype as users write it: 'float32', or 'mxfp4 weight' for a quantised format."""
    return f"{kind} weight" if isinstance(kind, str) else str(kind).removeprefix("torch.")


def accumulator(dtype: Kind) -> torch.dtype:
    """The dtype that sums over `dtype` are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def parse(text: str) -> torch.dtype:
    """The dtype of a short ('bf16') or long ('bfloat16') name."""
    found = SHORT.get(text, getattr(torch, text, None))
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype: {text!r} is unknown; expected one of {', '.join(SHORT)}")
    return found


@dataclass(frozen=True)
class Rules:
    """The dtype rules of one operator, parsed once."""

    alternatives: Mapping[str, tuple[str, ...]]

    @classmethod
    def parse(cls, text: str) -> Rules:
        out: dict[str, tuple[str, ...]] = {}
        for part in filter(None, (p.strip() for p in text.split(";"))):
            left, _, right = part.partition(":")
            alternatives: list[str] = []
            for alternative in (a.strip() for a in right.split("|")):
                alternatives += GROUPS.get(alternative, (alternative,))
            for tensor in left.split(","):
                out[tensor.strip()] = tuple(alternatives)
        return cls(out)

    def allowed(self, tensor: str, seen: Mapping[str, Kind]) -> list[Kind]:
        """What `tensor` may hold, given the other tensors of the call."""
        out: list[Kind] = []
        for alternative in self.alternatives[tensor]:
            if alternative == "quant":
                out += QUANTIZED
            elif alternative in SHORT:
                out.append(SHORT[alternative])
            elif alternative.startswith("acc("):
                out.append(accumulator(seen[alternative[4:-1]]))
            elif alternative in seen:
                out.append(seen[alternative])
        return list(dict.fromkeys(out))

    def check(self, op: str, seen: Mapping[str, Kind]) -> None:
        """Raise TypeError if a given tensor holds what the declaration does not name."""
        for tensor, kind in seen.items():
            if tensor in self.alternatives and kind not in (ok := self.allowed(tensor, seen)):
                kinds = [k for k in ok if not isinstance(k, str)]
                text = ", ".join(name(k) for k in kinds)
                if len(kinds) < len(ok):
                    text += " or a QuantizedWeight"
                raise TypeError(f"{op}: {tensor} is {name(kind)}; expected {text}")

    def output(self, tensor: str, seen: Mapping[str, Kind]) -> torch.dtype:
        """The dtype of an output; one that follows a QuantizedWeight is float32."""
        (kind,) = self.allowed(tensor, seen)
        return torch.float32 if isinstance(kind, str) else kind
