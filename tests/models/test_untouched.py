"""A patched model and other libraries: what a replacement passes over acts as soon as it is no
longer what it was, in whatever way, at whatever time; and unpatch finds its way back."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from agreement import SPARSE, layers, nothing_slow, prompt, twins
from torch import nn
from torch.nn.utils import parametrize, prune

import transom
from transom.conformance.models import tiny
from transom.errors import NotSupported, SlowPath
from transom.models.untouched import PARTS


def passed_over() -> list[tuple[str, str]]:
    """(family, path) of one module for each part, of each class, that a replacement passes over."""
    found = {}
    for family in SPARSE:
        model = tiny.tiny_model(family)
        transom.patch(model)
        for path, module in model.named_modules():
            for part, *_ in vars(module).get(PARTS, ()):
                found.setdefault((family, type(module).__name__, part), f"{path}.{part}")
    return [(family, path) for (family, *_), path in found.items()]


CASES = passed_over()


class Lora(nn.Module):
    """As peft wraps a linear layer: the layer, its weight passed on, and two small products."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def test_the_parts_are_those_that_the_page_names() -> None:
    assert {path.rpartition(".")[2] for _, path in CASES} == {
        "compressor",
        "indexer",
        "scorer",
        "score_fn",
        "input_norm",
        "kv_b_proj",
        "conv1d",
    }


# transformers itself reads the weight of a convolution without running its hooks.
RUN = [(family, path) for family, path in CASES if not path.endswith(".conv1d")]


@pytest.mark.parametrize("family, path", RUN, ids=lambda v: str(v).rpartition("layers.")[2])
@pytest.mark.parametrize("kind", ["forward", "pre", "all modules"])
@torch.no_grad()
def test_a_hook_on_a_part_that_is_passed_over_is_run(family: str, path: str, kind: str) -> None:
    model, seen = tiny.tiny_model(family), []
    transom.patch(model)
    expected = model(prompt(1, 21)).logits
    part = model.get_submodule(path)
    if kind == "forward":
        handle = part.register_forward_hook(lambda *_: seen.append(1))
    elif kind == "pre":
        handle = part.register_forward_pre_hook(lambda *_: seen.append(1))
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, *_: seen.append(1) if m is part else None
        )
    try:
        with pytest.warns(SlowPath, match="runs Hugging Face's own forward"):
            got = model(prompt(1, 21)).logits
    finally:
        handle.remove()
    assert seen and torch.allclose(got, expected, atol=1e-4)
    with nothing_slow(), transom.record() as calls:  # and afterwards all is as before
        assert torch.equal(model(prompt(1, 21)).logits, expected)
    assert any(c.op in ("sparse_attention", "block_sparse_attention") for c in calls)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_lora_that_comes_after_the_patch_acts_and_learns(family: str) -> None:
    model, ids = tiny.tiny_model(family), prompt(2, 21)
    transom.patch(model)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Lora(layer.self_attn.kv_b_proj)
    with pytest.warns(SlowPath, match="kv_b_proj is a Lora; it was a Linear"):
        got = model(ids, labels=ids)
    got.loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.kv_b_proj.b.weight.grad.abs().max() > 0
    transom.unpatch(model)
    with torch.no_grad():
        want = model(ids).logits
    assert float((got.logits - want).abs().max()) <= 1e-4 * float(want.max() - want.min())


@pytest.mark.filterwarnings("ignore::transom.SlowPath")
@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_a_hook_on_any_one_module_is_run_as_in_the_unpatched_model(family: str) -> None:
    m, ids = twins(family), prompt(1, 21)
    fired: list[str] = []

    def listen(path: str, *_: Any) -> None:
        fired.append(path)

    for path, module in m.plain.named_modules():
        module.register_forward_hook(functools.partial(listen, path))
    m.plain(ids, use_cache=False)
    want = set(fired)
    for path, module in m.patched.named_modules():
        del fired[:]
        handle = module.register_forward_hook(functools.partial(listen, path))
        m.patched(ids, use_cache=False)
        handle.remove()
        assert bool(fired) == (path in want), path


def pruned(part: nn.Linear) -> None:
    prune.random_unstructured(part, "weight", amount=0.5)


def parametrised(part: nn.Linear) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0.5

    parametrize.register_parametrization(part, "weight", Half())


def normed(part: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(part)
    part.parametrizations.weight.original0.data.mul_(3)


@pytest.mark.filterwarnings("ignore::transom.SlowPath")
@pytest.mark.parametrize("change", [pruned, parametrised, normed])
@torch.no_grad()
def test_what_changes_a_weight_from_outside_acts(change: Any) -> None:
    model, ids = tiny.tiny_model("deepseek_v32"), prompt(2, 15)
    transom.patch(model)
    for layer in model.model.layers:
        change(layer.self_attn.kv_b_proj)
    got = model(ids).logits
    transom.unpatch(model)
    assert torch.allclose(got, model(ids).logits, atol=1e-4)


def offload(model: nn.Module) -> None:
    """As accelerate does: a module's own parameters are there while its forward runs, only."""
    for m in model.modules():
        own = {n: p.data for n, p in m.named_parameters(recurse=False)}
        # Of convolutions transformers reads the weight without a forward, and tells accelerate so.
        if not own or isinstance(m, nn.Conv1d):
            continue
        for n in own:
            setattr(m, n, nn.Parameter(own[n].to("meta")))

        def run(*a: Any, _m: Any = m, _own: Any = own, _old: Any = m.forward, **k: Any) -> Any:
            for n in _own:
                setattr(_m, n, nn.Parameter(_own[n]))
            out = _old(*a, **k)
            for n in _own:
                setattr(_m, n, nn.Parameter(_own[n].to("meta")))
            return out

        m.forward = run


@pytest.mark.filterwarnings("ignore::transom.SlowPath")
@pytest.mark.parametrize("family", [*SPARSE, "qwen3_moe"])
@pytest.mark.parametrize("order", [(transom.patch, offload), (offload, transom.patch)])
@torch.no_grad()
def test_offloading_in_either_order_changes_nothing(family: str, order: Any) -> None:
    model, ids = tiny.tiny_model(family), prompt(2, 21)
    want = model(ids).logits
    for step in order:
        step(model)
    assert torch.allclose(model(ids).logits, want, atol=1e-4)


def hook(model: Any) -> None:
    """As accelerate's add_hook_to_module, on every module."""
    for module in model.modules():
        module._old_forward = module.forward
        module.forward = functools.update_wrapper(
            functools.partial(lambda m, *a, **k: m._old_forward(*a, **k), module),
            module._old_forward,
        )


def shard(model: Any) -> None:
    """As fully_shard, which makes instances of a subclass of their class."""
    for layer in layers(model):
        for module in (layer, *(m for n, m in layer.named_children() if n.endswith("attn"))):
            kind = type(module)
            module.__class__ = type(f"FSDP{kind.__name__}", (Sharded, kind), {})


class Sharded:
    pass


@pytest.mark.filterwarnings("ignore::transom.SlowPath")
@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("wrap", [hook, shard])
@torch.no_grad()
def test_unpatch_finds_its_way_back_behind_another_library(family: str, wrap: Any) -> None:
    model, ids = tiny.tiny_model(family), prompt(1, 21)
    want = model(ids).logits
    transom.patch(model)
    wrap(model)
    assert torch.allclose(model(ids).logits, want, atol=1e-4)
    transom.unpatch(model)
    with transom.record() as calls:
        assert torch.equal(model(ids).logits, want)
    assert not calls
    if wrap is shard:
        assert all(isinstance(layer, Sharded) for layer in layers(model))


@torch.no_grad()
def test_the_report_can_be_asked_again() -> None:
    model = tiny.tiny_model("deepseek_v32")
    transom.patch(model)
    attention = model.model.layers[1].self_attn
    attention.kv_b_proj = Lora(attention.kv_b_proj)
    now = {r.path: r.reason for r in transom.patch(model)}
    assert "kv_b_proj is a Lora" in str(now["model.layers.1.self_attn"])
    assert now["model.layers.0.self_attn"] is None


@torch.no_grad()
def test_the_fall_back_can_be_made_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model("deepseek_v4")
    transom.patch(model)
    model.model.layers[1].attn_hc.input_norm.register_forward_hook(lambda *_: None)
    monkeypatch.setenv("TRANSOM_FALLBACK", "error")
    with pytest.raises(NotSupported, match="^patch: input_norm has hooks.*runs Hugging Face's own"):
        model(prompt(1, 9))


# Tracing --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_static_cache_compiles_as_one_graph() -> None:
    from transformers import StaticCache

    model, ids = tiny.tiny_model("deepseek_v32"), prompt(1, 21)
    want = model(ids).logits
    transom.patch(model)
    run = torch.compile(model, fullgraph=True, backend="eager")
    got = run(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32)).logits
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.deep
def test_sixteen_bits_compile_as_one_graph_where_torch_multiplies_them_slowly() -> None:
    code = (
        "import torch, transom\n"
        "from transom.conformance.models import tiny\n"
        "m = tiny.tiny_model('deepseek_v4').bfloat16(); transom.patch(m)\n"
        "with torch.no_grad(): torch.compile(m, fullgraph=True, backend='eager')("
        "torch.tensor([[5, 6, 7]]), use_cache=False)"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# What patch itself does ----------------------------------------------------------------------


@pytest.mark.parametrize("family", [*SPARSE, "gpt_oss"])
@pytest.mark.parametrize(
    "enter, leave",
    [
        (
            lambda: torch.set_default_dtype(torch.bfloat16),
            lambda: torch.set_default_dtype(torch.float32),
        ),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    ],
    ids=["default dtype", "default device"],
)
def test_torchs_defaults_change_nothing(family: str, enter: Any, leave: Any) -> None:
    model = tiny.tiny_model(family)
    want = [(r.path, r.operators) for r in transom.patch(tiny.tiny_model(family))]
    enter()
    try:
        report = transom.patch(model)
    finally:
        leave()
    assert [(r.path, r.operators) for r in report] == want
    with torch.no_grad():
        assert model(prompt(1, 9)).logits.dtype == torch.float32


def test_a_module_of_ones_own_within_a_replaced_layer_is_in_the_report() -> None:
    model = tiny.tiny_model("deepseek_v4")

    class MyAttention(type(model.model.layers[0].self_attn)):  # type: ignore[misc]
        pass

    model.model.layers[2].self_attn.__class__ = MyAttention
    reasons = {r.path: r.reason for r in transom.patch(model)}
    assert "MyAttention" in str(reasons) or "model.layers.2.self_attn" in reasons
    assert "is a subclass of DeepseekV4Attention" in str(reasons["model.layers.2.self_attn"])


def test_sparse_attention_without_a_replacement_is_not_called_dense() -> None:
    class WovenIndexer(nn.Linear):
        pass

    class WovenAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.indexer = WovenIndexer(4, 4)

    (record,) = [r for r in transom.patch(nn.ModuleList([WovenAttention()])) if not r.replaced]
    assert record.reason == "sparse attention of a family that transom has no replacement for yet"


# Gates ---------------------------------------------------------------------------------------


def experts(gate: Any, **more: Any) -> nn.Module:
    """A user's experts class with this gate, in transformers' registry."""
    from transformers import Qwen3MoeConfig
    from transformers.integrations.moe import use_experts_implementation

    config = Qwen3MoeConfig(
        hidden_size=32, num_local_experts=4, moe_intermediate_size=24, num_experts_per_tok=2
    )
    config._experts_implementation = "grouped_mm"

    class Mine(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn, self.clip = 4, nn.SiLU(), 20.0
            self.register_buffer("temperature", torch.ones(()))
            self.gate_up_proj = nn.Parameter(torch.randn(4, 48, 32))
            self.down_proj = nn.Parameter(torch.randn(4, 32, 24))

        def forward(self, hidden: Any, ids: Any, weights: Any) -> Any:
            raise NotImplementedError

        _apply_gate = gate

    module: nn.Module = use_experts_implementation(Mine, **more)(config).eval()
    return module


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = x.chunk(2, -1)
    return gate, up


def clipped(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = halves(x)
    return self.act_fn(gate.clamp(max=self.clip)) * up.clamp(-self.clip, self.clip)


def dropped(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = halves(x)
    return nn.functional.dropout(self.act_fn(gate) * up, 0.3, self.training)


def warm(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = halves(x)
    return self.act_fn(gate * self.temperature) * up


def branching(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = halves(x)
    return self.act_fn(gate) * up if x.abs().max() < 1e4 else gate * up


def simple(self: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = halves(x)
    return self.act_fn(gate) * up


def run(module: nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x, ids = torch.randn(40, 32, generator=g) * 3, torch.randint(0, 4, (40, 2), generator=g)
    with torch.no_grad():
        torch.manual_seed(2)
        y: torch.Tensor = module(x, ids, torch.rand(40, 2, generator=g))
    return y


def test_a_bound_is_found_whatever_its_name() -> None:
    module = experts(clipped)
    (record,) = transom.patch(module)
    assert record.operators == "moe_experts (silu, limit 20)"
    got = run(module)
    transom.unpatch(module)
    torch.testing.assert_close(got, run(module), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "gate, reason",
    [
        (dropped, "draws at random"),
        (warm, "reads a tensor beside its input|reads temperature"),
        (branching, "branches on the numbers"),
    ],
)
def test_a_gate_that_is_more_than_plain_numbers_is_left_alone(gate: Any, reason: str) -> None:
    module = experts(gate)
    (record,) = transom.patch(module)
    assert record.reason is not None
    assert any(part in record.reason for part in reason.split("|")), record.reason


def other_act(module: Any) -> None:
    module.act_fn = nn.GELU()


def hooked_act(module: Any) -> None:
    module.act_fn.register_forward_hook(lambda m, i, o: o * 2)


def other_bound(module: Any) -> None:
    module.clip = 0.5


def other_gate(module: Any) -> None:
    module._apply_gate = lambda x: halves(x)[0]


@pytest.mark.parametrize("change", [other_act, hooked_act, other_bound, other_gate])
def test_a_gate_that_is_changed_after_the_patch_acts(change: Any) -> None:
    module = experts(clipped)
    transom.patch(module)
    change(module)
    with pytest.warns(SlowPath, match="runs Hugging Face's own forward"):
        got = run(module)
    (record,) = transom.patch(module)
    assert record.reason is not None
    transom.unpatch(module)
    assert torch.equal(got, run(module))


def test_a_class_with_a_registry_of_its_own_runs() -> None:
    from transformers.integrations.moe import ExpertsInterface

    class Own(ExpertsInterface):
        _global_mapping = dict(ExpertsInterface._global_mapping)

    Own._global_mapping.pop("transom", None)
    module = experts(simple, experts_interface=Own())
    want = run(module)
    transom.patch(module)
    with transom.record() as calls:
        torch.testing.assert_close(run(module), want, rtol=1e-4, atol=1e-3)
    assert [c.op for c in calls] == ["moe_experts"]
