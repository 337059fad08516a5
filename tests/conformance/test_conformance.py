"""Every operator, every implementation: requirements, numbers, manners, torch."""

from __future__ import annotations

import transom
from transom.conformance.levels import Subject


def test_conforms(op, impl, check, device, examples):
    """`check` of the table in levels.py; level 5, speed, is measured by `transom verify`."""
    found = check.ask(Subject(transom.ops()[op], impl, device, examples))
    assert found.status != "fail", f"{found.text}\n{found.case}\n{found.reproduce}"
    if check.name == "numbers f32" and found.status == "refused":
        assert found.text, f"{impl} refuses every drawn call without a reason"
