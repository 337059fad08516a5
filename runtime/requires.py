"""Requirements of an implementation: what a call must look like for it to run.

A requirement looks at Facts only (device, dtypes, dims, layout, mode), never at values, the
environment or a clock, and answers None or one sentence: `<what was seen>; <what is supported>[;
<what to do>]`. Its text goes into the support matrix and `reads` lists the facts it looks at, so
the conformance kit can walk across each limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import dtypes as _dtypes
from .facts import Facts


@dataclass(frozen=True)
class Requirement:
    """One condition: `test(facts)` answers None (met) or the sentence that explain() shows."""

    text: str
    reads: tuple[str, ...]
    test: Callable[[Facts], str | None]
    kind: str = "call"
    """'device' for conditions on the device type, 'call' for all others."""
    limits: dict[str, Any] = field(default_factory=dict, compare=False)
    """Machine-readable bounds for the kit, e.g. {'at_most': ('D', 4096)}."""

    def __call__(self, facts: Facts) -> str | None:
        return self.test(facts)


def device(*types: str) -> Requirement:
    """The tensors live on a device of one of these torch device types."""
    names = ", ".join(types)

    def test(f: Facts) -> str | None:
        return None if f.device in types else f"device is {f.device!r}; supported: {names}"

    return Requirement(f"device {names}", ("device",), test, "device", {"device": types})


def arch(*prefixes: str) -> Requirement:
    """The device's architecture string (`sm_90`, `gfx942`, `ascend910b3`, `x86_64`) starts with one
    of these."""
    names = ", ".join(prefixes)

    def test(f: Facts) -> str | None:
        return (
            None
            if f.arch.startswith(prefixes)
            else f"architecture is {f.arch!r}; supported: {names}"
        )

    return Requirement(f"architecture {names}", ("arch",), test)


def dtype(tensor: str, *ok: torch.dtype | str) -> Requirement:
    """`tensor` holds one of these dtypes, or (as text: 'mxfp4') is a QuantizedWeight of one of
    these formats."""
    names = ", ".join(_dtypes.name(k) for k in ok)

    def test(f: Facts) -> str | None:
        seen = f.dtypes.get(tensor)
        if seen is None or seen in ok:
            return None
        return f"{tensor} is {_dtypes.name(seen)}; supported: {names}"

    return Requirement(
        f"{tensor} {names}", (f"dtype:{tensor}",), test, limits={"dtype": (tensor, ok)}
    )


def at_most(dim: str, limit: int) -> Requirement:
    """The call's `dim` must not exceed `limit` (elements, inclusive)."""
    return _bound(
        dim, "at_most", limit, f"{dim} <= {limit}", f"at most {limit}", lambda n: n <= limit
    )


def at_least(dim: str, limit: int) -> Requirement:
    """The call's `dim` must be `limit` or more (elements)."""
    return _bound(
        dim, "at_least", limit, f"{dim} >= {limit}", f"at least {limit}", lambda n: n >= limit
    )


def multiple_of(dim: str, factor: int) -> Requirement:
    """The call's `dim` must be a multiple of `factor`."""
    text, supported = f"{dim} % {factor} == 0", f"multiples of {factor}"
    return _bound(dim, "multiple_of", factor, text, supported, lambda n: n % factor == 0)


def one_of(name: str, *ok: object) -> Requirement:
    """The dim or the non-tensor argument `name` must be one of these values."""
    names = ", ".join(map(str, ok))

    def test(f: Facts) -> str | None:
        seen = f.arguments.get(name, f.dims.get(name))
        return None if seen in ok else f"{name} is {seen}; supported: {names}"

    return Requirement(f"{name} in {{{names}}}", (name,), test, limits={"one_of": (name, ok)})


def contiguous(*tensors: str) -> Requirement:
    """These tensors (where given) are contiguous."""
    return _layout(tensors, "contiguous", ("contiguous",), "contiguous tensors")


def last_dim_contiguous(*tensors: str) -> Requirement:
    """The last dim of these tensors (where given) has stride 1."""
    what = "last dim of stride 1"
    return _layout(tensors, what, ("contiguous", "rows"), f"a {what}")


def absent(*tensors: str) -> Requirement:
    """These optional tensors are not given."""

    def test(f: Facts) -> str | None:
        given = [t for t in tensors if t in f.dtypes]
        return f"{', '.join(given)} given; supported: calls without" if given else None

    return Requirement(f"without {', '.join(tensors)}", tuple(f"given:{t}" for t in tensors), test)


def inference() -> Requirement:
    """No input asks for a gradient."""

    def test(f: Facts) -> str | None:
        return "a gradient is asked for; supported: inference" if f.gradient else None

    return Requirement("inference only", ("gradient",), test)


def condition(
    text: str, reads: tuple[str, ...], test: Callable[[Facts], str | None]
) -> Requirement:
    """Any other rule on facts; `test` answers None or the sentence."""
    return Requirement(text, reads, test)


def _bound(
    dim: str, kind: str, limit: int, text: str, supported: str, test: Callable[[int], bool]
) -> Requirement:
    def check(f: Facts) -> str | None:
        seen = f.dims.get(dim)
        return None if seen is None or test(seen) else f"{dim} = {seen}; supported: {supported}"

    return Requirement(text, (dim,), check, limits={kind: (dim, limit)})


def _layout(
    tensors: tuple[str, ...], what: str, ok: tuple[str, ...], supported: str
) -> Requirement:
    def test(f: Facts) -> str | None:
        bad = ", ".join(t for t in tensors if f.layouts.get(t, ok[0]) not in ok)
        return f"{bad} is not {what}; supported: {supported}; call .contiguous()" if bad else None

    reads, limits = tuple(f"layout:{t}" for t in tensors), {"layout": (tensors, ok)}
    return Requirement(f"{', '.join(tensors)} {what}", reads, test, limits=limits)
