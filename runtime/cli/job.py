"""The main job: one text through one model, as Hugging Face runs it and patched, timed, recorded
and compared.

Four kinds of passes, so that none disturbs another. All are of batch 1, without gradients:

warm-up     a few tokens, so that first-call costs fall into no figure
timed       prefill (logits of the last position only, as `generate` asks), then greedy tokens one
            at a time; memory
recorded    patched only: the same calls under transom.record(timing=True), which waits for the
            device around each operator
compared    the prompt's logits at every position; generated positions come from the timed pass of
            the original and the
            recorded pass of the patched model, which is fed the original's tokens
"""

from __future__ import annotations

import contextlib
import inspect
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import device as _device
from .. import selection
from ..errors import NotSupported, SlowPath
from ..models import agreement
from ..record import record
from . import operators
from .console import Refusal, Steps
from .memory import PeakMemory

if TYPE_CHECKING:
    from ..models import PatchReport
    from .checkpoint import Loaded

_WARM_TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """What to run; `use` holds the arguments of transom.use()."""

    tokens: int
    device: torch.device
    repeats: int = 1
    use: tuple[tuple[str, ...], dict[str, str]] = ((), {})


@dataclass(frozen=True)
class Side:
    """One way of running the model; medians over the repeats, the largest peak."""

    name: str
    prompt: int
    prefill_seconds: float
    decode_seconds: float
    """All decode steps together: one fewer than tokens, since prefill gives the first."""
    peak_bytes: int | None
    peak_method: str
    tokens: tuple[int, ...]
    text: str

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Generated tokens a second; None if only one was asked for."""
        steps = len(self.tokens) - 1
        return steps / self.decode_seconds if steps else None


@dataclass(frozen=True)
class Outcome:
    """Everything that the job found."""

    original: Side
    patched: Side
    agreement: agreement.Agreement
    patch: PatchReport
    phases: tuple[operators.Phase, ...]
    peaks: _device.Peaks
    slow_paths: tuple[str, ...]
    """The reasons that transom gave for dropping to a composite."""


@dataclass
class _Pass:
    prefill_seconds: float
    step_seconds: list[float]
    tokens: list[int]
    logits: list[Tensor] = field(repr=False)
    """Of the last position of each call of the model."""


def run_job(loaded: Loaded, ids: list[int], settings: Settings, steps: Steps) -> Outcome:
    """Run the model on the token ids both ways; it is left as it was found.

    Raises Refusal if a forced implementation cannot run, or if the model keeps no cache of keys and
    values.
    """
    from ..models import patch, unpatch

    model, device = loaded.model, settings.device
    prompt = torch.tensor([ids], device=device)
    steps.start(f"measuring the peaks of {device.type}")
    peaks = _device.peaks(device.type)
    positions, slow = len(ids), []
    with torch.inference_mode():
        original, first = _timed("Hugging Face", loaded, prompt, settings, steps)
        steps.start(f"Hugging Face: logits of {positions} positions, to compare")
        truth = torch.cat([_all_logits(model, prompt), *(x.cpu() for x in first.logits[1:])])
        report = patch(model)
        try:
            with _forced(settings), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", SlowPath)
                patched, _ = _timed("transom", loaded, prompt, settings, steps)
                phases, last = _recorded(model, prompt, first.tokens, peaks, steps)
                steps.start(f"transom: logits of {positions} positions, to compare")
                other = torch.cat([_all_logits(model, prompt), *(x.cpu() for x in last.logits[1:])])
            slow = [str(w.message) for w in caught if issubclass(w.category, SlowPath)]
        finally:
            unpatch(model)
    steps.start("comparing")
    rule = agreement.limit(loaded.dtype, loaded.layers)
    agreed = agreement.compare(truth, other, positions, original.tokens, patched.tokens, rule)
    return Outcome(original, patched, agreed, report, phases, peaks, tuple(dict.fromkeys(slow)))


@contextlib.contextmanager
def _forced(settings: Settings) -> Iterator[None]:
    everywhere, choice = settings.use
    try:
        if everywhere or choice:
            with selection.use(*everywhere, **choice):
                yield
        else:
            yield
    except NotSupported as error:
        raise Refusal(str(error)) from None


def _timed(
    name: str, loaded: Loaded, prompt: Tensor, settings: Settings, steps: Steps
) -> tuple[Side, _Pass]:
    steps.start(f"{name}: warming up")
    _generate(loaded.model, prompt[:, :_WARM_TOKENS], 2, lambda: None)
    passes, peaks = [], []
    for repeat in range(settings.repeats):
        again = f" (pass {repeat + 1} of {settings.repeats})" if settings.repeats > 1 else ""
        steps.start(
            f"{name}: prefill of {prompt.shape[1]} tokens, {settings.tokens} new ones{again}",
            settings.tokens,
        )
        with PeakMemory(settings.device) as memory:
            passes.append(_generate(loaded.model, prompt, settings.tokens, steps.advance))
        peaks.append(memory)
    measured = [p.bytes for p in peaks if p.bytes is not None]
    side = Side(
        name,
        prompt.shape[1],
        statistics.median(p.prefill_seconds for p in passes),
        statistics.median(sum(p.step_seconds) for p in passes),
        max(measured) if measured else None,
        peaks[0].method,
        tuple(passes[0].tokens),
        loaded.decode(passes[0].tokens),
    )
    return side, passes[0]


def _generate(
    model: Any,
    prompt: Tensor,
    tokens: int,
    after: Callable[[], None],
    forced: list[int] | None = None,
) -> _Pass:
    """Prefill and decode greedily, or along `forced` tokens; generation goes on past an end-of-text
    token."""
    seconds: list[float] = []
    logits: list[Tensor] = []
    chosen: list[int] = []
    cache = None
    inputs = prompt
    for index in range(tokens):
        _device.synchronize(prompt.device)
        start = time.perf_counter()
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True, **_last_only(model))
        token = int(out.logits[0, -1].argmax())  # waits for the device
        seconds.append(time.perf_counter() - start)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise Refusal(
                f"{type(model).__name__} returned no past_key_values; "
                "expected a model that keeps a cache"
            )
        logits.append(out.logits[0, -1:].clone())
        chosen.append(token)
        inputs = prompt.new_tensor([[token if forced is None else forced[index]]])
        after()
    return _Pass(seconds[0], seconds[1:], chosen, logits)


def _recorded(
    model: Any, prompt: Tensor, tokens: list[int], peaks: _device.Peaks, steps: Steps
) -> tuple[tuple[operators.Phase, ...], _Pass]:
    """The patched model along the original's tokens, with every operator timed."""
    steps.start("transom: the same again, recording each operator", len(tokens))
    marks: list[int] = []
    with record(timing=True) as calls:

        def after() -> None:
            marks.append(len(calls))
            steps.advance()

        done = _generate(model, prompt, len(tokens), after, tokens)
    cut = marks[0]
    phases = [operators.phase("prefill", 1, done.prefill_seconds, calls[:cut], peaks)]
    if done.step_seconds:
        phases.append(
            operators.phase(
                "decode", len(done.step_seconds), sum(done.step_seconds), calls[cut:], peaks
            )
        )
    return tuple(phases), done


def _all_logits(model: Any, prompt: Tensor) -> Tensor:
    return model(input_ids=prompt, use_cache=True).logits[0].cpu()


def _last_only(model: Any) -> dict[str, int]:
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}
