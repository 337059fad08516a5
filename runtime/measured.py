"""Measured choices: a table on disk of what was fastest, per machine.

Keys hold the operator, the device's fingerprint, dtypes and dims, those that vary from call to call
rounded up to powers of two. The hot path never measures. TRANSOM_TUNE=off ignores the table.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

from . import config
from . import device as _device
from .facts import Facts
from .op import Op
from .registry import forget_plans


def store(op: Op[..., Any], facts: Facts, chosen: str) -> None:
    """Remember the implementation for calls with these facts, on this machine."""
    entry = {_key(op, facts): f"{chosen}@{op.impls[chosen].version}"}
    (path := _path(facts.device)).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_table(facts.device), **entry}, indent=1, sort_keys=True)
    path.write_text(text, encoding="utf-8")
    _table.cache_clear()
    forget_plans()


def lookup(op: Op[..., Any], facts: Facts) -> str | None:
    """The implementation that was measured fastest for these facts, or None."""
    if (
        len(op.impls) < 3 or config.TUNE.get() == "off"
    ):  # composite and reference alone: nothing to choose
        return None
    name, _, version = _table(facts.device).get(_key(op, facts), "").partition("@")
    impl = op.impls.get(name)
    return name if impl is not None and impl.version == version else None


@functools.cache
def _table(device: str) -> dict[str, str]:
    try:
        found = json.loads(_path(device).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _path(device: str) -> Any:
    return config.cache_folder() / f"tune-{_device.fingerprint(device)}.json"


def _key(op: Op[..., Any], facts: Facts) -> str:
    def rounded(name: str, size: Any) -> str:
        if isinstance(size, tuple):
            return f"{name}={_power(math.prod(size))}"
        return f"{name}={_power(size) if name in op.varying else size}"

    dims = ",".join(rounded(n, s) for n, s in sorted(facts.dims.items()))
    kinds = ",".join(f"{n}:{k}" for n, k in sorted(facts.dtypes.items()))
    return f"{op.name}|{kinds}|{dims}|{sorted(facts.arguments.items())}"


def _power(n: int) -> int:
    return 1 << max(0, int(n) - 1).bit_length() if n > 0 else 0
