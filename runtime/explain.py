"""What can run where: explain(), operator and backend listings, the support matrix."""

from __future__ import annotations

from typing import Any

from . import dispatch, plugins
from .dtypes import SHORT
from .op import OPS, Impl, Op, lookup

_FLOATS = ("f32", "bf16", "f16", "f64")


def explain(op: str | Op[..., Any], *args: Any, **kwargs: Any) -> dispatch.Explanation:
    """Which implementation a call would take, why, and why each other one would not; nothing is computed.

    >>> print(transom.explain("route", logits, 2, score="softmax"))
    route: composite (tier composite)
      reference: runs only when asked for by name
    """
    return lookup(op).explain(*args, **kwargs)


def ops() -> dict[str, Op[..., Any]]:
    """Every operator by name."""
    return dict(sorted(OPS.items()))


def backends() -> dict[str, str | None]:
    """Every backend of this tree and every plugin: None if it can be used here, else the sentence why not."""
    out: dict[str, str | None] = {"composite": None, "reference": None}
    out.update({b.name: b.unavailable for b in plugins.backends().values()})
    for plugin in plugins.plugins().values():
        plugins.load_plugin(plugin)
        out[plugin.name] = plugin.error
    return out


def support_matrix() -> str:
    """A Markdown table, operator x implementation: dtypes, forward and backward, made from the declarations."""
    everything = ops()
    rows = ["| operator | implementation | backend | dtypes | forward | backward |", "|---|---|---|---|---|---|"]
    backward = {n for n in everything if n.partition("_backward")[1] or _backward_of(everything[n])}
    for name, op in everything.items():
        if name in backward:
            continue
        plugins.load(op, "cpu")
        for impl in sorted(op.impls.values(), key=lambda i: (-dispatch.TIERS.index(i.tier), i.name)):
            rows.append(
                f"| `{name}` | {impl.name} ({impl.tier}) | {impl.backend} | {', '.join(_dtypes(op, impl))} | "
                f"yes | {_backward_text(op, impl, everything)} |"
            )
    return "\n".join(rows) + "\n"


def _backward_of(op: Op[..., Any]) -> str | None:
    """The forward operator that `op` is a gradient of: one of the same file whose name it extends."""
    for name, other in OPS.items():
        if other.module == op.module and op.name != name and op.name.startswith(name) and other._gradient:
            return name
    return None


def _backward_text(op: Op[..., Any], impl: Impl, everything: dict[str, Op[..., Any]]) -> str:
    if op._gradient is None:
        return "none"
    names = [n for n, o in everything.items() if _backward_of(o) == op.name]
    have = [n for n in names if any(i.backend == impl.backend for i in everything[n].impls.values())]
    if impl.tier == "reference":
        return "forward only"
    return "yes" if len(have) == len(names) else f"{len(have)} of {len(names)}; the rest by the composite"


def _dtypes(op: Op[..., Any], impl: Impl) -> list[str]:
    """The dtypes of the first floating tensor, and the quantised formats of its weights."""
    out: list[str] = []
    for p in op.parameters:
        alternatives = op.rules.alternatives.get(p.name, ())
        limit = next((r.limits["dtype"][1] for r in impl.requires if r.limits.get("dtype", ("",))[0] == p.name), None)
        if not out and set(alternatives) & set(_FLOATS):
            out += [a for a in alternatives if a in SHORT and (limit is None or SHORT[a] in limit)]
        if "quant" in alternatives and "quant weights" not in out:
            out.append("quant weights" if limit is None else " ".join(k for k in limit if isinstance(k, str)))
    return [o for o in out if o] or ["integers"]
