"""The model of the main job: a local Hugging Face checkpoint, or the built-in DeepSeek-V4 with
seeded weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .console import Refusal

BUILTIN = "Built-in DeepSeek-V4"


@dataclass(frozen=True)
class Loaded:
    """A causal language model in evaluation mode, its tokenizer's two functions, and what to say
    about it."""

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    name: str
    architecture: str
    dtype: torch.dtype
    parameters: int
    weight_bytes: int
    layers: int
    longest: int | None
    """Positions that the model was made for."""
    original_runs: str
    """How Hugging Face runs it: its attention and experts implementations."""
    random_weights: bool


def load(folder: Path | None, dtype: torch.dtype, device: torch.device, seed: int) -> Loaded:
    """The model of `folder`, or the built-in one; nothing is downloaded. Refusal says what is wrong
    with a folder."""
    if importlib.util.find_spec("transformers") is None:
        raise Refusal("transformers is not installed; pip install 'transom[transformers]'")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if folder is None:
        from ..conformance.models.tiny import builtin_model

        model, bytes_ = builtin_model(seed=seed, dtype=dtype)
        return _describe(
            model.to(device), bytes_.encode, bytes_.decode, BUILTIN, dtype, random=True
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
    except Exception as error:  # transformers raises whatever a broken file makes it raise
        raise Refusal(f"{folder} cannot be loaded: {_first_line(error)}") from error
    return _describe(
        model.to(device).eval(),
        lambda text: list(tokenizer(text)["input_ids"]),
        lambda ids: str(tokenizer.decode(ids)),
        folder.resolve().name,
        dtype,
        random=False,
    )


def check(folder: Path) -> None:
    """Refuse what cannot be a checkpoint's folder, before anything is loaded."""
    if not folder.exists():
        raise Refusal(f"model folder {folder} does not exist")
    if not folder.is_dir():
        raise Refusal(f"model {folder} is a file; expected the folder of a Hugging Face checkpoint")
    if not (folder / "config.json").is_file():
        raise Refusal(
            f"model folder {folder} has no config.json; expected a Hugging Face checkpoint"
        )


def _describe(
    model: Any,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    name: str,
    dtype: torch.dtype,
    *,
    random: bool,
) -> Loaded:
    config = model.config.get_text_config()
    ways = {
        "attention": getattr(config, "_attn_implementation", None),
        "experts": getattr(config, "_experts_implementation", None),
    }
    return Loaded(
        model,
        encode,
        decode,
        name,
        type(model).__name__,
        dtype,
        sum(p.numel() for p in model.parameters()),
        sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        int(getattr(config, "num_hidden_layers", 1)),
        getattr(config, "max_position_embeddings", None),
        ", ".join(f"{what} {way!r}" for what, way in ways.items() if way),
        random,
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
