"""How C implementations are called here: through the extension transom._C, else through cffi."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

from ..weights import QuantizedWeight
from . import table


@functools.cache
def _found() -> tuple[Any, str | None]:
    """transom._C and None, or None and the sentence why it is not used."""
    try:
        extension = importlib.import_module("transom._C")
    except ModuleNotFoundError:
        python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
        return None, f"this installation has no transom._C for {python}"
    except ImportError as error:
        return None, f"transom._C failed to import: {error}"
    speaks = table.header_version()
    if extension.ABI != speaks:
        built, wanted = (".".join(map(str, version)) for version in (extension.ABI, speaks))
        return None, f"transom._C was built for ABI {built}; this transom speaks {wanted}"
    # What torch.are_deterministic_algorithms_enabled, a function in Python, asks.
    deterministic = torch._C._get_deterministic_algorithms
    reason: str | None = extension.set_up(
        torch.Tensor,
        QuantizedWeight,
        torch.get_num_threads,
        deterministic,
        torch._C._increment_version,
    )
    if reason is not None:
        return None, reason
    extension.watch(
        torch.nn.Parameter,
        torch.is_grad_enabled,
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._functorch.peek_interpreter_stack,
        torch._C._get_tracing_state,
        torch._C._is_any_autocast_enabled,
        torch.is_autocast_enabled,
        torch.cuda.is_current_stream_capturing,
    )
    return extension, None


def extension() -> Any:
    """The module transom._C, or None: then cffi calls."""
    return _found()[0]


def why_cffi() -> str | None:
    """None where the extension calls, else the sentence why not."""
    return _found()[1]
