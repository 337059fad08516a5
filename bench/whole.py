"""A whole DeepSeek-V4 of laptop size: prefill of a prompt and decode, patched and as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transom import dtypes
from transom.models import agreement

from .cases import Wanted
from .ceilings import Ceilings
from .measure import Row, Settings, spread

if TYPE_CHECKING:
    from .run import Progress

PROMPT = 2048
STEPS = 16
"""Decode steps of a sample."""
ROUNDS = 3
NAME = "whole model"
CHECKED = 256
"""Positions at the prompt's end whose logits are compared."""


def measure(
    wanted: Wanted, ceilings: Ceilings, settings: Settings, progress: Progress
) -> list[Row]:
    """Rows of prefill and decode: transom in each dtype, transformers' eager in it and in f32.

    Raises ImportError where transformers has no DeepSeek-V4.
    """
    from transom.conformance.models.tiny import builtin_model
    from transom.models import patch, unpatch

    progress.start(f"{NAME}: making the models")
    ways: list[tuple[str, str, str, Any]] = []
    patched: list[Any] = []
    for dtype in dict.fromkeys((*wanted.dtypes, "f32")):
        if dtype in wanted.dtypes:
            model, _ = builtin_model(dtype=dtypes.parse(dtype))
            patch(model)
            patched.append(model)
            ways.append((f"transom, {dtype}", "transom", dtype, model))
        model, _ = builtin_model(dtype=dtypes.parse(dtype))
        ways.append((f"transformers eager, {dtype}", "transformers", dtype, model))
    prompt = torch.randint(256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    try:
        return _measured(ways, wanted.dtypes, prompt, ceilings, settings, progress)
    finally:
        for model in patched:
            unpatch(model)


def _measured(
    ways: list[tuple[str, str, str, Any]],
    wanted: Sequence[str],
    prompt: Tensor,
    ceilings: Ceilings,
    settings: Settings,
    progress: Progress,
) -> list[Row]:
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in ways}
    found: dict[str, agreement.Agreement] = {}
    truth = None
    # the truth comes first
    for name, _, _, model in sorted(ways, key=lambda w: (w[1] != "transformers", w[2] != "f32")):
        progress.start(f"{NAME}: checking {name}")
        logits = last_logits(model, prompt)
        truth = logits if truth is None else truth
        found[name] = compared(truth, logits, model)
    for round_ in range(ROUNDS):
        for i in range(len(ways)):
            name, _, _, model = ways[(i + round_) % len(ways)]
            progress.start(f"{NAME}: {name}, pass {round_ + 1} of {ROUNDS}")
            passes[name].append(_pass(model, prompt, settings.clock))
    rows = []
    phases = (f"prefill of {PROMPT:,} tokens", f"decode at {PROMPT:,} tokens")
    for (at, phase), dtype in itertools.product(enumerate(phases), wanted):
        for name, peer, kind, _ in ways:
            # transformers in this dtype, and in float32 in any case
            if kind != dtype and (peer == "transom" or kind != "f32"):
                continue
            row = Row(
                NAME,
                "builtin-v4",
                phase,
                f"47M DeepSeek-V4, {phase}, {dtype}",
                {"prompt": PROMPT},
                dtype,
                "plain",
                name,
                peer,
                "patched" if peer == "transom" else "as transformers runs it",
                ceilings.threads,
                ceilings.level,
                "",
                "random weights and tokens",
                None,
                0.0,
                0.0,
                chosen=peer == "transom",
                error=found[name].judged,
            )
            if found[name].agrees:
                row.seconds, row.calls = spread([p[at] for p in passes[name]]), ROUNDS
            else:
                row.left_out = f"differs from transformers in float32: {found[name].verdict}"
            rows.append(row)
    return rows


def last_logits(model: Any, prompt: Tensor) -> Tensor:
    """Of the last CHECKED positions, or all of a shorter prompt, in float32."""
    logits: Tensor = model(input_ids=prompt, logits_to_keep=CHECKED).logits[0]
    return logits.float()


def compared(original: Tensor, other: Tensor, model: Any) -> agreement.Agreement:
    """Do two runs' last logits agree, of models like this one?"""
    rule = agreement.limit(model.dtype, model.config.num_hidden_layers)
    return agreement.compare(original, other, len(original), (), (), rule)


def _pass(model: Any, prompt: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the prefill, seconds of one decode step."""
    start = clock()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    first = clock() - start
    cache = out.past_key_values
    token = prompt[:, -1:]
    start = clock()
    for _ in range(STEPS):
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return first, (clock() - start) / STEPS
