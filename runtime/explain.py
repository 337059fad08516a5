"""What can run where: explain(), the listings of operators and backends."""

from __future__ import annotations

from typing import Any

from . import plugins
from .op import Op
from .registry import OPS, lookup
from .selection import Explanation


def explain(op: str | Op[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation a call would take, why, and why each other one would not; nothing is
    computed.

    >>> print(transom.explain("route", logits, 2, score="softmax"))
    route: composite (tier composite)
      reference: runs only when asked for by name
    """
    explanation: Explanation = lookup(op).explain(*args, **kwargs)
    return explanation


def ops() -> dict[str, Op[..., Any]]:
    """Every operator by name."""
    return dict(sorted(OPS.items()))


def backends() -> dict[str, str | None]:
    """Every backend of this tree and every plugin: None if it can be used here, else the sentence
    why not."""
    out: dict[str, str | None] = {"composite": None, "reference": None}
    out.update({b.name: b.unavailable for b in plugins.backends().values()})
    for plugin in plugins.plugins().values():
        plugins.load_plugin(plugin)
        out[plugin.name] = plugin.error
    return out
