"""The process in which implementations run, so that a crash is a finding: `verify` starts it.

Reads a request as JSON from standard input and writes a line of JSON for each event to the file
descriptor that the request names: what a plugin prints cannot be mistaken for one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from typing import Any

import transom
from transom.plugins import load as load_all

from . import levels, load
from .checks import implementations


def main() -> None:
    """Answer one request: {"pipe", "device", "plan", "ops"} or {"pipe", "device", "jobs",
    "examples"}."""
    request = json.load(sys.stdin)
    faulthandler.enable()  # the stack of a crash, on standard error
    out = os.fdopen(request["pipe"], "w", buffering=1, encoding="utf-8")

    def tell(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")

    if "plan" in request:
        plan(request["plan"], request["device"], request["ops"], tell)
        return
    for number, (op, impl, check) in request["jobs"]:
        tell(start=number)
        finding = ask(op, impl, check, request["device"], request["examples"], tell)
        tell(done=number, finding=finding.plain())


def plan(backend: str | None, device: str, wanted: list[str] | None, tell: Any) -> None:
    """Load what is asked for; tell level 0's findings and every (operator, implementation)."""
    if backend is not None:
        for finding in load.findings(backend, device):
            tell(finding=finding.plain())
    for name, op in transom.ops().items():
        if wanted is not None and name not in wanted:
            continue
        for impl in implementations(op, device, backend):
            if backend is not None or impl.tier != "composite":
                tell(offers=[name, impl.name])


def ask(op: str, impl: str, check: str, device: str, examples: int, tell: Any) -> levels.Finding:
    """One check of one implementation."""
    found = next(c for c in levels.CHECKS if c.name == check)
    load_all(transom.ops()[op], device)

    def trying(case: Any) -> None:
        tell(trying=[repr(case), found.reproduction(impl, case)])

    return found.ask(levels.Subject(transom.ops()[op], impl, device, examples, trying))


if __name__ == "__main__":
    main()
