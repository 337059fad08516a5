"""`transom.patch`: replace, undoably, the modules of a model that transom has operators for.

A module is replaced by giving the instance a subclass of its class with another forward:
parameters, buffers, hooks, names and `isinstance` stay as they were, no other model is touched,
copies and pickles carry it along, and undoing it is giving the class back. Experts are reached
through transformers' registry instead (`experts`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .report import PatchReport, Record
from .slots import announce_slots, announce_slots_beside_mask

# The replacements follow the code of this version of transformers; the experts registry is a public
# interface.
WRITTEN_FOR = "5.23"

# The modules of transformers that a module of ours has replacements for.
_FAMILIES = {
    f"transformers.models.{family}.modeling_{family}": f"transom.models.{family}"
    for family in ("deepseek_v4", "deepseek_v32", "glm_moe_dsa")
}

# Names of modules that a reader of the report will look for, replaced or not.
_OF_INTEREST = re.compile(r"(Attention|Experts|Router|Gate|HyperConnection|HyperHead)$")


@dataclass(frozen=True)
class Replacement:
    """Instances of exactly `original` become `replacement`, unless `refuse` says why not."""

    original: type[nn.Module]
    replacement: type[nn.Module]
    operators: Callable[[Any], str]
    refuse: Callable[[Any], str | None]


@dataclass(frozen=True)
class Family:
    """The replacements of one family and how its attention learns about padding.

    base       class of the model whose forward makes the attention mask
    attention  class (original) of the modules that use it
    mixes      True if replaced and original attention modules can live in one model
    """

    replacements: tuple[Replacement, ...]
    base: type[nn.Module]
    attention: type[nn.Module]
    mixes: bool


def patch(model: nn.Module) -> PatchReport:
    """Replaces, in place, what transom has operators for in a Hugging Face model; reports it.

    model  any module; models of DeepSeek-V4, DeepSeek-V3.2 and GLM-DSA get attention, indexer,
           compressor, routing and hyper-connections replaced, and every model whose experts use
           transformers' experts registry its experts. On an x86 CPU without AVX-512, where
           PyTorch is slow at products of 16-bit numbers, so are linear layers of such weights
           that have no bias.

    Returns a `PatchReport`: iterate over its records, or print it. What is not covered is left as
    it was and is in the report with the reason. Patching twice changes nothing. The outputs follow
    Hugging Face's mathematics (docs/models.md lists where they differ from the operators' own
    contracts). `unpatch` undoes it.

    Errors: TypeError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is a {type(model).__name__}; expected a torch.nn.Module")
    from .experts import patch_experts
    from .linear import patch_linear

    records: dict[str, Record] = {}
    swaps: list[tuple[str, nn.Module, Replacement]] = []
    families: dict[str, Family] = {}
    for path, module in model.named_modules():
        family = _family_of(module)
        if family is not None:
            families[type(module).__module__] = family
        name = type(module).__name__
        found = _find(family, module)
        if found is not None:
            reason = _refuse(found, module)
            if reason is None:
                swaps.append((path, module, found))
                records[path] = Record(path, name, operators=found.operators(module))
            else:
                records[path] = Record(path, name, reason=reason)
        else:
            outcome = patch_experts(module)
            product = patch_linear(module)
            if outcome is not None:
                records[path] = Record(path, name, *outcome)
            elif product is not None:
                records[path] = Record(path, name, operators=product)
            elif _OF_INTEREST.search(name) and not any(_inside(path, p) for p in records):
                records[path] = Record(path, name, reason=_not_for(module))
    for family in families.values():
        _withdraw(model, family, records, swaps)
    for _, module, found in swaps:
        module.__class__ = found.replacement
    for family in families.values():
        _hook(model, family)
    return PatchReport(type(model).__name__, tuple(records.values()))


def unpatch(model: nn.Module) -> None:
    """Restores, in place, what `patch` replaced in `model`: its classes, configuration and hooks.

    A model that was not patched is left as it is. Errors: TypeError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model is a {type(model).__name__}; expected a torch.nn.Module")
    from .experts import unpatch_experts
    from .linear import unpatch_linear

    for module in model.modules():
        family = _family_of(module)
        if family is not None:
            for r in family.replacements:
                if type(module) is r.replacement:
                    module.__class__ = r.original
        unpatch_experts(module)
        unpatch_linear(module)
        _unhook(module)


def _family_of(module: nn.Module) -> Family | None:
    home = type(module).__module__
    ours = _FAMILIES.get(home, home if home in _FAMILIES.values() else None)
    if ours is None:
        return None
    family: Family = importlib.import_module(ours).FAMILY
    return family


def _find(family: Family | None, module: nn.Module) -> Replacement | None:
    for r in () if family is None else family.replacements:
        if type(module) in (r.original, r.replacement):
            return r
    return None


def _refuse(found: Replacement, module: nn.Module) -> str | None:
    """Why this module can't be replaced, or None."""
    if type(module) is found.replacement:
        return None
    import transformers

    if not transformers.__version__.startswith(f"{WRITTEN_FOR}."):
        return (
            f"transformers is {transformers.__version__}; the replacement follows {WRITTEN_FOR}; "
            f"pip install 'transformers=={WRITTEN_FOR}.*'"
        )
    if "forward" in vars(module):
        return "its forward was already replaced on this instance (hooks of accelerate do that)"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}; only ordinary parameters are covered"
    return found.refuse(module)


def _withdraw(
    model: nn.Module,
    family: Family,
    records: dict[str, Record],
    swaps: list[tuple[str, nn.Module, Replacement]],
) -> None:
    """Takes back attention modules that no base model tells about padding, or that can't mix."""
    name = family.attention.__name__
    bases = [path for path, module in model.named_modules() if isinstance(module, family.base)]
    refused = [r for r in records.values() if r.module == name and r.reason is not None]
    for swap in list(swaps):
        path, module, found = swap
        if found.original is not family.attention:
            continue
        if not any(_inside(path, base) for base in bases):
            reason = (
                f"it stands outside a {family.base.__name__}, whose forward knows the padding; "
                "patch the whole model"
            )
        elif refused and not family.mixes:
            reason = (
                f"{refused[0].path} is left alone, and these layers share one selection of tokens"
            )
        else:
            continue
        swaps.remove(swap)
        records[path] = Record(path, name, reason=reason)


def _hook(model: nn.Module, family: Family) -> None:
    """Lets the base models tell their replaced attention modules about padding."""
    replaced = next(r.replacement for r in family.replacements if r.original is family.attention)
    for base in model.modules():
        if not isinstance(base, family.base):
            continue
        _unhook(base)
        kinds = {type(m) for m in base.modules() if isinstance(m, family.attention)}
        if replaced in kinds:
            hook = announce_slots if kinds == {replaced} else announce_slots_beside_mask
            base.register_forward_pre_hook(hook, with_kwargs=True)


def _unhook(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook in (announce_slots, announce_slots_beside_mask):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}." if outer else "")


def _not_for(module: nn.Module) -> str:
    name = type(module).__name__
    if name.endswith("Attention"):
        return "dense attention; transom's attention operators are for sparse ones"
    if name.endswith("Experts"):
        return "its class does not use transformers' experts registry; nothing to plug into"
    return "no registry reaches it and transom has no replacement for this class"
