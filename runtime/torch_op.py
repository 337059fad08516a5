"""Operators as torch operators: the only module that touches torch.library.

Each Op becomes `torch.ops.transom.<name>`: one kernel under CompositeExplicitAutograd, which every
device reaches and which goes to our selection; a fake kernel from the declared shapes and dtypes;
autograd that calls backward operators; vmap over the declared batch dim; autocast. Its schema is
flat and positional: a weight is four arguments (values, scales, zeros, spec). Eager inference on
ordinary tensors skips all of it (dispatch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import NotSupported
from .op import Op
from .parameters import Parameter
from .registry import OPS
from .weights import logical_shape, weight_from

LIBRARY = torch.library.Library("transom", "DEF")
_AUTOCAST_KEYS = (
    "AutocastCPU",
    "AutocastCUDA",
    "AutocastXPU",
    "AutocastMPS",
    "AutocastPrivateUse1",
)

_compiling = torch.compiler.is_compiling
_functorch_level = torch._C._functorch.peek_interpreter_stack


def define(op: Op[..., Any]) -> Any:
    """Register `op` with torch and return its overload."""
    schema = f"{op.name}({', '.join(_schema(op, p) for p in op.parameters)}) -> {_returns(op)}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = f"transom::{op.name}"

    def kernel(*flat: Any) -> Any:
        wants = any(isinstance(v, Tensor) and v.requires_grad for v in flat)
        return op.engine.run(op.unflatten(*flat), wants)

    def fake(*flat: Any) -> Any:
        return _fake(op, flat)

    LIBRARY.impl(op.name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    overload = getattr(torch.ops.transom, op.name).default
    if not op.mutates:
        LIBRARY.impl(op.name, _autograd(op, overload), "Autograd", with_keyset=True)
        torch.library.register_vmap(name, _vmap(op), lib=LIBRARY)
    for key in _AUTOCAST_KEYS:
        LIBRARY.impl(op.name, _autocast(op, overload, key), key)
    return overload


class Asking(TorchDispatchMode):
    """Within it calls of our operators compute nothing: the first one's arguments are kept, and
    outputs are tensors without memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: tuple[Op[..., Any], tuple[Any, ...]] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        op = OPS.get(name) if namespace == "transom" else None
        if op is None:
            return func(*args, **(kwargs or {}))
        if self.asked is None:
            self.asked = op, op.unflatten(*args)
        return _fake(op, args, torch.device("meta"))


def _schema(op: Op[..., Any], p: Parameter) -> str:
    if p.role == "weight":
        return (
            f"{p.type} {p.name}, Tensor? {p.name}_scales, Tensor? {p.name}_zeros, str {p.name}_spec"
        )
    if p.name in op.mutates:
        return f"Tensor({chr(97 + op.mutates.index(p.name))}!) {p.name}"
    # SymInt: a number that varies between calls (a position) becomes symbolic instead of a
    # recompile each
    return f"{p.type.replace('int', 'SymInt') if p.type in ('int', 'int?') else p.type} {p.name}"


def _returns(op: Op[..., Any]) -> str:
    n = len(op.signature.outputs)
    return "()" if op.mutates else "Tensor" if n == 1 else f"({', '.join(['Tensor'] * n)})"


def _slots(op: Op[..., Any]) -> list[tuple[Parameter, int]]:
    """Each parameter with its place among the flat arguments; a weight takes four."""
    out, at = [], 0
    for p in op.parameters:
        out.append((p, at))
        at += 4 if p.role == "weight" else 1
    return out


def _fake(op: Op[..., Any], flat: Sequence[Any], on: torch.device | None = None) -> Any:
    shapes, kinds, arguments, devices = {}, {}, {}, {}
    for p, at in _slots(op):
        value = flat[at]
        if p.role == "value":
            arguments[p.name] = value
        elif value is not None:
            spec = flat[at + 3] if p.role == "weight" else ""
            shapes[p.name] = logical_shape(value.shape, spec) if spec else value.shape
            kinds[p.name] = spec.partition(":")[0] if spec else value.dtype
            devices[p.name] = value.device
    bound = op.validate(shapes, kinds, arguments)
    op.check_devices(devices)
    if op.mutates:
        return None
    device = on or next(iter(devices.values()))
    outputs = [
        torch.empty(s, dtype=d, device=device) for s, d in op.outputs({**arguments, **bound}, kinds)
    ]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# Autograd --------------------------------------------------------------------------------------


class Saved:
    """What a gradient function sees: the inputs and outputs it asked for, plain arguments, and
    needs(name)."""

    def __init__(self, values: dict[str, Any], needed: frozenset[str]) -> None:
        self.__dict__.update(values)
        self._needed = needed

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} was not saved; name it in gradient(save=...)")

    def needs(self, name: str) -> bool:
        """True if the gradient of input `name` is wanted."""
        return name in self._needed


def transformed(op: Op[..., Any]) -> bool:
    """True within torch.func.grad, vmap, ...: there the call must enter as an autograd.Function
    from the outside."""
    return _functorch_level() is not None and not op.mutates and not _compiling()


def apply_transformed(op: Op[..., Any], flat: tuple[Any, ...]) -> Any:
    """A call within torch.func transforms."""
    return _Transformable.apply(op, *flat)  # type: ignore[no-untyped-call]


def _autograd(op: Op[..., Any], overload: Any) -> Callable[..., Any]:
    """The Autograd kernel: what torch.library.register_autograd makes, with one Function class for
    all operators."""

    def kernel(keyset: Any, *flat: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return _Differentiable.apply(op, overload, keyset, *flat)  # type: ignore[no-untyped-call]
        return _below(overload, keyset, flat)

    return kernel


def _below(overload: Any, keyset: Any, flat: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *flat)


class _Differentiable(torch.autograd.Function):
    """(op, overload, keyset, *flat): an operator and its declared gradient."""

    @staticmethod
    def forward(ctx: Any, op: Op[..., Any], overload: Any, keyset: Any, *flat: Any) -> Any:
        output = _below(overload, keyset, flat)
        _save(ctx, op, flat, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (None, None, None, *_gradients(ctx, grads, ctx.needs_input_grad[3:]))


class _Transformable(torch.autograd.Function):
    """(op, *flat): the same for torch.func, whose transforms peel off one by one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Op[..., Any], *flat: Any) -> Any:
        return op.engine.torch_op(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs[0], inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (None, *_gradients(ctx, grads, ctx.needs_input_grad[1:]))


def _save(ctx: Any, op: Op[..., Any], flat: Sequence[Any], output: Any) -> None:
    ctx.op, ctx.plain, ctx.places = op, {}, []
    if op.differentiated is None:
        return
    named = dict(
        zip(op.signature.outputs, output if isinstance(output, tuple) else (output,), strict=True)
    )
    tensors: list[Tensor | None] = []
    for p, at in _slots(op):
        if p.role == "value":
            ctx.plain[p.name] = flat[at]
        elif p.name in op.differentiated.save:
            width = 3 if p.role == "weight" else 1
            ctx.places.append((p.name, width, flat[at + 3] if width == 3 else ""))
            tensors += flat[at : at + width]
    for name in op.differentiated.save:
        if name in named:
            ctx.places.append((name, 1, ""))
            tensors.append(named[name])
    ctx.save_for_backward(*tensors)


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of every flat argument, by the operator's gradient function."""
    op, gradient = ctx.op, ctx.op.differentiated
    if gradient is None:
        raise NotSupported(f"{op.name}: a gradient through it was asked for; it has none")
    values, saved, at = dict(ctx.plain), ctx.saved_tensors, 0
    for name, width, spec in ctx.places:
        if spec:
            stored, scales, zeros = saved[at : at + 3]
            values[name] = weight_from(stored, scales, zeros, spec)
        else:
            values[name] = saved[at]
        at += width
    slots = _slots(op)
    needed = frozenset(p.name for p, i in slots if wanted[i])
    found = gradient.function(Saved(values, needed), *grads)
    out: list[Tensor | None] = []
    for p, _ in slots:
        out.append(found.get(p.name) if p.name in needed else None)
        out += [None, None, None] if p.role == "weight" else []
    return out


# vmap ------------------------------------------------------------------------------------------


def _vmap(op: Op[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        batch = op.batch
        inputs, outputs = op.signature.inputs, op.signature.outputs
        leads = {
            n: bool(s.dims) and s.dims[0] == batch for n, s in (*inputs.items(), *outputs.items())
        }
        size = info.batch_size
        args = list(flat)
        for p, at in _slots(op):
            if p.role == "value" or flat[at] is None:
                continue
            if not leads[p.name]:
                if in_dims[at] is not None:
                    what = (
                        f"it is shared by the batch dim {batch}"
                        if batch
                        else "the operator has no batch dim"
                    )
                    raise NotSupported(
                        f"{op.name}: vmap over {p.name}; {what}; loop over it instead"
                    )
                continue
            value = flat[at]
            value = (
                value.expand(size, *value.shape)
                if in_dims[at] is None
                else value.movedim(in_dims[at], 0)
            )
            args[at] = value if batch and batch.startswith("*") else value.flatten(0, 1)
        alone = [n for n in outputs if not leads[n]]
        if alone:
            raise NotSupported(
                f"{op.name}: vmap; output {alone[0]} sums over the batch dim; loop over it instead"
            )
        results = op.engine.torch_op(*args)
        several = isinstance(results, tuple)
        unfolded = tuple(
            r
            if batch and batch.startswith("*")
            else r.unflatten(0, (size, -1))
            if r.numel()
            else r.reshape(size, r.shape[0] // size, *r.shape[1:])
            for r in (results if several else (results,))
        )
        return (unfolded, (0,) * len(unfolded)) if several else (unfolded[0], 0)

    return rule


# Autocast --------------------------------------------------------------------------------------


def _autocast(op: Op[..., Any], overload: Any, key: str) -> Callable[..., Any]:
    """Casts what the declaration names, and keeps autocast out of the implementations: one that
    calls torch.mm on float32 tiles must get float32."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*flat: Any) -> Any:
        args = list(flat)
        device = next(v.device.type for v in flat if isinstance(v, Tensor))
        low = torch.get_autocast_dtype(device)
        for p, at in _slots(op):
            mode, value = op.autocast.get(p.name), flat[at]
            if (
                mode
                and value is not None
                and value.dtype.is_floating_point
                and value.dtype != torch.float64
            ):
                if not (p.role == "weight" and flat[at + 3]):
                    args[at] = value.to(low if mode == "low" else torch.float32)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*args)

    return kernel
