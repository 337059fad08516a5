"""Selection: which implementation computes a call, and why each other one does not.

Order: asked for > measured > tier (tuned > portable > composite; the reference only on request).
Nothing falls back in silence: a forced choice that cannot run raises, a drop to the composite warns
with its reasons, and nothing is moved between devices.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from . import config, guard, host_memory, measured
from .abi import extension
from .facts import Facts
from .op import Impl, Op
from .plugins import backends, load
from .registry import RENAMED, lookup

TIERS = ("reference", "composite", "portable", "tuned")
"""Worst to best: NumPy, only on request; the meaning in torch; a real kernel; a kernel made for the
device."""

Choice: TypeAlias = tuple[tuple[str, str], ...]
"""(operator, implementation or backend) pairs; the first that fits counts, `*` is every one."""


@dataclass(frozen=True)
class Explanation:
    """The implementation of a call, why it was chosen, and every other one's reasons."""

    op: str
    chosen: str | None
    tier: str | None
    why: str
    rejected: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        head = f"{self.op}: {self.chosen or 'nothing can run'} ({self.why})"
        others = (f"  {name}: {'; '.join(why)}" for name, why in self.rejected.items())
        return "\n".join([head, *others])


def reasons(impl: Impl, facts: Facts) -> list[str]:
    """Every sentence why this implementation cannot run the call; empty if it can."""
    if impl.unavailable:
        return [impl.unavailable]
    if (held := guard.reason(impl, facts.device)) is not None:
        return [held]
    out = [sentence for r in impl.requires if (sentence := r(facts)) is not None]
    out += host_memory.reasons(facts, impl.host)
    if facts.deterministic and not impl.deterministic:
        out.append("torch.use_deterministic_algorithms is on; its results may differ between runs")
    if facts.capturing and not impl.capturable:
        out.append("a stream is being captured; it synchronises with the host")
    return out


def able(op: Op[..., Any], facts: Facts) -> list[Impl]:
    """Every implementation that can run these facts, the reference apart."""
    load(op, facts.device)
    return [i for i in op.impls.values() if i.tier != "reference" and not reasons(i, facts)]


def select(op: Op[..., Any], facts: Facts) -> Explanation:
    """The choice for these facts: asked for, else measured, else the best tier that can run."""
    load(op, facts.device)
    ours = backends()
    asked = _asked_for(op)
    order = sorted(
        op.impls.values(), key=lambda i: (-TIERS.index(i.tier), i.backend in ours, i.name)
    )
    rejected: dict[str, tuple[str, ...]] = {}
    if asked:
        wanted = [i for i in order if asked in (i.name, i.backend)]
        if not wanted:
            rejected[asked] = (f"not registered; {', '.join(sorted(i.name for i in order))}",)
        for impl in wanted:
            if not (why := reasons(impl, facts)):
                return Explanation(op.name, impl.name, impl.tier, "asked for", rejected)
            rejected[impl.name] = tuple(why)
        return Explanation(op.name, None, None, f"{asked!r} was asked for", rejected)
    can = []
    for impl in order:
        if impl.tier == "reference":
            rejected[impl.name] = ("runs only when asked for by name",)
        elif why := reasons(impl, facts):
            rejected[impl.name] = tuple(why)
        else:
            can.append(impl)
    fastest = measured.lookup(op, facts)
    for impl in can:
        if impl.name == fastest:
            return Explanation(op.name, impl.name, impl.tier, "measured fastest", rejected)
    if can:
        return Explanation(op.name, can[0].name, can[0].tier, f"tier {can[0].tier}", rejected)
    return Explanation(op.name, None, None, "no implementation fits", rejected)


def _asked_for(op: Op[..., Any]) -> str | None:
    everywhere = None
    for name, impl in choice():
        if name == op.name:
            return impl
        if name == "*":
            everywhere = everywhere or impl
    return everywhere


# use() ------------------------------------------------------------------------------------------

# Process-wide on purpose: autograd runs the backward of an accelerator in threads of its own.
_blocks: list[Choice] = []
"""What the blocks of use() that are open ask for, the one that was entered last at the end."""
_lock = threading.RLock()


@contextlib.contextmanager
def use(backend: str | None = None, /, **choice: str) -> Iterator[None]:
    """Within the block, run these implementations: `use("native")` for all, `use(route="triton")`
    for one.

    A choice that cannot run a call raises NotSupported; there is no fallback from it. Holds for the
    whole process while the block lasts, since autograd runs backward passes in threads of its own.
    Of blocks that are open at once, in whatever threads, the one entered last goes first.
    """
    asked = [(lookup(name).name, impl) for name, impl in choice.items()]
    own = tuple(asked + [("*", backend)] if backend else asked)
    with _lock:
        _blocks.append(own)
        _tell()
    try:
        yield
    finally:
        with _lock:
            # The block itself, not one that asks for the same.
            _blocks.pop(next(i for i, block in enumerate(_blocks) if block is own))
            _tell()


def choice() -> Choice:
    """What the open blocks of use(), or else the environment, ask for. A block that asks for a
    backend hides those around it."""
    out: list[tuple[str, str]] = []
    for block in reversed(_blocks):
        out += block
        if any(name == "*" for name, _ in block):
            return tuple(out)
    return (*out, *_parse_use(config.USE.get()))


def _tell() -> None:
    """Plans depend on the choice: calls that enter through transom._C have it in their key."""
    extension.set_mode("choice", repr(choice()) if _blocks else "")


def _parse_use(text: str) -> Choice:
    out = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, impl = part.partition("=")
        name, impl = name.strip(), impl.strip()
        out.append((RENAMED.get(name, name), impl) if equals else ("*", name))
    return tuple(out)
