"""Replaced modules and the rule for what they pass over (nn/untouched.py): asked at every call, and
where it does not hold Hugging Face's own forward runs for that call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from transom import config
from transom.errors import NotSupported, SlowPath
from transom.nn.untouched import altered, hooked_everywhere

from .padding import SLOTS, Slots, Uncovered

ORIGINAL = "_transom_original"
"""Attribute of a replacing class: the class that it stands in for."""
PARTS = "_transom_parts"
"""Set on a replaced module: (path below it, type, names of parameters) of each module that it
passes over."""


def remember(module: nn.Module, paths: Sequence[str]) -> None:
    """Note what `module`, about to be replaced, passes over."""
    parts = ((path, module.get_submodule(path)) for path in paths)
    vars(module)[PARTS] = tuple((path, type(p), tuple(p._parameters)) for path, p in parts)


def forget(module: nn.Module) -> None:
    """Undo remember()."""
    vars(module).pop(PARTS, None)


def touched(module: nn.Module) -> str | None:
    """Why the replaced `module` must run its original forward now, or None."""
    if hooked_everywhere():
        return "hooks of all modules are registered, which parts that are passed over would not run"
    for path, kind, names in module.__dict__.get(PARTS, ()):
        part: Any = module
        for name in path.split("."):
            part = part._modules.get(name)
            if part is None:
                return f"{path} is gone"
        if (reason := altered(part, kind)) is not None:
            return f"{path} {reason}"
        if tuple(part._parameters) != names:
            return f"{path} has other parameters than when the model was patched"
    return None


def say(name: str, reason: str) -> None:
    """Warn that modules of this name run the original (Python shows the same warning once), or
    raise NotSupported where TRANSOM_FALLBACK asks for that."""
    text = f"patch: {reason}; {name} runs Hugging Face's own forward"
    mode = config.fallback()
    if mode == "error":
        raise NotSupported(text)
    # A warning would break the graph that is being traced.
    if mode == "warn" and not torch.compiler.is_compiling():
        warnings.warn(text, SlowPath, stacklevel=4)


def attends_instead_of(
    original: type[nn.Module],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As instead_of(), for attention: its forward takes the call's `slots`, and the original runs
    also where the call is not covered."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            slots = kwargs.pop(SLOTS, None)
            if PARTS in self.__dict__:
                reason = _uncovered(slots) or touched(self)
                if reason is None:
                    return forward(self, *args, slots=slots, **kwargs)
                if isinstance(slots, Slots) and not slots.masked:
                    raise RuntimeError(
                        f"patch: {reason}, since the forward pass began; expected no change during "
                        "one: the original attention would lack its mask"
                    )
                say(original.__name__, reason)
            return original.forward(self, *args, **kwargs)

        return run

    return decorate


def _uncovered(slots: object) -> str | None:
    if isinstance(slots, Slots):
        return None
    if isinstance(slots, Uncovered):
        return slots.reason
    return "called outside the forward of the model that was patched; padding is not known here"


def instead_of(original: type[nn.Module]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of the forward that stands in for `original`'s: that one runs where something was touched,
    and in a module that was given its class back while another library still holds this forward."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            if PARTS in self.__dict__:
                reason = touched(self)
                if reason is None:
                    return forward(self, *args, **kwargs)
                say(original.__name__, reason)
            kwargs.pop(SLOTS, None)
            return original.forward(self, *args, **kwargs)

        return run

    return decorate
