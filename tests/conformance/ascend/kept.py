"""Calls that were executed and right, so that a long run that was cut off goes on where it ended.

What is kept holds for one version of everything that decides the result: the kernels and host code
of the operator's family and of what families share, its declaration and reference, the call, the
launches' constants, and our tools. A call that failed is never kept.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from transom import kernels
from transom.backends import triton
from transom.config import cache_folder
from transom.op import Op

from .environment import PINS

OURS = ("calls.py", "execute.py", "launch.py", "lower.py", "source.py", "symbols.c")
"""Of this folder, what decides what is executed and how."""

SHARED = ("_choice.py", "_language.py", "_launch.py", "_segments.py")
"""The same of the Triton backend's, beside the families' folders; tiles are in the launches."""


def find(op: Op[..., Any], call: str, launches: str) -> int | None:
    """How many launches the call had, if it is kept."""
    place = _place(op, call, launches)
    return int(place.read_text()) if place.exists() else None


def keep(op: Op[..., Any], call: str, launches: str, count: int) -> None:
    """Keep a call that was right."""
    place = _place(op, call, launches)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(str(count))


def _place(op: Op[..., Any], call: str, launches: str) -> Path:
    made_of = "|".join((*PINS, _sources(op.path), call, launches))
    name = f"{op.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    return cache_folder() / "ascend" / "calls" / name


@functools.cache
def _sources(path: str) -> str:
    """A digest of the files that decide what an operator of this path computes here."""
    launched, meant = (Path(room.__file__ or "").parent for room in (triton, kernels))
    drawn = Path(__file__).parents[1]
    family = path.partition("/")[0]
    files = [meant / f"{path}.py", *(drawn / f"{n}.py" for n in ("cases", "checks"))]
    files += (Path(__file__).with_name(name) for name in OURS)
    files += (launched / name for name in SHARED)
    for folder in (launched / family, launched / "moe"):
        files += sorted(p for p in folder.iterdir() if p.suffix == ".py")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
