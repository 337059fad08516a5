"""The models that come with the package: seeded, of the shape they claim."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from agreement import greedy, prompt

from transom.conformance.models import tiny, tiny_configs


def test_the_builtin_model_has_every_kind_of_layer() -> None:
    config = tiny.builtin_config()
    assert set(config.layer_types) == {
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    }
    assert set(config.mlp_layer_types) == {"hash_moe", "moe"}
    assert (config.sliding_window, config.index_topk) == (128, 512)
    assert sorted(config.compress_rates.values()) == [4, 128]


@torch.no_grad()
def test_the_builtin_model_reads_bytes() -> None:
    model, tokenizer = tiny.builtin_model()
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 60e6
    ids = tokenizer.encode("naïve")
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids) == "naïve"
    assert tokenizer.encode("é", add_bos=False) == [0xC3, 0xA9]
    logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), tokenizer.vocab_size) and torch.isfinite(logits).all()


def test_bytes_that_are_no_text_are_marked() -> None:
    assert (
        tiny.ByteTokenizer().decode([72, 0xFF, 105, tiny.ByteTokenizer.eos_token_id]) == "H\ufffdi"
    )


def test_what_the_family_keeps_in_float32_stays_so() -> None:
    model, _ = tiny.builtin_model(dtype=torch.bfloat16)
    kinds = {name.rsplit(".", 1)[-1]: p.dtype for name, p in model.named_parameters()}
    assert kinds["fn"] == kinds["sinks"] == kinds["position_bias"] == torch.float32
    assert kinds["gate_up_proj"] == torch.bfloat16


@pytest.mark.parametrize("family", tiny_configs.FAMILIES)
def test_weights_depend_on_the_seed_alone(family: str) -> None:
    one, same, other = (tiny.tiny_model(family, seed=s) for s in (4, 4, 5))
    for (name, a), b, c in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b) and not torch.equal(a, c), name


@pytest.mark.parametrize("family", tiny_configs.FAMILIES)
@torch.no_grad()
def test_greedy_tokens_are_not_degenerate(family: str) -> None:
    """Agreement on one token repeated for ever would prove nothing."""
    tokens = greedy(tiny.tiny_model(family), prompt(2, 11), 24)
    assert all(len(set(row)) >= 6 for row in tokens.tolist())


def test_unknown_families() -> None:
    with pytest.raises(
        ValueError, match=r"^tiny_config: family is 'gpt2'; known: deepseek_v4, .*mixtral$"
    ):
        tiny_configs.tiny_config("gpt2")


def test_importing_transom_does_not_import_transformers() -> None:
    look = "print('transformers' in sys.modules)"
    code = f"import sys, transom; {look}; transom.patch; {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
