"""What one call must show; each check answers None or a sentence, so that the meta-tests can feed
it wrong kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import transom
from transom import selection
from transom.op import Impl, Op, as_numpy, kind_of
from transom.plugins import load
from transom.tolerance import CAP, as_tuple, compare, terms_of

from . import agree
from .agree import same_bits
from .cases import Case, rebuild

STEP = 1e-6
"""Of the central differences, taken in float64: truncation 1e-12, rounding 1e-10."""
GRADIENT = 10 * CAP
"""Of a float32 gradient along a direction, relative: a backward operator sums what it and its
forward one have summed."""
NOTHING = "nothing to ask: "
"""How an answer begins that is no fault: the question has no meaning for the implementation."""


def run(op: Op[..., Any], impl: str, values: Sequence[Any]) -> tuple[Any, ...] | str:
    """The outputs of `impl`, or a sentence if another implementation ran."""
    with transom.use(**{op.name: impl}), transom.record() as calls:
        out = op.call(**dict(zip((p.name for p in op.parameters), values, strict=True)))
    mine = [c for c in calls if c.op == op.name]
    if not mine or any(c.impl != impl for c in mine):
        return f"{impl} was asked for; {[c.impl for c in mine] or 'nothing'} ran"
    if op.mutates:
        return tuple(v for p, v in zip(op.parameters, values, strict=True) if p.name in op.mutates)
    return as_tuple(out)


def refuses(op: Op[..., Any], impl: str, case: Case) -> list[str]:
    """The implementation's reasons against this call; empty if it accepts."""
    facts = transom.dispatch.facts_of(op, case.values)
    load(op, facts.device)
    return selection.reasons(op.impls[impl], facts)


def requirements(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """What it accepts runs; what it refuses has non-empty sentences, the same ones twice, and
    asking for it raises them."""
    reasons = refuses(op, impl, case)
    if not reasons:
        ran = run(op, impl, case.values)
        return ran if isinstance(ran, str) else None
    if any(not r.strip() or "\n" in r for r in reasons):
        return f"a reason is empty or longer than a line: {reasons}"
    if reasons != refuses(op, impl, case):
        return "its reasons differ between two equal calls"
    try:
        run(op, impl, case.values)
    except transom.NotSupported as error:
        return (
            None
            if reasons[0] in str(error)
            else f"it raised {error}; expected its reason {reasons[0]!r}"
        )
    return "it ran a call that it refuses"


def stands(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """What it refuses has a sentence, and what it accepts is right."""
    question = requirements if refuses(op, impl, case) else numbers
    return question(op, impl, case)


def numbers(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """Outputs agree with the float64 reference: shape, dtype, contiguity, values; guards and inputs
    are intact."""
    before = agree.as_given(case)
    got = run(op, impl, case.values)
    if isinstance(got, str):
        return got
    if (changed := case.intact()) is not None:
        return changed
    return agree.with_reference(case, before, got)


def repeatable(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """Two equal calls give the same bits."""
    if not op.impls[impl].deterministic:
        return f"{NOTHING}it is not declared deterministic"
    first = run(op, impl, case.values)
    if isinstance(first, str):
        return first
    first = tuple(t.clone() for t in first)
    second = run(op, impl, case.values)
    for name, a, b in zip(op.mutates or tuple(op.signature.outputs), first, second, strict=True):
        if isinstance(b, str) or not same_bits(a, b):
            return f"{name} differs between two equal calls"
    return None


def unbiased(op: Op[..., Any], impl: str, cases: Sequence[Case]) -> str | None:
    """Over many results the mean rounding error is near zero: truncation instead of rounding shows
    here."""
    assert op.reference_of is not None
    for case in cases:
        got = run(op, impl, case.values)
        if isinstance(got, str):
            return got
        want = as_tuple(op.reference_of(*(as_numpy(v) for v in case.values)))
        for name, g, w in zip(op.mutates or op.signature.outputs, got, want, strict=True):
            if g.dtype in (torch.bfloat16, torch.float16):
                mean = agree.bias(g, np.asarray(w))
                if mean is not None and abs(mean) > 0.1:
                    return f"{name} is off by {mean:+.2f} units in the last place on average"
    return None


def rounds(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """Over the results of three calls like this one the mean rounding error is near zero."""
    more = [rebuild(op.name, **{**case.draws, "seed": case.draws["seed"] + i}) for i in range(3)]
    return unbiased(op, impl, [c for c in more if not refuses(op, impl, c)])


def gradients(op: Op[..., Any], impl: str | None, case: Case) -> str | None:
    """Every float input's gradient along a random direction equals a central difference of the
    reference.

    With `impl`, forward and backward operators run that backend's implementations where they exist.
    """
    if op.differentiated is None:
        return f"{NOTHING}the operator has no gradient"
    assert op.reference_of is not None
    rng = np.random.default_rng(1)
    names = [p.name for p in op.parameters]
    values = [
        v.detach().clone().requires_grad_(True)
        if isinstance(v, torch.Tensor) and v.dtype.is_floating_point
        else v
        for v in case.values
    ]
    with transom.use(**({op.name: impl} if impl else {})):
        out = as_tuple(op.call(**dict(zip(names, values, strict=True))))
    want = [torch.from_numpy(rng.standard_normal(tuple(o.shape))).to(o.dtype) for o in out]
    pairs = [
        (o, w)
        for o, w in zip(out, want, strict=True)
        if o.dtype.is_floating_point and o.requires_grad
    ]
    inputs = [
        (n, v)
        for n, v in zip(names, values, strict=True)
        if isinstance(v, torch.Tensor) and v.requires_grad
    ]
    if not pairs:
        return "no output can be differentiated"
    for o, w in pairs:
        w[~torch.isfinite(o.detach().cpu())] = 0
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [v for _, v in inputs],
        [w.to(o.device) for o, w in pairs],
        allow_unused=True,
    )
    plain = [as_numpy(v) for v in case.values]
    weights = [
        w.double().numpy() if o.dtype.is_floating_point else None
        for o, w in zip(out, want, strict=True)
    ]
    for (name, value), gradient in zip(inputs, found, strict=True):
        if name in op.differentiated.constant:
            if gradient is not None and gradient.abs().max() > 0:
                return f"the gradient of {name} is not zero; the declaration calls it constant"
            continue
        direction = rng.standard_normal(tuple(value.shape))
        at = names.index(name)
        difference, size = _difference(op.reference_of, plain, at, direction, weights)
        if gradient is None:
            if abs(difference) > 1e-7 * max(size, 1.0):
                return (
                    f"{name} has no gradient; the reference changes by {difference:.3g} along a "
                    "random direction"
                )
            continue
        if gradient.dtype != value.dtype or gradient.shape != value.shape:
            return (
                f"the gradient of {name} is {gradient.dtype}{list(gradient.shape)}; "
                f"expected {value.dtype}{list(value.shape)}"
            )
        g = gradient.cpu().double().numpy()
        got, scale = float((g * direction).sum()), float(np.abs(g * direction).sum())
        if not abs(got - difference) <= GRADIENT * max(scale, size * 1e-3, 1e-6):
            return (
                f"the gradient of {name} along a random direction is {got:.8g}; "
                f"expected {difference:.8g}"
            )
    return None


def _difference(
    reference: Callable[..., Any],
    plain: list[Any],
    at: int,
    direction: np.ndarray,
    weights: list[Any],
) -> tuple[float, float]:
    def value(sign: float) -> tuple[float, float]:
        moved = list(plain)
        moved[at] = plain[at] + sign * STEP * direction
        total = size = 0.0
        for out, w in zip(as_tuple(reference(*moved)), weights, strict=True):
            if w is not None:
                product = np.where(np.isfinite(out), out, 0.0) * w
                total += float(product.sum())
                size += float(np.abs(product).sum())
        return total, size

    (a, size), (b, _) = value(1.0), value(-1.0)
    return (a - b) / (2 * STEP), size


def compiles(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """A full-graph compile of the call gives the same bits as eager, without a graph break."""
    if op.mutates:
        return f"{NOTHING}the operator writes an argument"
    names = [p.name for p in op.parameters]
    tensors = [v if not isinstance(v, torch.Tensor) else v.clone() for v in case.values]

    def call(*args: Any) -> Any:
        return op.call(**dict(zip(names, args, strict=True)))

    with transom.use(**{op.name: impl}):
        want = as_tuple(call(*tensors))
        torch._dynamo.reset()
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        got = as_tuple(compiled(*case.values))
    for name, a, b in zip(op.signature.outputs, want, got, strict=True):
        if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            return f"{name} differs between eager and compiled"
    return None


def opcheck(op: Op[..., Any], impl: str, case: Case) -> None:
    """torch.library.opcheck: schema, autograd registration, fake kernel, AOT dispatch. Raises what
    it finds."""
    asked = [
        v.detach().clone().requires_grad_(True)
        if isinstance(v, torch.Tensor)
        and v.dtype.is_floating_point
        and op.differentiated is not None
        else v
        for v in case.values
    ]
    device = next(iter(op.tensors(case.values).values())).device.type
    # torch's check of the registration knows these devices only; the registration is the same.
    known = ("test_autograd_registration",) if device in ("cpu", "cuda", "xpu") else ()
    first, aot = ("test_schema", *known, "test_faketensor"), "test_aot_dispatch_dynamic"
    # torch's own check adds all outputs into one sum that starts as the first output: an index
    # there refuses floats
    leading = (
        op.rules.alternatives[next(iter(op.signature.outputs))] if op.signature.outputs else ()
    )
    values = case.values if set(leading) & {"i32", "i64", "bool"} else asked
    with transom.use(**{op.name: impl}):
        torch.library.opcheck(op.torch_op, op.flatten(*asked), test_utils=first)
        torch.library.opcheck(op.torch_op, op.flatten(*values), test_utils=aot)


def maps(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """torch.vmap over two copies of the call gives each one's own results."""
    inputs, outputs = op.signature.inputs, op.signature.outputs
    if op.mutates or op.batch is None or any(s.dims[:1] != (op.batch,) for s in outputs.values()):
        return f"{NOTHING}vmap is not declared for the operator"
    names = [p.name for p in op.parameters]
    given = dict(zip(names, case.values, strict=True))
    tensors = [
        n
        for n, v in given.items()
        if isinstance(v, torch.Tensor) and inputs[n].dims[:1] == (op.batch,)
    ]
    doubled = {n: torch.stack([given[n], given[n].roll(1, 0)]) for n in tensors}

    def call(*batched: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {**given, **dict(zip(tensors, batched, strict=True))}
        return as_tuple(op.call(**values))

    with transom.use(**{op.name: impl}):
        got = torch.vmap(call)(*doubled.values())
        each = [call(*(doubled[n][i] for n in tensors)) for i in range(2)]
    for name, g, *own in zip(op.signature.outputs, got, *each, strict=True):
        want = torch.stack(own)
        # Another size may be summed in another order, which indices don't show.
        if problem := compare(name, g, want, exact=False, terms=terms_of(op, case.dims)):
            return f"under vmap, of one call after the other: {problem}"
    return None


def autocasts(op: Op[..., Any], impl: str, case: Case) -> str | None:
    """Under autocast the call runs, with outputs in the dtypes that the declaration promises."""
    if not op.autocast:
        return f"{NOTHING}autocast changes nothing in the operator"
    names = [p.name for p in op.parameters]
    tensors = op.tensors(case.values)
    device = next(iter(tensors.values())).device.type
    try:
        inside = torch.autocast(device, dtype=torch.bfloat16)
    except RuntimeError as error:
        return f"{NOTHING}{' '.join(str(error).split())}"
    with inside, transom.use(**{op.name: impl}):
        got = as_tuple(op.call(**dict(zip(names, case.values, strict=True))))
    cast = {
        n: op.autocast.get(n, "keep")
        if isinstance(t, torch.Tensor) and t.dtype.is_floating_point
        else "keep"
        for n, t in tensors.items()
    }
    kinds = {
        n: {"low": torch.bfloat16, "f32": torch.float32}.get(cast[n], kind_of(t))
        for n, t in tensors.items()
    }
    for name, g, (_, dtype) in zip(
        op.signature.outputs, got, op.outputs(case.dims, kinds), strict=True
    ):
        if g.dtype != dtype:
            return f"{name} is {g.dtype} under autocast; expected {dtype}"
    return None


def implementations(op: Op[..., Any], device: str, name: str | None) -> list[Impl]:
    """The implementations of `op` that may run on `device`: all, or those of one name or
    backend."""
    load(op, device)
    return [
        i
        for i in op.impls.values()
        if i.tier != "reference"
        and not i.unavailable
        and (name is None or name in (i.name, i.backend))
    ]
