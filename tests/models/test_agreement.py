"""Patched and unpatched models agree: prompts, decode, chunks, padding, beams, `generate`."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from agreement import (
    EXPERTS_ONLY,
    LINEAR,
    MANY,
    SPARSE,
    Twins,
    greedy,
    new_cache,
    nothing_slow,
    pieces,
    prompt,
    twins,
)

import transom
from transom.errors import SlowPath

# Window 6, CSA blocks of 4, HCA blocks of 8, top 3 of the CSA entries; 7 selected tokens in DSA.
LENGTHS = range(1, 49) if MANY else [*range(1, 18), 23, 24, 25, 31, 32, 33]
FAMILIES = [*SPARSE, *LINEAR, *EXPERTS_ONLY]

pair = functools.cache(twins)


def maybe_slow(models: Twins, hole: bool = True) -> contextlib.AbstractContextManager[object]:
    """Of a call with a hole in its mask: glm5_next counts such pools in a way of its own, so that
    Hugging Face's attention runs there."""
    if hole and models.family == "glm5_next":
        return pytest.warns(SlowPath, match="the tokens of a row are not one run")
    return nothing_slow()


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest) -> Twins:
    return pair(request.param)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_a_prompt_of_any_length_and_the_tokens_after_it(family: str, length: int) -> None:
    m = pair(family)
    ids = prompt(2, length + 7, seed=length)
    with nothing_slow():
        m.agree(m.plain(ids[:, :length]).logits, m.patched(ids[:, :length]).logits)
        steps = [length, *[1] * 7]
        m.agree(pieces(m.plain, ids, steps), pieces(m.patched, ids, steps))


@torch.no_grad()
def test_prefill_without_a_cache_is_prefill_with_one(models: Twins) -> None:
    ids = prompt(2, 21)
    with nothing_slow():
        m = models
        m.agree(m.plain(ids, use_cache=False).logits, m.patched(ids, use_cache=False).logits)
        m.agree(m.plain(ids, use_cache=False).logits, m.patched(ids).logits)


@pytest.mark.parametrize(
    "lengths", [[3, 5, 1, 8, 4], [9, 9, 9], [4, 4, 4, 4], [1, 2, 3, 5, 7, 11], [16, 1, 1, 15]]
)
@torch.no_grad()
def test_chunked_prefill(models: Twins, lengths: list[int]) -> None:
    ids = prompt(2, sum(lengths))
    with nothing_slow():
        whole = models.plain(ids).logits
        models.agree(whole, pieces(models.patched, ids, lengths))
        models.agree(pieces(models.plain, ids, lengths), pieces(models.patched, ids, lengths))


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding(models: Twins, side: str) -> None:
    ids, mask = prompt(4, 19), torch.ones(4, 19, dtype=torch.long)
    for row, padding in enumerate((0, 3, 8, 15)):
        mask[row, slice(19 - padding, None) if side == "right" else slice(0, padding)] = 0
    with nothing_slow():
        plain = models.plain(ids, attention_mask=mask).logits
        models.agree(plain, models.patched(ids, attention_mask=mask).logits, mask.bool())


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_decode_after_padding(models: Twins, side: str) -> None:
    """A hole of padding between the prompt and what follows keeps its slots."""
    ids, mask = prompt(3, 24), torch.ones(3, 24, dtype=torch.long)
    for row, padding in enumerate((0, 5, 9)):
        mask[row, slice(13 - padding, 13) if side == "right" else slice(0, padding)] = 0
    steps = [13, 1, 1, 4, 1, 1, 1, 1, 1]
    with maybe_slow(models, side == "right"):
        models.agree(
            pieces(models.plain, ids, steps, mask),
            pieces(models.patched, ids, steps, mask),
            mask.bool(),
        )


@torch.no_grad()
def test_a_hole_in_the_mask(models: Twins) -> None:
    """Tokens in the middle of a row may be masked too: a window counts their slots."""
    ids, mask = prompt(3, 27), torch.ones(3, 27, dtype=torch.long)
    mask[1, 9:13] = 0
    mask[2, :3] = mask[2, 15:20] = 0
    with maybe_slow(models):
        plain = models.plain(ids, attention_mask=mask).logits
        models.agree(plain, models.patched(ids, attention_mask=mask).logits, mask.bool())
        # Cut as the plain model is: linear attention takes a single token for no padding.
        steps = [11, 7, 1, 1, 1, 6]
        plain = pieces(models.plain, ids, steps, mask)
        models.agree(plain, pieces(models.patched, ids, steps, mask), mask.bool())


@torch.no_grad()
def test_positions_of_its_own_for_every_row(models: Twins) -> None:
    """`generate` counts positions from the first token of a padded row, not from its first slot."""
    ids, mask = prompt(3, 18), torch.ones(3, 18, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, 11:] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with nothing_slow():
        plain = models.plain(ids, attention_mask=mask, position_ids=positions).logits
        patched = models.patched(ids, attention_mask=mask, position_ids=positions).logits
    models.agree(plain, patched, mask.bool())


@torch.no_grad()
def test_generate_chooses_the_same_tokens(models: Twins) -> None:
    with nothing_slow():
        for length in (1, 5, 11, 18):
            ids = prompt(2, length, seed=length)
            assert torch.equal(greedy(models.plain, ids, 14), greedy(models.patched, ids, 14))


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_generate_after_padded_prompts(models: Twins, side: str) -> None:
    ids, mask = prompt(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, slice(8, None) if side == "right" else slice(0, 3)] = 0
    mask[2, slice(4, None) if side == "right" else slice(0, 7)] = 0
    with maybe_slow(models, side == "right"):
        plain = greedy(models.plain, ids, 10, attention_mask=mask)
        assert torch.equal(plain, greedy(models.patched, ids, 10, attention_mask=mask))


@torch.no_grad()
def test_beams(models: Twins) -> None:
    ids = prompt(2, 9)
    with nothing_slow():
        plain = greedy(models.plain, ids, 10, num_beams=3)
        assert torch.equal(plain, greedy(models.patched, ids, 10, num_beams=3))


@torch.no_grad()
def test_sampling_with_one_seed(models: Twins) -> None:
    ids, tokens = prompt(1, 7), []
    for model in (models.plain, models.patched):
        torch.manual_seed(5)
        tokens.append(greedy(model, ids, 8, do_sample=True))
    assert torch.equal(*tokens)


@torch.no_grad()
def test_reordered_caches_go_on_alike(models: Twins) -> None:
    ids, order = prompt(3, 20), torch.tensor([2, 0, 0])
    results = []
    for model in (models.plain, models.patched):
        cache = new_cache(model)
        model(ids[:, :13], past_key_values=cache)
        cache.reorder_cache(order)
        results.append(
            torch.cat(
                [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(13, 20)], 1
            )
        )
    models.agree(*results)


@pytest.mark.parametrize("first", ["plain", "patched"])
@torch.no_grad()
def test_a_cache_may_change_hands(models: Twins, first: str) -> None:
    """Caches keep Hugging Face's layout: a sequence begun with one model goes on with the other."""
    ids = prompt(2, 26)
    one, other = (
        (models.plain, models.patched) if first == "plain" else (models.patched, models.plain)
    )
    cache = new_cache(one)
    one(ids[:, :11], past_key_values=cache)
    logits = [other(ids[:, 11:15], past_key_values=cache).logits]
    logits += [one(ids[:, i : i + 1], past_key_values=cache).logits for i in range(15, 20)]
    logits.append(other(ids[:, 20:], past_key_values=cache).logits)
    models.agree(models.plain(ids).logits[:, 11:], torch.cat(logits, 1))


@torch.no_grad()
def test_a_reset_cache_starts_anew(models: Twins) -> None:
    ids = prompt(2, 15)
    cache = new_cache(models.patched)
    models.patched(ids, past_key_values=cache)
    cache.reset()
    models.agree(models.plain(ids).logits, models.patched(ids, past_key_values=cache).logits)


@torch.no_grad()
def test_embeddings_instead_of_ids() -> None:
    for family in ("deepseek_v32", "qwen3_moe"):
        m = pair(family)
        embeds = m.plain.get_input_embeddings()(prompt(2, 12))
        m.agree(m.plain(inputs_embeds=embeds).logits, m.patched(inputs_embeds=embeds).logits)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("deepseek_v4", {"hc_mult": 2, "hc_sinkhorn_iters": 1}),
        ("deepseek_v4", {"sliding_window": 2}),
        ("deepseek_v4", {"sliding_window": 64}),
        ("deepseek_v4", {"index_topk": 64}),
        ("deepseek_v4", {"num_experts_per_tok": 1, "routed_scaling_factor": 1.0}),
        ("deepseek_v4", {"scoring_func": "sigmoid"}),
        ("deepseek_v4", {"rms_norm_eps": 1e-2, "hc_eps": 1e-2}),
        ("deepseek_v32", {"index_topk": 64}),
        ("deepseek_v32", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
        ("deepseek_v32", {"attention_bias": True}),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "shared"]}),
        ("axk2", {"n_group": None, "topk_group": None}),
        ("axk2", {"attn_implementation": "eager"}),
        ("dots3_note", {"attn_implementation": "eager", "sliding_window": 2}),
        ("dots3_note", {"layer_types": ["full_attention"] * 4, "sliding_window": 64}),
        ("hy_v4", {"hc_mult": 2, "indexer_types": ["full"] * 4}),
        ("mistral_large4", {"kv_source_layers": None, "attn_implementation": "eager"}),
        # Each of the two kinds of layer reads the last that was stored of its own, whatever the
        # source says.
        ("mistral_large4", {"kv_source_layers": [0, 1, 2, 2, 0, 1]}),
        ("glm5_next", {"linear_lower_bound": None, "attn_implementation": "eager"}),
        ("glm5_next", {"index_kpool_always_select_tail": False}),
        ("qwen4_exp", {"output_gate_type": "sigmoid", "attn_implementation": "eager"}),
        ("qwen4_exp", {"ple_layer_ids": None, "hc_count": 2}),
        ("qwen3_moe", {"hidden_act": "gelu"}),
        ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh", "norm_topk_prob": False}),
        ("mixtral", {"hidden_act": "relu"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_other_configurations(family: str, changes: dict[str, object]) -> None:
    m = twins(family, seed=3, **changes)
    ids = prompt(2, 27)
    with nothing_slow():
        m.agree(m.plain(ids).logits, m.patched(ids).logits)
        steps = [9, 1, 1, 1, 1, 14]
        m.agree(pieces(m.plain, ids, steps), pieces(m.patched, ids, steps))


@pytest.mark.parametrize("length", [3, 127, 128, 129, 255, 256, 259])
@torch.no_grad()
def test_the_released_window_and_ratios(length: int) -> None:
    """Window 128, CSA 4, HCA 128: the window's wrap, HCA's first entries, prompts of 3 mod 4."""
    m = _released()
    ids = prompt(1, length + 3, seed=length)
    with nothing_slow():
        steps = [length, 1, 1, 1]
        m.agree(pieces(m.plain, ids, steps), pieces(m.patched, ids, steps))


@functools.cache
def _released() -> Twins:
    csa, hca = "compressed_sparse_attention", "heavily_compressed_attention"
    ratios = {csa: 4, hca: 128}
    return twins("deepseek_v4", sliding_window=128, compress_rates=ratios, index_topk=16)


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_yarn_positions(family: str) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    if family == "deepseek_v4":
        del rope["rope_theta"], rope["mscale"], rope["mscale_all_dim"]
    m = twins(family, rope_parameters=rope, max_position_embeddings=64)
    ids = prompt(1, 40)
    m.agree(m.plain(ids).logits, m.patched(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_stays_close(family: str) -> None:
    """Rounding differs (docs/models.md): dtypes go through, and nothing is far off."""
    m = twins(family)
    plain, patched = m.plain.to(torch.bfloat16), m.patched.to(torch.bfloat16)
    ids = prompt(2, 14)
    with nothing_slow():
        expected, got = plain(ids).logits.float(), patched(ids).logits.float()
        pieces(patched, ids, [9, 1, 4])
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    assert float((got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()) < 0.2


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_float64_is_closer_still(family: str) -> None:
    m = twins(family)
    m.plain.set_experts_implementation("eager")  # torch's grouped product knows no float64
    ids = prompt(2, 14)
    m.agree(m.plain.double()(ids).logits, m.patched.double()(ids).logits)
    assert m.worst < 1e-6  # not 1e-12: norms, mixes and scores of the unpatched model are float32


@pytest.mark.parametrize("family", ["deepseek_v32", "qwen3_moe"])
@torch.no_grad()
def test_drafts_that_are_taken_back(family: str) -> None:
    """Prompt lookup feeds guesses and crops the cache where they were wrong."""
    m = pair(family)
    ids = prompt(1, 9).repeat(1, 2)
    with nothing_slow():
        plain = greedy(m.plain, ids, 10, prompt_lookup_num_tokens=3)
        assert torch.equal(plain, greedy(m.patched, ids, 10, prompt_lookup_num_tokens=3))


@pytest.mark.parametrize("family", ["deepseek_v4", "glm_moe_dsa", "gpt_oss"])
@torch.no_grad()
def test_compiled_without_a_graph_break(family: str) -> None:
    m = pair(family)
    ids = prompt(2, 11)
    torch._dynamo.reset()
    compiled = torch.compile(m.patched, backend="eager", fullgraph=True)
    m.agree(m.plain(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits)


OPERATORS = {
    "deepseek_v4": {
        "sparse_attention",
        "lightning_indexer",
        "compress_kv",
        "moe_experts",
        "route",
        "mhc_pre",
        "mhc_post",
        "mhc_head",
    },
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note", "hy_v4", "mistral_large4"),
        {"sparse_attention", "lightning_indexer", "moe_experts", "route"},
    ),
    "glm5_next": {
        "sparse_attention",
        "lightning_indexer",
        "compress_kv",
        "moe_experts",
        "route",
        "mhc_pre",
        "mhc_post",
        "gated_delta_rule",
        "short_conv",
    },
    "qwen4_exp": {
        "block_sparse_attention",
        "lightning_indexer",
        "moe_experts",
        "route",
        "gated_delta_rule",
        "short_conv",
    },
    **dict.fromkeys(LINEAR, {"gated_delta_rule", "short_conv", "moe_experts", "route"}),
    "qwen3_moe": {"moe_experts"},
    "gpt_oss": {"moe_experts"},
    "mixtral": {"moe_experts"},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_record_shows_every_operator(family: str) -> None:
    m = pair(family)
    with transom.record() as calls:
        m.patched.generate(prompt(1, 9), max_new_tokens=9, do_sample=False)
    assert {c.op for c in calls} == OPERATORS[family]
    with transom.record() as calls:
        m.plain(prompt(1, 9))
    assert not calls
