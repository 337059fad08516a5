"""A tiny DeepSeek-V4 on the CPU and on the simulated device: tokens, three steps of training, what
ran where. Prints JSON; test_sim.py runs it."""

from __future__ import annotations

import copy
import json

import torch

import transom
from transom.conformance.models import tiny

IDS = torch.randint(2, 97, (2, 19), generator=torch.Generator().manual_seed(1))


def train(model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    """The losses of three steps."""
    # A large eps: where gradients are all rounding, Adam would take full steps on their signs.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    losses = []
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    host = tiny.tiny_model("deepseek_v4")
    here = copy.deepcopy(host).to("sim")
    transom.patch(host)
    transom.patch(here)
    tokens = host.generate(IDS, max_new_tokens=8, do_sample=False)
    with transom.record() as generated:
        got = here.generate(IDS.to("sim"), max_new_tokens=8, do_sample=False)
    losses = [train(host, IDS)]
    with transom.record() as trained:
        losses.append(train(here, IDS.to("sim")))
    q = torch.randn(1, 2, 4, 8, device="sim")
    explained = {
        "sparse_attention": str(
            transom.explain("sparse_attention", q, q[:, :, 0], scale=1.0, v_dim=8)
        ),
        "sinkhorn": str(
            transom.explain("sinkhorn", torch.zeros(2, 4, 4, device="sim"), iterations=3, eps=1e-6)
        ),
    }
    worst = {
        name: float((a.detach() - b.detach().cpu()).abs().max())
        for (name, a), b in zip(host.named_parameters(), here.parameters(), strict=True)
    }
    print(
        json.dumps(
            {
                "tokens": tokens.tolist(),
                "got": got.cpu().tolist(),
                "losses": losses,
                "device": str(got.device),
                "worst": max(worst.items(), key=lambda item: item[1]),
                "generated": sorted({(c.op, c.impl) for c in generated}),
                "trained": sorted({(c.op, c.impl) for c in trained}),
                "fallbacks": torch.sim.fallbacks(),
                "explained": explained,
                "counters": torch.sim.counters(),
            }
        )
    )


if __name__ == "__main__":
    main()
