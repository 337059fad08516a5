"""The kit's guards around the outputs of a C implementation."""

from __future__ import annotations

import transom
from transom.conformance import manners
from transom.conformance.levels import plain_example


def test_a_write_past_an_output_is_found(build):
    transom.CPlugin(build("TOY_OVERRUNS"))
    case = plain_example(transom.ops()["grouped_gemm"], "cpu")
    said = manners.guards(case.op, "toy", case)
    assert said == "memory around an output or the workspace was written"


def test_a_plugin_that_stays_within_its_outputs_passes(build):
    transom.CPlugin(build())
    case = plain_example(transom.ops()["grouped_gemm"], "cpu")
    assert manners.guards(case.op, "toy", case) is None
