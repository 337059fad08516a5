"""Comparing a patched model with its unpatched twin: logits within a bound, the same tokens."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import transom
from transom.conformance.models import tiny
from transom.errors import SlowPath

SHARE = 1e-4
"""The largest difference of logits allowed, as a share of the range of the unpatched ones."""

MANY = int(os.environ.get("TRANSOM_TEST_EXAMPLES", "15")) > 15
"""True where more is asked for than the required run: every length instead of the chosen ones."""

SPARSE = (
    "deepseek_v4",
    "deepseek_v32",
    "glm_moe_dsa",
    "axk2",
    "dots3_note",
    "hy_v4",
    "mistral_large4",
    "glm5_next",
    "qwen4_exp",
)
LINEAR = ("qwen3_next", "qwen3_5_moe", "kimi_linear")
EXPERTS_ONLY = ("qwen3_moe", "gpt_oss", "mixtral")


@dataclass
class Twins:
    """A model as transformers runs it, its patched copy, and the worst difference seen so far."""

    family: str
    plain: Any
    patched: Any
    worst: float = 0.0
    report: Any = field(default=None)

    def agree(self, plain: Tensor, patched: Tensor, where: Tensor | None = None) -> None:
        """Asserts that logits agree, where[B, S] is True if given, and choose the same tokens."""
        if where is not None:
            plain, patched = plain[where], patched[where]
        assert torch.isfinite(patched).all()
        share = float((plain - patched).abs().max() / (plain.max() - plain.min()))
        self.worst = max(self.worst, share)
        assert share <= SHARE, f"logits differ by {share:.2e} of their range"
        assert torch.equal(plain.argmax(-1), patched.argmax(-1))


def twins(family: str, *, seed: int = 0, **changes: object) -> Twins:
    """Two models of equal weights, one of them patched."""
    plain = tiny.tiny_model(family, seed=seed, **changes)
    patched = copy.deepcopy(plain)
    return Twins(family, plain, patched, report=transom.patch(patched))


def layers(model: Any) -> Any:
    """The decoder layers of a language model, or of the text part of one that also sees."""
    return getattr(model.model, "language_model", model.model).layers


def prompt(batch: int, length: int, *, seed: int = 1, vocab: int = 97) -> Tensor:
    """Token ids [batch, length]; 0 and 1 are left out, they are padding and beginning."""
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def new_cache(model: Any) -> Any:
    """The cache that `generate` would make."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@contextmanager
def nothing_slow() -> Iterator[None]:
    """Fails if a call leaves the operators for Hugging Face's own attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowPath)
        # gpt-oss stores its experts transposed, which the native kernels decline
        warnings.filterwarnings("ignore", "moe_experts: .* has a last dim of stride", SlowPath)
        yield


def pieces(model: Any, ids: Tensor, lengths: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all positions, fed through one cache in pieces; mask[B, N] covers what was fed."""
    cache, logits, done = new_cache(model), [], 0
    for n in lengths:
        more = {} if mask is None else {"attention_mask": mask[:, : done + n]}
        out = model(ids[:, done : done + n], past_key_values=cache, use_cache=True, **more)
        logits.append(out.logits)
        done += n
    assert done == ids.shape[1]
    return torch.cat(logits, 1)


def greedy(model: Any, ids: Tensor, tokens: int = 8, **more: Any) -> Tensor:
    """The tokens that `generate` appends, without sampling."""
    more.setdefault("do_sample", False)
    return model.generate(ids, max_new_tokens=tokens, **more)[:, ids.shape[1] :]


def gradients(model: Any, ids: Tensor, **more: Any) -> dict[str, Tensor | None]:
    """The gradient of the language model's loss in every parameter, in training mode."""
    model.train()
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids, **more).loss.backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters()}
