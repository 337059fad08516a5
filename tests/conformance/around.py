"""Guards around what an implementation allocates: its outputs, and a C implementation's workspace,
which the host allocates for it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transom.op import Op
from transom.tolerance import as_tuple

from .agree import same_bits
from .cases import Case

AROUND = 256
"""Bytes on each side: leaves a workspace on the 64 bytes that it is promised."""

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


class Guarded(TorchDispatchMode):
    """Every new tensor without contents lies between guards; they and it hold `byte` throughout."""

    def __init__(self, byte: int) -> None:
        super().__init__()
        self.byte = byte
        self.buffers: list[tuple[torch.Tensor, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _EMPTY or not made.is_contiguous() or made.device.type == "meta":
            return made
        byte = self.byte & 1 if made.dtype == torch.bool else self.byte
        size = made.numel() * made.element_size()
        buffer = torch.full((size + 2 * AROUND,), byte, dtype=torch.uint8, device=made.device)
        self.buffers.append((buffer, made.dtype))
        return buffer[AROUND : AROUND + size].view(made.dtype).view(made.shape)

    def intact(self) -> bool:
        """True if nothing was written around any of them."""
        return all(
            bool((part == (self.byte & 1 if dtype == torch.bool else self.byte)).all())
            for buffer, dtype in self.buffers
            for part in (buffer[:AROUND], buffer[-AROUND:])
        )


def outputs(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """Around its outputs and its workspace nothing is written, and whatever they held before, a
    deterministic implementation computes the same bits.

    What it keeps between calls (a workspace) is not seen.
    """
    if op.mutates:
        return None  # the caller's own memory, whose guards Case.intact() looks at
    function, found = op.impls[impl].function, []
    op.invoke(function, *case.values)  # what is made once and kept is made outside of guards
    for byte in (0x33, 0xCC):
        with torch.no_grad(), Guarded(byte) as guarded:
            found.append(as_tuple(op.invoke(function, *case.values)))
        if not guarded.intact():
            return "memory around an output or the workspace was written"
    if op.impls[impl].deterministic:
        for name, a, b in zip(op.signature.outputs, *found, strict=True):
            if not same_bits(a, b):
                return f"{name} depends on what its memory or the workspace held before"
    return None
