"""AMD's zentorch: its fused experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cases import PLAIN, Case
from ..measure import Candidate

Values = Mapping[str, Any]


def probe() -> str | None:
    """It must load beside this torch."""
    try:
        import zentorch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"zentorch cannot be imported: {' '.join(str(error).split())[:200]}"
    if not hasattr(torch.ops.zentorch, "zentorch_fused_moe"):
        return "this zentorch has no zentorch_fused_moe"
    return None


def candidates(case: Case, values: Values) -> list[Candidate]:
    """Experts without biases. It packs an expert when it first meets it, and keeps that copy."""
    if case.op != "moe_experts" or case.format != PLAIN or case.dtype not in ("f32", "bf16"):
        return []
    plain = values["activation"] == "silu" and not values["interleaved"]
    if not plain or values["gate_up_bias"] is not None:
        return []
    held = float(values["gate_up"].nbytes + values["down"].nbytes)
    return [Candidate("zentorch fused_moe", "zentorch", _prepare, "packs experts when met", held)]


def _prepare(v: Values) -> Any:
    torch.ops.zentorch.zentorch_flush_moe_weight_cache()
    experts, (_, K) = v["gate_up"].shape[0], v["ids"].shape
    # every expert once, so that packing falls into no timed call
    for start in range(0, experts, K):
        ids = (torch.arange(start, start + K) % experts)[None]
        _experts({**v, "x": v["x"][:1], "ids": ids, "weights": v["weights"][:1]})
    return _experts


def _experts(v: Values) -> Tensor:
    y = torch.empty_like(v["x"])
    torch.ops.zentorch.zentorch_fused_moe(
        y,
        v["x"],
        v["gate_up"],
        v["down"],
        None,
        None,
        v["weights"],
        v["ids"].to(torch.int32),
        False,
        "silu",
    )
    return y
