"""`transom.patch`: replace, undoably, the modules of a model that transom has operators for.

A module is replaced by giving the instance a subclass of its class with another forward:
parameters, buffers, hooks, names and `isinstance` stay as they were, no other model is touched,
copies and pickles carry it along, and undoing it is giving the class back. Experts are reached
through transformers' registry instead (`experts`).
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from transom.nn.untouched import altered

from .padding import SLOTS, Slots, Uncovered, cache_layers, read_slots
from .report import PatchReport, Record
from .untouched import ORIGINAL, PARTS, forget, remember, touched

# The replacements follow the code of this version of transformers; the experts registry is a public
# interface.
WRITTEN_FOR = "5.23"

# Families of transformers with replacements: the FAMILY of our module of that name.
_FAMILIES = (
    "axk2",
    "deepseek_v32",
    "deepseek_v4",
    "dots3_note",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v4",
    "kimi_linear",
    "mistral_large4",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen4_exp",
)

# Names of modules that a reader of the report will look for, replaced or not.
_OF_INTEREST = re.compile(
    r"(Attention|DeltaNet|Experts|Router|Gate|HyperConnection|HyperHead|Residual|PLELayer)$"
)


def _nothing(module: Any) -> tuple[str, ...]:
    return ()


def _never(asked: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Replacement:
    """Instances of exactly `original` become `replacement`, unless `refuse` says why not.

    operators    what it runs through then, or a function of the module that says it
    passes_over  of a module: the paths of the parts whose weight it reads or whose forward it skips
    """

    original: type[nn.Module]
    replacement: type[nn.Module]
    operators: str | Callable[[Any], str]
    refuse: Callable[[Any], str | None] = _never
    passes_over: Callable[[Any], tuple[str, ...]] = _nothing

    def record(self, path: str, module: nn.Module, reason: str | None) -> Record:
        """What the report says of `module`, which is replaced unless there is a reason."""
        name = type(module).__name__
        if reason is not None:
            return Record(path, name, reason=reason)
        what = self.operators
        return Record(path, name, operators=what if isinstance(what, str) else what(module))


@dataclass(frozen=True)
class Family:
    """The replacements of one family and how its attention learns about padding.

    base       class of the model whose forward makes the attention mask; None where no replacement
               asks for it
    attention  class (original) of the modules that use it
    mixes      True if replaced and original attention modules can live in one model
    masks      kinds of layers whose dense mask no module needs
    recurrent  kinds of layers that are told which of the call's tokens are padding
    uncovered  why a call with these Slots runs Hugging Face's own attention, or None
    """

    replacements: tuple[Replacement, ...]
    base: type[nn.Module] | None = None
    attention: type[nn.Module] = nn.Module
    mixes: bool = True
    masks: tuple[str, ...] = ("indexed_attention",)
    recurrent: tuple[str, ...] = ()
    uncovered: Callable[[Slots], str | None] = _never

    def attentions(self, base: nn.Module) -> Iterator[tuple[int, nn.Module]]:
        """The attention modules of a base model, each with the number of its layer."""
        for i, layer in enumerate(getattr(base, "layers", ())):
            module = layer._modules.get("self_attn")
            if isinstance(module, self.attention):
                yield i, module


def patch(model: nn.Module) -> PatchReport:
    """Replaces, in place, what transom has operators for in a Hugging Face model; reports it.

    model  any module; models of the families that docs/models.md lists get attention, indexer,
           compressor, routing and hyper-connections replaced, and every model whose experts use
           transformers' experts registry its experts. On an x86 CPU without AVX-512, where
           PyTorch is slow at products of 16-bit numbers, so are linear layers of such weights
           that have no bias.

    Returns a `PatchReport`: iterate over its records, or print it. What is not covered is left as
    it was and is in the report with the reason. Patching twice changes nothing, and reports what is
    true then: a part that another library has changed since (LoRA, pruning, hooks, offloading)
    makes the module around it run Hugging Face's forward, call by call. The outputs follow
    Hugging Face's mathematics (docs/models.md lists where they differ from the operators' own
    contracts). `unpatch` undoes it.

    Errors: TypeError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is a {type(model).__name__}; expected a torch.nn.Module")
    from .experts import patch_experts
    from .linear import look, patch_linear

    look()
    records: dict[str, Record] = {}
    swaps: list[tuple[str, nn.Module, Replacement]] = []
    families: dict[str, Family] = {}
    passed: set[str] = set()
    for path, module in model.named_modules():
        family = family_of(module)
        if family is not None and family.base is not None:
            families[family.base.__module__] = family
        name = type(module).__name__
        found = _find(family, module)
        if found is not None:
            reason = _refuse(found, module)
            if reason is None:
                swaps.append((path, module, found))
            records[path] = found.record(path, module, reason)
            passed |= {f"{path}.{part}" for part in found.passes_over(module)}
        elif path not in passed:
            outcome = patch_experts(module)
            product = patch_linear(module)
            if outcome is not None:
                records[path] = Record(path, name, *outcome)
            elif product is not None:
                records[path] = Record(path, name, operators=product)
            elif _OF_INTEREST.search(name) and not _belongs(path, records):
                records[path] = Record(path, name, reason=_not_for(module))
    _name_strangers(model, swaps, records)
    for family in families.values():
        _withdraw(model, family, records, swaps)
    for _, module, found in swaps:
        if PARTS not in vars(module):
            remember(module, found.passes_over(module))
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
        if PARTS in vars(module):
            module.__class__ = _given_back(type(module))
            forget(module)
        unpatch_experts(module)
        unpatch_linear(module)
        _unhook(module)


def _given_back(kind: Any) -> type[nn.Module]:
    """The class that a replaced module had, also where another library has since derived one of the
    replacement's (fully_shard does): that one, derived of the original."""
    for base in kind.__mro__:
        original: Any = vars(base).get(ORIGINAL)
        if original is not None:
            found: type[nn.Module] = original if base is kind else _derived(kind, base, original)
            return found
    raise AssertionError(f"{kind.__name__} stands in for no other class")


@functools.cache
def _derived(kind: Any, replacement: Any, original: Any) -> Any:
    bases = tuple(
        original
        if b is replacement
        else _derived(b, replacement, original)
        if issubclass(b, replacement)
        else b
        for b in kind.__bases__
    )
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, own)


def family_of(module: nn.Module) -> Family | None:
    """The family whose classes this module's class is one of, or None."""
    kind: Any = type(module)
    return _family_of_class(kind)


@functools.cache
def _family_of_class(kind: Any) -> Family | None:
    found = (_family(vars(base).get(ORIGINAL, base).__module__) for base in kind.__mro__)
    return next((family for family in found if family is not None), None)


@functools.cache
def _family(home: str) -> Family | None:
    name = home.rpartition(".modeling_")[2]
    if name not in _FAMILIES or not home.startswith("transformers.models."):
        return None
    found: Family = importlib.import_module(f"{__package__}.{name}").FAMILY
    return found


def _find(family: Family | None, module: nn.Module) -> Replacement | None:
    for r in () if family is None else family.replacements:
        if type(module) is r.original or (
            PARTS in vars(module) and isinstance(module, r.replacement)
        ):
            return r
    return None


def _refuse(found: Replacement, module: nn.Module) -> str | None:
    """Why this module can't be replaced, or None."""
    if PARTS in vars(module):
        return touched(module)
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
    reason = found.refuse(module)
    if reason is not None:
        return reason
    for path in found.passes_over(module):
        part = module.get_submodule(path)
        if (reason := altered(part, type(part))) is not None:
            return f"its {path} {reason}"
    return None


def _withdraw(
    model: nn.Module,
    family: Family,
    records: dict[str, Record],
    swaps: list[tuple[str, nn.Module, Replacement]],
) -> None:
    """Takes back attention modules that no base model tells about padding, or that can't mix."""
    name = family.attention.__name__
    base: Any = family.base
    bases = [path for path, module in model.named_modules() if isinstance(module, base)]
    own = {path for path, module in model.named_modules() if isinstance(module, family.attention)}
    refused = [r for r in records.values() if r.path in own and r.reason is not None]
    for swap in list(swaps):
        path, module, found = swap
        if found.original is not family.attention:
            continue
        if not any(_inside(path, outer) for outer in bases):
            reason = (
                f"it stands outside a {base.__name__}, whose forward knows the padding; "
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


def _name_strangers(
    model: nn.Module, swaps: list[tuple[str, nn.Module, Replacement]], records: dict[str, Record]
) -> None:
    """Reports the children of replaced modules that are of no class that transformers or torch
    has: they run as they are."""
    for path, module, _ in swaps:
        for name, child in module.named_children():
            home, where = type(child).__module__, f"{path}.{name}"
            if not home.startswith(("transformers.", "torch.", f"{__package__}.")):
                reason = f"a class of {home}, which transom does not know; it runs as it is"
                records.setdefault(where, Record(where, type(child).__name__, reason=reason))


def _hook(model: nn.Module, family: Family) -> None:
    """Lets the base models tell their replaced attention modules about padding."""
    kind: Any = family.base
    for base in model.modules():
        if isinstance(base, kind):
            _unhook(base)
            if any(PARTS in vars(m) for _, m in family.attentions(base)):
                layers = tuple(i for i, _ in family.attentions(base))
                vars(base)[_ANNOUNCES] = _Announces(
                    layers,
                    family.mixes,
                    family.masks,
                    family.recurrent,
                    family.uncovered,
                    cache_layers(base.config),
                )
                base.register_forward_pre_hook(announce, with_kwargs=True)


def _unhook(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is announce:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            del vars(module)[_ANNOUNCES]


_ANNOUNCES = "_transom_announces"


@dataclass(frozen=True)
class _Announces:
    """Set on a hooked base model, since a traced call can look nothing up."""

    layers: tuple[int, ...]
    """Those with attention of the family's class."""
    mixes: bool
    masks: tuple[str, ...]
    recurrent: tuple[str, ...]
    uncovered: Callable[[Slots], str | None]
    cache: tuple[type, ...]


_FORWARD = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
)


def announce(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a base model: hands Slots to its attention modules, and spares the dense
    mask where all of them run through the operators in this call."""
    given = {**dict(zip(_FORWARD, args)), **kwargs}
    what: _Announces = module.__dict__[_ANNOUNCES]
    slots = read_slots(module, given, what.cache)
    if isinstance(slots, Slots) and (reason := what.uncovered(slots)) is not None:
        slots = Uncovered(reason)
    given[SLOTS] = slots
    if isinstance(slots, Slots):
        layers: Any = module.layers
        attentions = [layers[i].self_attn for i in what.layers]
        found = [touched(m) if PARTS in m.__dict__ else "" for m in attentions]
        if all(reason is None for reason in found):
            # A dictionary of masks is taken as it is: one for every kind of layer.
            masks: dict[str, Any] = dict.fromkeys(what.masks)
            given["attention_mask"] = {**masks, **dict.fromkeys(what.recurrent, slots.own())}
        elif what.mixes:
            given[SLOTS] = replace(slots, masked=True)
        else:
            given[SLOTS] = Uncovered(next((r for r in found if r), "a layer was not replaced"))
    return (), given


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}." if outer else "")


def _belongs(path: str, records: dict[str, Record]) -> bool:
    """True for what stands inside an attention, router or experts module of the report, of whose
    record it is a part."""
    outer = (r for r in records.values() if _OF_INTEREST.search(r.module))
    return any(_inside(path, r.path) for r in outer)


def _not_for(module: nn.Module) -> str:
    name = type(module).__name__
    for kind in type(module).__mro__[1:]:
        family = _family(kind.__module__)
        if family is not None and any(r.original is kind for r in family.replacements):
            return f"its class is a subclass of {kind.__name__}; covered: exactly that class"
    if hasattr(module, "conv1d") and name.endswith(("Attention", "DeltaNet")):
        return "linear attention of a family that transom has no replacement for yet"
    if name.endswith("Attention"):
        if any("Indexer" in type(part).__name__ for part in module.modules()):
            return "sparse attention of a family that transom has no replacement for yet"
        return "dense attention; transom's attention operators are for sparse ones"
    if name.endswith("Experts"):
        return "its class does not use transformers' experts registry; nothing to plug into"
    return "no registry reaches it and transom has no replacement for this class"
