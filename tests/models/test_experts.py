"""Every experts class of transformers: through the registry, or left alone with a reason."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import transom
from transom.models.experts import patch_experts, unpatch_experts

EXPERTS, TOKENS, SLOTS, HIDDEN, INNER = 4, 7, 2, 16, 24


def experts_classes() -> list[tuple[str, str]]:
    """(module, class) of everything that uses the experts registry."""
    root = Path(transformers.__path__[0]) / "models"
    pattern = re.compile(r"@use_experts_implementation[^\n]*\nclass (\w+)")
    return [
        (f"transformers.models.{file.parent.name}.{file.stem}", name)
        for file in sorted(root.glob("*/modeling_*.py"))
        for name in pattern.findall(file.read_text())
    ]


class Settings(SimpleNamespace):
    """A configuration that answers to every family's names for the same sizes."""

    _experts_implementation = property(lambda self: self._experts_implementation_internal)

    def __init__(self, **changes: Any) -> None:
        sizes = dict.fromkeys(
            ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
        )
        inner = (
            "intermediate_size",
            "moe_intermediate_size",
            "expert_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_ffn_hidden_size",
            "ffn_hidden_size",
        )
        sizes |= dict.fromkeys(inner, INNER) | {"hidden_size": HIDDEN}
        names = ("hidden_act", "hidden_activation", "mlp_hidden_act", "act_fn", "activation")
        values = dict.fromkeys(names, "silu") | {
            "swiglu_limit": 1.5,
            "swiglu_alpha": 1.3,
            "moe_latent_size": None,
            "rms_norm_eps": 1e-6,
            "post_norm_eps": 1e-6,
            "moe_hidden_size": HIDDEN,
            "mlp_gate_softcap": 2.0,
            "mlp_up_softcap": 2.0,
            "_experts_implementation_internal": "eager",
        }
        super().__init__(**{**sizes, **values, **changes})


def make(module: str, name: str, **changes: Any) -> nn.Module:
    """An experts module with random weights."""
    cls = getattr(importlib.import_module(module), name)
    try:
        experts = cls(Settings(**changes))
    except (TypeError, AttributeError) as error:
        pytest.skip(f"needs more of a configuration: {error}")
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.4)
    return experts


def tokens(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=source)[:SLOTS] for _ in range(TOKENS)])
    x = torch.randn(TOKENS, HIDDEN, generator=source)
    return x, ids, torch.rand(TOKENS, SLOTS, generator=source)


@pytest.mark.parametrize("module, name", experts_classes(), ids=[n for _, n in experts_classes()])
@torch.no_grad()
def test_every_experts_class(module: str, name: str) -> None:
    experts = make(module, name)
    x, ids, weights = tokens()
    expected = experts(x, ids, weights)
    outcome = patch_experts(experts)
    assert outcome is not None
    if outcome[1] is not None:
        assert "; " in outcome[1] or " is none of " in outcome[1]
        assert torch.equal(experts(x, ids, weights), expected)
        return
    with transom.record() as calls:
        got = experts(x, ids, weights)
    assert [c.op for c in calls] == ["moe_experts"]
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    unpatch_experts(experts)
    assert torch.equal(experts(x, ids, weights), expected)


MIXTRAL = ("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")
GPT_OSS = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")
NEMOTRON = ("transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHExperts")


@torch.no_grad()
def test_ids_of_other_ranks_are_no_experts() -> None:
    """Expert parallelism marks them with the number of experts; their weights may be anything."""
    experts = make(*MIXTRAL)
    x, ids, weights = tokens()
    ids[2], ids[4, 0] = EXPERTS, EXPERTS
    expected = experts(x, ids, weights)
    patch_experts(experts)
    experts._is_expert_parallel = True
    weights[2], weights[4, 0] = torch.nan, torch.inf
    got = experts(x, ids, weights)
    assert torch.allclose(got, expected, atol=1e-5)
    assert bool((got[2] == 0).all())


@torch.no_grad()
def test_no_tokens() -> None:
    experts = make(*GPT_OSS)
    patch_experts(experts)
    x, ids, weights = tokens()
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


def test_transposed_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make(*GPT_OSS)
    patch_experts(experts)
    seen: list[Tensor] = []
    operator = transom.moe_experts

    def watched(x: Tensor, ids: Tensor, w: Tensor, gate_up: Tensor, down: Tensor, **k: Any) -> Any:
        seen.extend((gate_up, down))
        return operator(x, ids, w, gate_up, down, **k)

    monkeypatch.setattr(transom, "moe_experts", watched, raising=False)
    experts(*tokens())
    assert [t.data_ptr() for t in seen] == [
        experts.gate_up_proj.data_ptr(),
        experts.down_proj.data_ptr(),
    ]


@pytest.mark.parametrize("module, name", [MIXTRAL, GPT_OSS], ids=["plain", "transposed, biases"])
def test_gradients_of_weights_biases_tokens_and_routing(module: str, name: str) -> None:
    grads = []
    for patched in (False, True):
        experts = make(module, name)
        if patched:
            patch_experts(experts)
        x, ids, weights = tokens()
        x.requires_grad_(), weights.requires_grad_()
        (experts(x, ids, weights) * torch.linspace(-1, 1, HIDDEN)).sum().backward()
        grads.append([x.grad, weights.grad, *(p.grad for p in experts.parameters())])
    for expected, got in zip(*grads, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_experts_without_a_gate_stay() -> None:
    outcome = patch_experts(make(*NEMOTRON, mlp_hidden_act="relu2"))
    assert outcome == (
        None,
        "experts without a gate (has_gate=False); moe_experts computes act(gate) * up",
    )


def test_other_modules_are_no_experts() -> None:
    assert patch_experts(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    "act, found", [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu")]
)
def test_activations_are_found_by_trying_them(act: str, found: str) -> None:
    experts = make(*MIXTRAL, hidden_act=act)
    assert patch_experts(experts) == (f"moe_experts ({found})", None)
