"""patch and unpatch: nothing left behind, nobody else touched, and reasons for what stays."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from agreement import EXPERTS_ONLY, LINEAR, SPARSE, greedy, nothing_slow, pieces, prompt, twins
from torch import nn

import transom
from transom.conformance.models import tiny
from transom.errors import NotSupported, SlowPath
from transom.models.experts import find_gate

FAMILIES = [*SPARSE, *LINEAR, *EXPERTS_ONLY]


def state(model: nn.Module) -> dict[str, tuple[type, dict[str, Any], Any]]:
    """What could be left behind: classes, attributes, hooks and settings of every module."""
    found = {}
    for path, module in model.named_modules():
        attributes = {
            k: v for k, v in vars(module).items() if not k.startswith("_forward_pre_hooks")
        }
        hooks = (
            list(module._forward_pre_hooks.items()),
            list(module._forward_pre_hooks_with_kwargs.items()),
        )
        settings = vars(module.config).copy() if hasattr(module, "config") else None
        found[path] = (type(module), attributes, (hooks, settings))
    return found


def same(one: Any, other: Any) -> bool:
    return (
        one is other
        or type(one) is type(other)
        and (isinstance(one, torch.Tensor) or bool(one == other))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_every_attribute(family: str) -> None:
    model = tiny.tiny_model(family)
    before = state(model)
    transom.patch(model)
    with torch.no_grad():
        model(prompt(1, 9))
    transom.unpatch(model)
    after = state(model)
    assert before.keys() == after.keys()
    for path, (kind, attributes, rest) in before.items():
        assert after[path][0] is kind, path
        assert after[path][1].keys() == attributes.keys(), path
        for name, value in attributes.items():
            now = after[path][1][name]
            assert value is now or same(value, now), f"{path}.{name}"
        assert after[path][2] == rest, path


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_unpatched_model_calls_no_operator_and_gives_the_same_bits(family: str) -> None:
    model = tiny.tiny_model(family)
    expected = model(prompt(2, 11)).logits
    transom.patch(model)
    transom.unpatch(model)
    with transom.record() as calls:
        assert torch.equal(model(prompt(2, 11)).logits, expected)
    assert not calls


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_patching_twice_changes_nothing(family: str) -> None:
    model = tiny.tiny_model(family)
    first = transom.patch(model)
    expected, before = model(prompt(1, 10)).logits, state(model)
    second = transom.patch(model)
    assert str(first) == str(second)
    after = state(model)
    assert {p: s[0] for p, s in before.items()} == {p: s[0] for p, s in after.items()}
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == (1 if family in SPARSE else 0)
    assert torch.equal(model(prompt(1, 10)).logits, expected)
    transom.unpatch(model)
    with transom.record() as calls:
        model(prompt(1, 10))
    assert not calls


def test_unpatching_what_was_not_patched_changes_nothing() -> None:
    model = tiny.tiny_model("deepseek_v4")
    before = state(model)
    transom.unpatch(model)
    assert {p: (s[0], s[1].keys()) for p, s in state(model).items()} == {
        p: (s[0], s[1].keys()) for p, s in before.items()
    }


@pytest.mark.parametrize("family", ["deepseek_v4", "qwen3_moe"])
@torch.no_grad()
def test_a_model_that_shares_the_configuration_is_not_touched(family: str) -> None:
    one = tiny.tiny_model(family)
    other = type(one)(one.config).eval()
    assert other.config is one.config
    transom.patch(one)
    with transom.record() as calls:
        other(prompt(1, 9))
    assert not calls
    assert one.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_copies_and_pickles_stay_patched_and_can_be_unpatched(family: str) -> None:
    model = tiny.tiny_model(family)
    ids = prompt(1, 9)
    expected = model(ids).logits
    transom.patch(model)
    stream = io.BytesIO()
    pickle.dump(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), pickle.load(stream)):
        with transom.record() as calls:
            patched = twin(ids).logits
        assert any(c.op == "moe_experts" for c in calls)
        assert torch.allclose(patched, expected, atol=1e-4)
        transom.unpatch(twin)
        with transom.record() as calls:
            assert torch.equal(twin(ids).logits, expected)
        assert not calls
    with transom.record() as calls:  # the model that was copied is still patched
        model(ids)
    assert calls


def test_a_pickle_runs_patched_in_a_new_process(tmp_path: Any) -> None:
    model = tiny.tiny_model("qwen3_moe")
    transom.patch(model)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch; model = pickle.load(open(sys.argv[1], 'rb')); import transom\n"
        "with transom.record() as calls: model(torch.tensor([[5, 6, 7]]))\n"
        "print(len(calls))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "2"


@torch.no_grad()
def test_saved_checkpoints_do_not_know_of_the_patch(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.tiny_model("deepseek_v4")
    expected = model(prompt(1, 9)).logits
    transom.patch(model)
    model.save_pretrained(tmp_path)
    assert "transom" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(again(prompt(1, 9)).logits, expected)


def test_the_report_names_every_module_and_prints() -> None:
    model = tiny.tiny_model("deepseek_v4")
    report = transom.patch(model)
    assert len(report) == len(list(report)) == len(report.replaced) == 25
    assert not report.left_alone
    by_path = {r.path: r for r in report}
    assert by_path["model.layers.1.self_attn"].operators == (
        "sparse_attention over a window of 6 and 3 entries of 4 tokens (CSA), "
        "compress_kv, lightning_indexer"
    )
    assert by_path["model.layers.0.mlp.gate"].operators == "route (ids from the table)"
    text = str(report)
    assert text.startswith("DeepseekV4ForCausalLM: 25 modules replaced, 0 left alone")
    assert "moe_experts (silu, limit 1.5)" in text and "(4x)" in text


def test_the_report_says_what_was_left_alone_and_why() -> None:
    report = transom.patch(tiny.tiny_model("gpt_oss"))
    reasons = {r.module: r.reason for r in report.left_alone}
    assert "dense attention" in reasons["GptOssAttention"]
    assert "GptOssTopKRouter" in reasons
    assert [r.module for r in report.replaced] == ["GptOssExperts"] * 2


def test_a_model_without_anything_to_replace() -> None:
    report = transom.patch(nn.Sequential(nn.Linear(2, 2)))
    assert len(report) == 0 and str(report) == "Sequential: 0 modules replaced, 0 left alone"


def test_only_modules_can_be_patched() -> None:
    with pytest.raises(TypeError, match=r"^patch: model is a dict; expected a torch.nn.Module$"):
        transom.patch({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^unpatch: model is a list; expected a torch.nn.Module$"):
        transom.unpatch([])  # type: ignore[arg-type]


# What stays as it was.


def reason_of(model: nn.Module, path: str) -> str:
    reason = {r.path: r.reason for r in transom.patch(model)}[path]
    assert reason is not None
    return reason


def test_experts_with_an_unknown_activation_stay() -> None:
    model = tiny.tiny_model("qwen3_moe", hidden_act="quick_gelu")
    assert "its gate (act_fn QuickGELUActivation)" in reason_of(model, "model.layers.0.mlp.experts")
    with transom.record() as calls:
        model(prompt(1, 5))
    assert not calls


def test_a_gate_with_a_huge_limit_is_still_told_from_others() -> None:
    experts = (
        tiny.tiny_model("deepseek_v4", swiglu_limit=1e6, hidden_act="gelu")
        .model.layers[0]
        .mlp.experts
    )
    gate = find_gate(experts).gate
    assert (gate.activation, gate.limit) == ("gelu", 1e6)


def test_experts_whose_gate_fails_stay() -> None:
    model = tiny.tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts._apply_gate = lambda x: x.no_such_method()
    assert "can't be tried" in reason_of(model, "model.layers.0.mlp.experts")


def test_experts_in_a_quantised_layout_stay() -> None:
    model = tiny.tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert "float8_e4m3fn" in reason_of(model, "model.layers.1.mlp.experts")


@torch.no_grad()
def test_an_instance_whose_forward_was_replaced_stays() -> None:
    m = twins("deepseek_v4")
    transom.unpatch(m.patched)
    attention = m.patched.model.layers[2].self_attn
    attention.forward = attention.forward
    assert "forward was already replaced" in reason_of(m.patched, "model.layers.2.self_attn")
    ids = prompt(2, 21)
    with nothing_slow(), transom.record() as calls:
        m.agree(m.plain(ids).logits, m.patched(ids).logits)
    assert sum(c.op == "sparse_attention" for c in calls) == 3
    m.agree(pieces(m.plain, ids, [9, 1, 11]), pieces(m.patched, ids, [9, 1, 11]))


@torch.no_grad()
def test_a_wrapped_up_projection_keeps_the_layers_of_glm_together() -> None:
    class Wrapped(nn.Linear):
        pass

    m = twins("glm_moe_dsa")
    transom.unpatch(m.patched)
    m.patched.model.layers[1].self_attn.kv_b_proj.__class__ = Wrapped
    report = {r.path: r.reason for r in transom.patch(m.patched)}
    assert "kv_b_proj is a Wrapped" in report["model.layers.1.self_attn"]
    assert "model.layers.1.self_attn is left alone" in report["model.layers.0.self_attn"]
    ids = prompt(2, 21)
    with nothing_slow():
        m.agree(m.plain(ids).logits, m.patched(ids).logits)


@torch.no_grad()
def test_a_wrapped_up_projection_of_v32_leaves_the_other_layers_sparse() -> None:
    class Wrapped(nn.Linear):
        pass

    m = twins("deepseek_v32")
    transom.unpatch(m.patched)
    m.patched.model.layers[1].self_attn.kv_b_proj.__class__ = Wrapped
    transom.patch(m.patched)
    ids, mask = prompt(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[1, 14:] = 0
    with nothing_slow(), transom.record() as calls:
        out = m.patched(ids, attention_mask=mask).logits
    m.agree(m.plain(ids, attention_mask=mask).logits, out, mask.bool())
    assert sum(c.op == "sparse_attention" for c in calls) == 2


def test_attention_without_its_model_stays() -> None:
    layer = tiny.tiny_model("deepseek_v4").model.layers[1]
    assert "stands outside a DeepseekV4Model" in reason_of(layer, "self_attn")


def test_another_release_of_transformers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    report = transom.patch(tiny.tiny_model("deepseek_v4"))
    assert {r.module for r in report.replaced} == {"DeepseekV4Experts"}
    assert all("transformers is 5.99.0" in str(r.reason) for r in report.left_alone)


# What a call may meet that is not covered: the original attention runs, and says so.


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_output_attentions_comes_from_the_original(family: str) -> None:
    m = twins(family, attn_implementation="eager")
    ids = prompt(2, 12)
    with pytest.warns(SlowPath, match="output_attentions is on"):
        patched = m.patched(ids, output_attentions=True)
    plain = m.plain(ids, output_attentions=True)
    # Hugging Face's own of these two return none.
    assert len(patched.attentions) == len(plain.attentions)
    assert family in ("mistral_large4", "glm5_next") or plain.attentions
    assert all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.attentions, patched.attentions)
    )
    m.agree(plain.logits, patched.logits)


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_a_mask_of_four_dims_goes_to_the_original(family: str) -> None:
    m = twins(family, attn_implementation="eager")
    ids = prompt(2, 10)
    mask = torch.full((10, 10), torch.finfo(torch.float32).min).triu(1)
    mask[7:, 5] = torch.finfo(torch.float32).min
    mask = mask.expand(2, 1, 10, 10).contiguous()
    with pytest.warns(SlowPath, match="attention_mask has 4 dims"):
        patched = m.patched(ids, attention_mask=mask).logits
    m.agree(m.plain(ids, attention_mask=mask).logits, patched)


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_packed_sequences_go_to_the_original(family: str) -> None:
    m = twins(family)
    ids, positions = prompt(1, 14), torch.cat([torch.arange(9), torch.arange(5)])[None]
    with pytest.warns(SlowPath, match="packed sequences"):
        patched = m.patched(ids, position_ids=positions, use_cache=False).logits
    m.agree(m.plain(ids, position_ids=positions, use_cache=False).logits, patched)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
@torch.no_grad()
def test_a_static_cache_goes_to_the_original(family: str) -> None:
    from transformers import StaticCache

    m = twins(family)
    ids = prompt(1, 9)
    logits = []
    for model in (m.plain, m.patched):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            logits.append(
                model(
                    ids, past_key_values=StaticCache(config=model.config, max_cache_len=16)
                ).logits
            )
    assert any("the cache is a StaticCache" in str(w.message) for w in seen)
    m.agree(*logits)


def test_dropout_in_training_goes_to_the_original() -> None:
    m = twins("deepseek_v4", attention_dropout=0.1)
    with nothing_slow(), torch.no_grad():
        m.agree(m.plain(prompt(1, 9)).logits, m.patched(prompt(1, 9)).logits)
    m.patched.train()
    with pytest.warns(SlowPath, match="attention_dropout is 0.1 in training"):
        m.patched(prompt(1, 9))


@torch.no_grad()
def test_a_layer_called_by_itself_goes_to_the_original() -> None:
    m = twins("deepseek_v4")
    with pytest.warns(SlowPath, match="called outside the forward of the model"):
        x = torch.randn(1, 5, 4, 32)
        positions = torch.arange(5)[None]
        rope = {
            k: m.plain.model.rotary_emb(x, positions, layer_type=k) for k in ("main", "compress")
        }
        more = {"position_embeddings": rope, "position_ids": positions, "attention_mask": None}
        got = m.patched.model.layers[2](x, **more)
    assert torch.allclose(got, m.plain.model.layers[2](x, **more), atol=1e-4)


def test_fallbacks_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    m = twins("deepseek_v4")
    monkeypatch.setenv("TRANSOM_FALLBACK", "error")
    with pytest.raises(
        NotSupported, match="output_attentions is on; .*DeepseekV4Attention runs Hugging Face's own"
    ):
        m.patched(prompt(1, 5), output_attentions=True)
    monkeypatch.setenv("TRANSOM_FALLBACK", "quiet")
    with nothing_slow():
        m.patched(prompt(1, 5), output_attentions=True)


@torch.no_grad()
def test_hidden_states_are_still_recorded() -> None:
    m = twins("deepseek_v4")
    ids = prompt(1, 9)
    plain, patched = (model(ids, output_hidden_states=True) for model in (m.plain, m.patched))
    assert len(plain.hidden_states) == len(patched.hidden_states) == 5
    assert all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.hidden_states, patched.hidden_states)
    )


# Really sparse.


@pytest.mark.parametrize(
    "family", ["deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note", "hy_v4", "mistral_large4"]
)
@torch.no_grad()
def test_dsa_reads_only_the_selected_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention gets 7 indices a query, and rows that no query selected may hold anything."""
    m = twins(family)
    ids, seen = prompt(1, 30), []
    operator = transom.sparse_attention

    def spoiled(
        q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor | None, **more: Any
    ) -> torch.Tensor:
        if indices is None:  # a window, or all
            return operator(q, kv, indices, **more)
        seen.append(indices)
        used = torch.zeros(kv.shape[1], dtype=torch.bool)
        used[indices[indices >= 0].long()] = True
        return operator(q, torch.where(used[:, None], kv, torch.nan), indices, **more)

    expected = pieces(m.plain, ids, [1] * 30)
    monkeypatch.setattr(transom, "sparse_attention", spoiled, raising=False)
    m.agree(expected, pieces(m.patched, ids, [1] * 30))
    assert max(i.shape[2] for i in seen) == 7
    layers_each = len(seen) // 30
    for position, indices in enumerate(seen[::layers_each]):
        assert int((indices >= 0).sum()) == min(position + 1, 7)


@torch.no_grad()
def test_csa_attends_to_its_top_entries_and_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    m = twins("deepseek_v4")
    seen: list[tuple[int, int, int]] = []
    operator = transom.sparse_attention

    def watched(q: torch.Tensor, kv: torch.Tensor, indices: Any, **more: Any) -> torch.Tensor:
        seen.append(
            (kv.shape[1], -1 if indices is None else indices.shape[2], more["local_kv"].shape[1])
        )
        return operator(q, kv, indices, **more)

    monkeypatch.setattr(transom, "sparse_attention", watched, raising=False)
    greedy(m.patched, prompt(1, 40), 2)
    prefill, decode = seen[:4], seen[4:]
    assert prefill == [(0, -1, 40), (10, 3, 40), (5, -1, 40), (10, 3, 40)]
    assert decode == [(0, -1, 6), (10, 3, 6), (5, -1, 6), (10, 3, 6)]


def test_no_dense_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the square of the prompt: no mask function is called."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4
    from transformers.models.deepseek_v32 import modeling_deepseek_v32

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(modeling_deepseek_v4, "create_sliding_window_causal_mask", forbidden)
    monkeypatch.setattr(modeling_deepseek_v32, "create_causal_mask", forbidden)
    for family in ("deepseek_v4", "deepseek_v32"):
        m = twins(family)
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, 6:] = 0
        with torch.no_grad():
            m.patched(prompt(2, 9), attention_mask=mask)
            greedy(m.patched, prompt(2, 9), 3, attention_mask=mask)
