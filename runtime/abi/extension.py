"""transom._C: found, told what it asks of torch, and given the modes that hold for all calls.

Without it calls go through Python, and those of C implementations through cffi.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..op import Op
from ..weights import QuantizedWeight
from . import library
from .frame import TAGS


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
    speaks = library.header_version()
    if extension.ABI != speaks:
        built, wanted = (".".join(map(str, version)) for version in (extension.ABI, speaks))
        return None, f"transom._C was built for ABI {built}; this transom speaks {wanted}"
    asked = {
        "tensor": torch.Tensor,
        "parameter": torch.nn.Parameter,
        "quantized": QuantizedWeight,
        "threads": torch.get_num_threads,
        # What torch.are_deterministic_algorithms_enabled, a function in Python, asks.
        "deterministic": torch._C._get_deterministic_algorithms,
        "written": torch._C._increment_version,
        "grad_enabled": torch.is_grad_enabled,
        "dispatch_modes": torch._C._len_torch_dispatch_stack,
        "function_modes": torch._C._len_torch_function_stack,
        "transforms": torch._C._functorch.peek_interpreter_stack,
        "tracing": torch._C._get_tracing_state,
        "profiling": torch._C._autograd._profiler_enabled,
        "any_autocast": torch._C._is_any_autocast_enabled,
        "autocast": torch.is_autocast_enabled,
        "capturing": torch.cuda.is_current_stream_capturing,
    }
    reason: str | None = extension.set_up(asked)
    return (extension, None) if reason is None else (None, reason)


def module() -> Any:
    """The module transom._C, or None: then cffi calls."""
    return _found()[0]


def why_cffi() -> str | None:
    """None where the extension calls, else the sentence why not."""
    return _found()[1]


def operator(op: Op[..., Any]) -> Any:
    """The declaration as transom._C reads calls by it."""
    extension = module()
    kinds = {"tensor": extension.TENSOR, "weight": extension.WEIGHT}
    parameters = [
        (p.name, kinds.get(p.role) or TAGS[p.type.removesuffix("?")], p.type.endswith("?"))
        for p in op.parameters
    ]
    return extension.Operator(op.name, parameters, [op.position[name] for name in op.host])


_modes: dict[str, Any] = {}


def set_mode(name: str, value: Any) -> None:
    """Tell the extension, now or once it is loaded: `choice` (what use() asks for, as text),
    `recorded` (a function of a plan and values while record() listens, or None), `workspace`
    (bytes that temporaries should keep to)."""
    if _modes.get(name) != value:
        _modes[name] = value
        if "transom._C" in sys.modules and module() is not None:
            getattr(module(), f"set_{name}")(value)


def caller(
    op: Op[..., Any],
    most: int,
    plan_of: Callable[..., Any],
    otherwise: Callable[..., Any],
    unread: Callable[..., Any],
) -> Any:
    """How calls of an operator enter, or None without the extension: .enter (*values), .run(values,
    gradient), .plans(), .forget(). See csrc/python/call.cpp for the functions that it asks."""
    extension = module()
    if extension is None:
        return None
    for name, value in _modes.items():
        getattr(extension, f"set_{name}")(value)
    return extension.Caller(operator(op), most, plan_of, otherwise, unread)
