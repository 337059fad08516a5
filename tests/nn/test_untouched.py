"""A layer of transom.nn whose parts another library has changed: what it put there acts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import transom.nn as tn
from transom.errors import SlowPath

FORMS = ("window", "hca", "csa", "dsa")
pytestmark = pytest.mark.filterwarnings("ignore::transom.SlowPath")


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def layer(form: str) -> Any:
    torch.manual_seed(0)
    rotary = tn.Rotary(16, 1e4, "interleaved", "last")
    shared = tn.SharedShape(
        hidden=64, heads=4, head_dim=32, q_rank=32, out_groups=2, out_rank=32, window=8, eps=1e-6
    )
    latent = tn.LatentShape(
        hidden=64, heads=4, q_rank=32, kv_rank=32, nope=16, rope=16, value=16, eps=1e-6
    )
    index = tn.IndexShape(16, 32, 8)
    if form == "dsa":
        turn = tn.Rotary(16, 1e4, "half", "first")
        return tn.SparseAttention.dsa(latent, rotary, index=index, index_rotary=turn)
    if form == "csa":
        return tn.SparseAttention.csa(shared, rotary, ratio=4, index=index)
    more = {"ratio": 8} if form == "hca" else {}
    return getattr(tn.SparseAttention, form)(shared, rotary, **more)


def linears(form: str) -> list[str]:
    return [n for n, m in layer(form).named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("form, name", [(f, n) for f in FORMS for n in linears(f)])
def test_lora_acts_and_learns_on_every_linear_layer(form: str, name: str) -> None:
    made, x = layer(form), torch.randn(2, 29, 64)
    wrapped = Lora(made.get_submodule(name))
    made.set_submodule(name, wrapped)
    result = made(x, with_index_loss="index" in name)
    loss = result.output.square().sum()
    if result.index_loss is not None:
        loss = loss + result.index_loss.sum()
    loss.backward()
    assert wrapped.b.weight.grad.abs().max() > 0
    merged = layer(form)  # the same weights, with the two products added to the one
    merged.load_state_dict(
        {
            k.replace(".base_layer", ""): v
            for k, v in made.state_dict().items()
            if ".a." not in k and ".b." not in k
        }
    )
    with torch.no_grad():
        merged.get_submodule(name).weight += wrapped.b.weight @ wrapped.a.weight
    torch.testing.assert_close(result.output, merged(x).output, rtol=2e-4, atol=2e-5)


def test_the_loss_of_the_indexer_is_the_same_with_expanded_heads() -> None:
    made, x = layer("dsa"), torch.randn(2, 29, 64)
    want = made(x, with_index_loss=True)
    made.wkv_b.register_forward_hook(lambda *_: None)
    with pytest.warns(SlowPath, match="wkv_b is no plain nn.Linear"):
        got = made(x, with_index_loss=True)
    torch.testing.assert_close(got.output, want.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.index_loss, want.index_loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_parametrised_weight_acts(form: str) -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    made, x = layer(form), torch.randn(1, 21, 64)
    other = layer(form)
    for name in linears(form):
        parametrize.register_parametrization(made.get_submodule(name), "weight", Twice())
        with torch.no_grad():
            other.get_submodule(name).weight.mul_(2)
    torch.testing.assert_close(made(x).output, other(x).output, rtol=1e-4, atol=1e-4)
