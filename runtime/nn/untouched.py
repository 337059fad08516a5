"""The one rule for reading another module's weight, or passing its forward over.

It holds only while that module is exactly what it is taken for: of the same type, without hooks,
without a forward of its own, its parameters at hand. LoRA, pruning, quantisation, offloading and
plain hooks all break that in one of these ways, and may come at any time; so it is asked at every
call, and where it does not hold the module itself is called.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _modules

from .. import config
from ..errors import SlowPath

_FORWARD: dict[type[nn.Module], Any] = {nn.Linear: nn.Linear.forward}
"""The forward that a class had when it was first seen: one that is exchanged on the class counts as
well."""


def hooked_everywhere() -> bool:
    """True while hooks of all modules are registered."""
    return bool(_modules._has_any_global_hook())


def altered(part: nn.Module, kind: type[nn.Module]) -> str | None:
    """What keeps a module that was of `kind` from being passed over, or None."""
    if type(part) is not kind:
        return f"is a {type(part).__name__}; it was a {kind.__name__}"
    if "forward" in part.__dict__ or kind.forward is not _FORWARD.setdefault(kind, kind.forward):
        return "has a forward of its own (hooks of accelerate do that)"
    if (
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
    ):
        return "has hooks, which would not be run"
    for name, parameter in part._parameters.items():
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"has a {name} that is a {type(parameter).__name__}; expected a Parameter"
        if parameter.is_meta:
            return f"has a {name} without memory (offloaded)"
    return None


def slower(module: str, name: str, part: nn.Module) -> None:
    """Say that a part is called where its weight would have been read: right, and slower."""
    if config.fallback() == "warn" and not torch.compiler.is_compiling():
        text = f"{module}: {name} is no plain nn.Linear any more ({type(part).__name__})"
        warnings.warn(f"{text}; it is called, which takes longer", SlowPath, stacklevel=4)


def plain(part: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """True if a part of exactly this type may be passed over now."""
    return altered(part, kind) is None and not hooked_everywhere()
