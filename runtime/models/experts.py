"""Experts through transformers' experts registry: one function for every class that uses it.

The registry hands over the module; how its weights lie is in its attributes (`has_bias`,
`is_transposed`), but what its gate computes is code. So the gate is tried on numbers: `patch` looks
for the activation, limit and layout of `transom.moe_experts` that reproduce `_apply_gate`, and a
module whose gate none of them reproduces is left alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import transom

IMPLEMENTATION = "transom"
"""The name under which the function stands in transformers' experts registry."""

# Set on a patched module: its original configuration, and what its gate was found to compute.
_ORIGINAL = "_transom_original_config"
_GATE = "_transom_gate"

_HALF = 8
_CLOSE = 1e-5


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


def patch_experts(module: nn.Module) -> tuple[str | None, str | None] | None:
    """Plugs in one experts module: (operators, None) or (None, reason); None for other modules."""
    if not all(
        hasattr(module, a) for a in ("has_gate", "has_bias", "is_transposed", "config", "down_proj")
    ):
        return None
    done: Gate | None = getattr(module, _GATE, None)
    if done is not None:
        return f"moe_experts ({done})", None
    reason = _refuse(module)
    if reason is not None:
        return None, reason
    found = find_gate(module)
    if isinstance(found, str):
        return None, found
    _register()
    original: Any = module.config
    # The configuration object may be shared with models that nobody asked to patch: this module
    # gets one of its own.
    own = copy.copy(original)
    own._experts_implementation_internal = IMPLEMENTATION
    module.config = own
    setattr(module, _ORIGINAL, original)
    setattr(module, _GATE, found)
    return f"moe_experts ({found})", None


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
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(m, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3:
            return f"{name} is not a 3-D tensor; the registry's layout is [experts, rows, columns]"
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            return f"{name} is {weight.dtype}; quantised layouts of transformers are not read yet"
    return None


def find_gate(module: nn.Module) -> Gate | str:
    """The `Gate` that equals `_apply_gate` on numbers beyond every limit, or the reason why not."""
    m: Any = module
    limits = [None, *_numbers(module, "limit")]
    alphas = [None, *_numbers(module, "alpha")]
    # Half of the numbers where activations differ in shape, half where every limit shows.
    top = 3.0 * max([4.0, *(v for v in limits if v is not None)])
    source = torch.Generator().manual_seed(0)
    x = torch.rand(64, 2 * _HALF, generator=source) * 2 - 1
    x = x * torch.tensor([4.0, top]).repeat(32)[:, None]
    try:
        with torch.no_grad():
            expected = m._apply_gate(x)
    except (
        Exception
    ) as error:  # the gate is anyone's code; whatever it raises, the module stays as it is
        return f"its gate can't be tried on plain numbers ({type(error).__name__}: {error})"
    if not isinstance(expected, Tensor) or expected.shape != (64, _HALF):
        return "its gate does not give one number for a pair; moe_experts computes act(gate) * up"
    for interleaved in (not m.is_concatenated, m.is_concatenated):
        for limit in limits:
            names = [("swiglu_oai", a) for a in alphas] + [(n, None) for n in _ACTIVATIONS]
            for activation, alpha in names:
                gate = Gate(activation, limit, alpha, interleaved)
                if torch.allclose(gate.apply(x), expected, rtol=_CLOSE, atol=_CLOSE):
                    return gate
    act = type(getattr(m, "act_fn", None)).__name__
    return (
        f"its gate (act_fn {act}) is none of silu, gelu, gelu_tanh, relu, swiglu_oai, "
        "with or without a limit"
    )


def _numbers(module: nn.Module, word: str) -> list[float]:
    """The numbers among the module's attributes whose name holds `word`."""
    return [
        float(v)
        for name, v in vars(module).items()
        if re.search(word, name) and isinstance(v, (int, float)) and not isinstance(v, bool)
    ]


def _register() -> None:
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, transom_experts)


def transom_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """y[t] = sum over slots k of weights[t, k] * expert[ids[t, k]](x[t]); the registry's contract.

    hidden_states [T, D]; top_k_index [T, K], ids beyond the module's experts (the expert-parallel
    mark for "elsewhere") count as none; top_k_weights [T, K]. Returns [T, D] in the dtype of
    hidden_states.
    """
    gate: Gate = getattr(self, _GATE)
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
    _register()
except ImportError:
    pass
