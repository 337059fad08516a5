"""The figures of the main job as plain data: what --json writes and the report shows."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from typing import Any

from . import machine, units
from .checkpoint import Loaded
from .job import Outcome, Side
from .operators import Phase

Figures = dict[str, Any]

FORMAT = 1
"""Of the JSON file: raised when a field changes its meaning or goes away."""


def figures(loaded: Loaded, outcome: Outcome, settings: dict[str, Any]) -> Figures:
    """Everything that was found, with what it must be read with; seconds, bytes, and rates a
    second."""
    agreed = outcome.agreement
    device = next(
        d for d in machine.devices() if d["device"] == settings["device"].partition(":")[0]
    )
    return {
        "format": FORMAT,
        "command": "transom run",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "machine": {**device, **machine.system(), "peaks": dataclasses.asdict(outcome.peaks)},
        "model": {
            "name": loaded.name,
            "architecture": loaded.architecture,
            "parameters": loaded.parameters,
            "weight_bytes": loaded.weight_bytes,
            "layers": loaded.layers,
            "dtype": settings["dtype"],
            "random_weights": loaded.random_weights,
            "hugging_face_runs": loaded.original_runs,
        },
        "settings": settings,
        "original": _side(outcome.original),
        "patched": _side(outcome.patched),
        "agreement": {
            "agrees": agreed.agrees,
            "verdict": agreed.verdict,
            "rule": agreed.rule,
            "limit": agreed.limit,
            "judged": agreed.judged,
            "largest_difference": agreed.largest,
            "range": agreed.range,
            "largest_of_range": agreed.worst,
            "median_position_of_range": agreed.median,
            "same_first_choice": agreed.same_choice,
            "tokens_equal": agreed.first_difference is None,
            "first_differing_token": agreed.first_difference,
            "by_position_of_range": list(agreed.relative),
        },
        "patch": {
            "model": outcome.patch.model,
            "replaced": [dataclasses.asdict(r) for r in outcome.patch.replaced],
            "left_alone": [dataclasses.asdict(r) for r in outcome.patch.left_alone],
        },
        "phases": [_phase(p) for p in outcome.phases],
        "slow_paths": list(outcome.slow_paths),
        "busy": machine.busy(settings["load"]),
    }


def headline(found: Figures) -> list[str]:
    """Two lines: what ran on what."""
    model, machine_, settings = found["model"], found["machine"], found["settings"]
    threads = f", {machine_['threads']} threads" if machine_["device"] == "cpu" else ""
    cut = settings["prompt_tokens_before_cut"]
    shortened = f" (cut from {cut:,})" if cut > settings["prompt_tokens"] else ""
    parameters = f"{units.digits(model['parameters'] / 1e6)} million parameters"
    size = units.memory(model["weight_bytes"])
    return [
        f"{model['name']}: {parameters}, {model['layers']} layers, {model['dtype']}, {size}, "
        f"on {machine_['name']} ({machine_['arch']}{threads})",
        f"{settings['prompt_tokens']:,} tokens of {settings['prompt']}{shortened}, "
        f"{settings['tokens']} generated greedily",
    ]


def _side(side: Side) -> dict[str, Any]:
    return {
        **dataclasses.asdict(side),
        "prefill_tokens_per_second": side.prefill_rate,
        "decode_tokens_per_second": side.decode_rate,
    }


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "model_calls": phase.steps,
        "seconds": phase.seconds,
        "seconds_outside": phase.outside,
        "operators": [
            {
                **dataclasses.asdict(r),
                "gflops": r.gflops,
                "gbytes": r.gbytes,
                "attained": r.attained,
            }
            for r in phase.rows
        ],
    }
