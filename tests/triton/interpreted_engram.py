"""What the kit's calls do not reach in engram_gate: rows wider than the registers, which go in
parts. Run by test_interpreted.py, in a process where TRITON_INTERPRET is set."""

from __future__ import annotations

import pytest
import torch

import transom
from transom.backends.triton import set_tiles
from transom.conformance import agree, cases

SMALL = [{"ELEMENTS": 16}]
"""Rows of more than 64 elements are wide."""


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("engram_gate", "engram_gate_backward"))
def test_a_wide_row_goes_in_parts(name, dtype):
    for case in ("forward", "backward"):
        set_tiles(f"engram_gate.{case}", "interpreter", SMALL)
    op = transom.ops()[name]
    case = cases.build(op, {**op.examples[0], "T": (3,), "R": 2, "D": 150}, dtype)
    op.tensors(case.values)["mask"][1] = False
    given = agree.as_given(case)
    with transom.use(**{name: "triton"}):
        out = op.call(**dict(zip((p.name for p in op.parameters), case.values, strict=True)))
    assert agree.with_reference(case, given, out if isinstance(out, tuple) else (out,)) is None
