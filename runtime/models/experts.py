"""Experts through transformers' experts registry: one function for every class that uses it.

The registry hands over the module; how its weights lie is in its attributes (`has_bias`,
`is_transposed`), but what its gate computes is code. So the gate is run on numbers, and watched: it
may be made of nothing but its input and plain numbers, and `patch` looks for the activation, limit
and layout of `transom.moe_experts` that reproduce it far beyond every number that it uses. A module
whose gate reads a tensor, draws at random, or is reproduced by none of them is left alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import transom
from transom.errors import shown
from transom.nn.untouched import altered

from .untouched import say

IMPLEMENTATION = "transom"
"""The name under which the function stands in transformers' experts registry."""

# Set on a patched module: its original configuration, and what its gate was found to compute.
_ORIGINAL = "_transom_original_config"
_GATE = "_transom_gate"

_HALF = 8
_CLOSE = 1e-5
_LARGEST = 1e30
"""Numbers of a gate from which on a limit is none: a bound that is there in name only."""


@dataclass(frozen=True)
class Gate:
    """The arguments of `moe_experts` that reproduce a module's `_apply_gate`."""

    activation: str
    limit: float | None
    alpha: float | None
    interleaved: bool

    def apply(self, x: Tensor) -> Tensor:
        """act(gate) * up of x[..., 2 I], for comparison with the module's own."""
        if self.interleaved:
            gate, up = x[..., 0::2], x[..., 1::2]
        else:
            gate, up = x.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.activation == "swiglu_oai":
            return (
                (up + 1)
                * gate
                * torch.sigmoid((1.702 if self.alpha is None else self.alpha) * gate)
            )
        return _ACTIVATIONS[self.activation](gate) * up

    def __str__(self) -> str:
        extra = [] if self.limit is None else [f"limit {self.limit:g}"]
        if self.alpha is not None:
            extra.append(f"alpha {self.alpha:g}")
        if self.interleaved:
            extra.append("interleaved")
        return ", ".join([self.activation, *extra])


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


class _Reads:
    """Stands in for a module while its gate runs: passes every attribute on, and notes it; so do
    the module's own methods that the gate calls."""

    def __init__(self, module: nn.Module) -> None:
        self.__dict__.update(_module=module, _found={})

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if inspect.ismethod(value) and value.__self__ is self._module:
            self._found[name] = value.__func__
            return functools.partial(value.__func__, self)
        self._found[name] = value
        return value


Settings: TypeAlias = tuple[tuple[str, Any], ...]
"""(name, value) of attributes."""


@dataclass(frozen=True)
class _Found:
    """What was found out of a module's gate, and what it stands on: the code, the modules that it
    calls, and the settings that it reads."""

    gate: Gate
    code: Any
    parts: tuple[tuple[str, type[nn.Module], Settings], ...] = ()
    settings: Settings = ()

    def changed(self, module: nn.Module) -> str | None:
        """Why the gate may be another one by now, or None."""
        if _code(module) is not self.code:
            return "its gate was replaced"
        for name, kind, own in self.parts:
            part = module._modules.get(name)
            if part is None:
                return f"its {name} is gone"
            if (reason := altered(part, kind) or _other(part, own)) is not None:
                return f"its {name} {reason}"
        reason = _other(module, self.settings)
        return None if reason is None else f"it {reason}"


def _other(module: nn.Module, settings: Settings) -> str | None:
    """Which of these attributes is another one by now, or None."""
    for name, value in settings:
        now = getattr(module, name, None)
        now = getattr(now, "__func__", now)
        if now is not value and now != value:
            return f"has a {name} that is {shown(now)}; it was {shown(value)} when patched"
    return None


def _settings(part: nn.Module) -> Settings:
    """The plain attributes of a module, by which two of one class differ."""
    return tuple(
        (name, value)
        for name, value in vars(part).items()
        if not name.startswith("_")
        and name != "training"
        and (isinstance(value, (int, float, str, type(None))) or callable(value))
    )


def _code(module: nn.Module) -> Any:
    """The gate's function, of the instance or of the class."""
    own: dict[str, Any] = vars(module)
    return own.get("_apply_gate", getattr(type(module), "_apply_gate", None))


def patch_experts(module: nn.Module) -> tuple[str | None, str | None] | None:
    """Plugs in one experts module: (operators, None) or (None, reason); None for other modules."""
    if not all(
        hasattr(module, a) for a in ("has_gate", "has_bias", "is_transposed", "config", "down_proj")
    ):
        return None
    done: _Found | None = vars(module).get(_GATE)
    if done is not None:
        reason = done.changed(module)
        return (f"moe_experts ({done.gate})", None) if reason is None else (None, reason)
    reason = _refuse(module)
    if reason is not None:
        return None, reason
    found = find_gate(module)
    if isinstance(found, str):
        return None, found
    original: Any = module.config
    # The configuration object may be shared with models that nobody asked to patch: this module
    # gets one of its own.
    own = copy.copy(original)
    own._experts_implementation_internal = IMPLEMENTATION
    module.config = own
    setattr(module, _ORIGINAL, original)
    setattr(module, _GATE, found)
    return f"moe_experts ({found.gate})", None


def unpatch_experts(module: nn.Module) -> None:
    """Gives a module that `patch_experts` plugged in its configuration back; leaves others."""
    if _ORIGINAL in vars(module):
        module.config = getattr(module, _ORIGINAL)
        delattr(module, _ORIGINAL)
        delattr(module, _GATE)


def _refuse(module: nn.Module) -> str | None:
    m: Any = module
    if not m.has_gate:
        return "experts without a gate (has_gate=False); moe_experts computes act(gate) * up"
    if m.has_post_expert_norm:
        return "experts with a norm each (has_post_expert_norm=True); moe_experts has none"
    registry, _ = _registry_of(type(module))
    if registry is None:
        return "its class does not go through transformers' experts registry"
    if IMPLEMENTATION not in registry:
        type(registry).register(IMPLEMENTATION, transom_experts)
    if IMPLEMENTATION not in registry:
        return f"its class goes through a registry of its own ({type(registry).__name__})"
    return _refuse_weights(m)


def _refuse_weights(module: Any) -> str | None:
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3:
            return f"{name} is not a 3-D tensor; the registry's layout is [experts, rows, columns]"
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            return f"{name} is {weight.dtype}; quantised layouts of transformers are not read yet"
    return None


def _registry_of(kind: type[nn.Module]) -> tuple[Any, Callable[..., Tensor]]:
    """The registry that the class's forward asks, and the forward that it has without one; None if
    it asks none."""
    inner = inspect.getclosurevars(inspect.unwrap(kind.forward, stop=_asks)).nonlocals
    return inner.get("experts_interface"), inner.get("original_forward", kind.forward)


def _asks(forward: Any) -> bool:
    return "experts_interface" in getattr(forward, "__code__", _asks.__code__).co_freevars


class _Watch(TorchDispatchMode):
    """Within it a gate runs: the numbers that it uses, and what it uses beside them."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = [x]
        self.numbers: set[float] = set()
        self.fault: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        for value in given:
            if isinstance(value, Tensor) and not any(value is known for known in self._known):
                self.fault = "reads a tensor beside its input"
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                self.numbers.add(abs(float(value)))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.fault = "draws at random (dropout)"
        if func is torch.ops.aten._local_scalar_dense.default:
            self.fault = "branches on the numbers that it is given"
        self._known += [v for v in (made if isinstance(made, (list, tuple)) else [made])]
        return made


@contextmanager
def _training(module: nn.Module, mode: bool) -> Iterator[None]:
    """Within the block the module is in this mode; hooks and parts are not told."""
    before = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in before:
            m.training = mode
        yield
    finally:
        for m, was in before:
            m.training = was


def _run(module: nn.Module, x: Tensor) -> tuple[Tensor, set[float], dict[str, Any]] | str:
    """What the gate makes of x, the numbers that it used, and the attributes that it read; or the
    reason why it is not known."""
    reads, gate = _Reads(module), cast(Any, module)._apply_gate
    try:
        with torch.no_grad(), _Watch(x) as watch:
            made = gate.__func__(reads, x) if inspect.ismethod(gate) else gate(x)
    except Exception as error:  # the gate is anyone's code; whatever it raises, nothing changes
        return f"its gate can't be tried on plain numbers ({type(error).__name__}: {error})"
    if watch.fault is not None:
        return f"its gate {watch.fault}; moe_experts computes act(gate) * up"
    if not isinstance(made, Tensor) or made.shape != (x.shape[0], _HALF):
        return "its gate does not give one number for a pair; moe_experts computes act(gate) * up"
    if (name := next((n for n, v in reads._found.items() if _is_foreign(v)), None)) is not None:
        return f"its gate reads {name}, whose values may change; moe_experts takes plain numbers"
    return made, watch.numbers, reads._found


def _is_foreign(value: Any) -> bool:
    plain = isinstance(value, (int, float, str, type(None), nn.Module))
    return not plain and not callable(value)


def find_gate(module: nn.Module) -> _Found | str:
    """The `Gate` that equals `_apply_gate` beyond every number that it uses, in training and in
    evaluation, and what it stands on; or the reason why not."""
    m: Any = module
    source = torch.Generator(device="cpu").manual_seed(0)
    x = torch.rand(64, 2 * _HALF, generator=source, device="cpu", dtype=torch.float32) * 2 - 1
    tried = _run(module, x)
    if isinstance(tried, str):
        return tried
    numbers = sorted(n for n in tried[1] if 0 < n < _LARGEST)
    # Rows where activations differ in shape, and rows where every limit shows.
    top = 3.0 * max([4.0, *numbers])
    scale = torch.tensor([4.0, top], device="cpu", dtype=torch.float32)
    x = x * scale.repeat(32)[:, None]
    gates: list[Gate] = []
    for mode in (True, False):
        with _training(module, mode):
            tried = _run(module, x)
        if isinstance(tried, str):
            return tried
        found = _reproduced(x, tried[0], numbers, m.is_concatenated)
        if found is None:
            act = type(getattr(m, "act_fn", None)).__name__
            return (
                f"its gate (act_fn {act}) is none of silu, gelu, gelu_tanh, relu, swiglu_oai, "
                "with or without a limit"
            )
        gates.append(found)
    if gates[0] != gates[1]:
        return f"its gate is {gates[0]} in training and {gates[1]} in evaluation"
    reads = tried[2]
    return _Found(
        gates[0],
        _code(module),
        tuple((n, type(v), _settings(v)) for n, v in reads.items() if isinstance(v, nn.Module)),
        tuple((n, v) for n, v in reads.items() if not isinstance(v, nn.Module) and n != "training"),
    )


def _reproduced(
    x: Tensor, expected: Tensor, numbers: list[float], concatenated: bool
) -> Gate | None:
    limits = [None, *numbers]
    kinds: list[tuple[str, float | None]] = [("swiglu_oai", a) for a in (None, *numbers)]
    kinds += [(name, None) for name in _ACTIVATIONS]
    for interleaved in (not concatenated, concatenated):
        for limit in limits:
            for activation, alpha in kinds:
                gate = Gate(activation, limit, alpha, interleaved)
                if torch.allclose(gate.apply(x), expected, rtol=_CLOSE, atol=_CLOSE):
                    return gate
    return None


def transom_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """y[t] = sum over slots k of weights[t, k] * expert[ids[t, k]](x[t]); the registry's contract.

    hidden_states [T, D]; top_k_index [T, K], ids beyond the module's experts (the expert-parallel
    mark for "elsewhere") count as none; top_k_weights [T, K]. Returns [T, D] in the dtype of
    hidden_states.
    """
    found: _Found = getattr(self, _GATE)
    reason = found.changed(self) or _refuse_weights(self)
    if reason is not None:
        say(type(self).__name__, reason)
        registry, plain = _registry_of(type(self))
        asked = getattr(self, _ORIGINAL)._experts_implementation
        y = registry.get_interface(asked, plain)(self, hidden_states, top_k_index, top_k_weights)
        return y
    gate = found.gate
    gate_up, down = self.gate_up_proj, self.down_proj
    if self.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    ids = top_k_index
    if self._is_expert_parallel:
        ids = torch.where(ids >= self.num_experts, -1, ids)
    more = {} if gate.alpha is None else {"alpha": gate.alpha}
    y = transom.moe_experts(
        hidden_states.to(gate_up.dtype),
        ids,
        top_k_weights,
        gate_up,
        down,
        activation=gate.activation,
        limit=gate.limit,
        interleaved=gate.interleaved,
        gate_up_bias=self.gate_up_proj_bias if self.has_bias else None,
        down_bias=self.down_proj_bias if self.has_bias else None,
        weight_position="after",
        **more,
    )
    return y.to(hidden_states.dtype)


try:  # a pickled model comes back to a process in which nothing was patched yet
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, transom_experts)
except ImportError:
    pass
