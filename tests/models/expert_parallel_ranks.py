"""Run by test_expert_parallel on two ranks: patched models whose experts are spread over both."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.expert_parallel import apply_expert_parallelism

import transom
from transom.conformance.models import tiny

CASES = (("gpt_oss", "all_reduce"), ("qwen3_moe", "all_to_all"), ("deepseek_v4", "auto"))


def spread(model: torch.nn.Module, implementation: str) -> None:
    """Gives each rank its half of the experts, as transformers' expert-parallel plan does."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    plan: dict[str, str] = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            weights = (name for name, _ in module.named_parameters())
            plan |= {f"{path}.{name}": "grouped_gemm" for name in weights}
            plan[path] = "ep_dispatch_experts"
    apply_expert_parallelism(model, mesh, mesh, plan, implementation)


@torch.no_grad()
def main() -> None:
    """Fails on a rank whose logits differ from those of the whole model."""
    dist.init_process_group("gloo")
    ids = torch.randint(2, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    for family, implementation in CASES:
        expected = tiny.tiny_model(family)(ids).logits
        model = tiny.tiny_model(family)
        spread(model, implementation)
        transom.patch(model)
        with transom.record() as calls:
            logits = model(ids).logits
        assert any(c.op == "moe_experts" for c in calls), family
        share = float((logits - expected).abs().max() / (expected.max() - expected.min()))
        assert share <= 1e-4, f"{family}, {implementation}: {share:.2e}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
