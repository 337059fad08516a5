"""What these kernels do not take on Ascend: found by `transom verify --target ascend`.

A requirement here holds for device type npu alone; elsewhere the same kernels take the call.
"""

from __future__ import annotations

from transom.facts import Facts
from transom.requires import Requirement, condition

DEVICES = ("npu",)


def on_ascend(requirement: Requirement) -> Requirement:
    """The requirement, asked of calls on an Ascend device only."""

    def test(f: Facts) -> str | None:
        return requirement(f) if f.device in DEVICES else None

    reads = ("device", *requirement.reads)
    return condition(f"on Ascend: {requirement.text}", reads, test)


def _some(argument: str) -> Requirement:
    def test(f: Facts) -> str | None:
        none = f.arguments[argument] == 0
        return f"{argument} = 0; supported by Ascend's compiler: 1 or more" if none else None

    return condition(f"{argument} > 0", (argument,), test)


def _several(name: str) -> Requirement:
    """Of a dim or an argument."""

    def test(f: Facts) -> str | None:
        one = f.arguments.get(name, f.dims.get(name)) == 1
        return f"{name} = 1; supported by Ascend's compiler: 2 or more" if one else None

    return condition(f"{name} > 1", (name,), test)


FAILS = "Ascend's compiler fails at the kernel for it"
LARGE = "a tile of the kernel is larger than its unified buffer"


def _elsewhere(*archs: str, why: str = FAILS) -> Requirement:
    def test(f: Facts) -> str | None:
        return f"architecture is {f.arch!r}; {why}" if f.arch.startswith(archs) else None

    return condition(f"architecture not {', '.join(archs)}", ("arch",), test)


REFUSED: dict[str, tuple[Requirement, ...]] = {
    # "strides must not be zero", of a row of biases that all rows share
    "compress_kv": (on_ascend(_several("m")),),
    "compress_kv_backward": (on_ascend(_several("m")),),
    # the same, of blocks of one column
    "quantize_int4": (on_ascend(_several("group")),),
    "quantize_int8": (on_ascend(_several("K")), on_ascend(_several("group"))),
    # the same, of an output without elements
    "sparse_attention": (on_ascend(_some("v_dim")),),
    # decoded, the least tile of 16 rows takes 448 KiB of the 910's 192
    "sparse_attention_rows": (
        on_ascend(_some("v_dim")),
        on_ascend(_elsewhere("ascend910", why=LARGE)),
    ),
    # the compiler ends in an assertion (950), or refuses a copy from L1 to L0C (910)
    "sparse_attention_backward": (on_ascend(_elsewhere("ascend950")),),
    "block_sparse_attention_backward": (on_ascend(_elsewhere("ascend910", "ascend950")),),
}
"""By operator."""
