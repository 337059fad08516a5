"""transom verify on the simulated accelerator: it passes, and each fault fails where it should."""

from __future__ import annotations

import os
import re

import pytest

from transom.conformance.verify import verify

# More with TRANSOM_TEST_EXAMPLES=100: a minute an operator.
EXAMPLES = max(1, int(os.environ.get("TRANSOM_TEST_EXAMPLES", "15")) // 7)

FAMILIES = {
    "grouped_gemm": ["grouped_gemm", "grouped_gemm_backward_x", "grouped_gemm_backward_weight"],
    "moe_experts": ["moe_experts", "lightning_indexer"],
    "sparse_attention": ["sparse_attention", "sparse_attention_backward"],
    "engram": ["ngram_hash", "hashed_embedding"],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_passes(family, on_path):
    outcome = verify("sim", "sim", ops=FAMILIES[family], examples=EXAMPLES)
    assert [(f.op, f.check, f.text) for f in outcome.failed] == []
    passed = {f.level for f in outcome.findings if f.status == "pass"}
    assert passed == {0, 1, 2, 3, 4, 5} and outcome.crashes == 0
    checks = {(f.op, f.check) for f in outcome.findings if f.status == "pass" and f.level == 2}
    assert {(op, "numbers f32") for op in FAMILIES[family]} <= checks
    if family == "sparse_attention":  # the chip holds 16 heads and 16 keys of so many elements
        limits = {f.op: f.status for f in outcome.findings if f.check == "limits"}
        assert set(limits.values()) == {"pass"}


# The fault, the level that should catch it, the check that does, and what it says.
FAULTS = [
    ("error", 1, "requirements", "PluginError: grouped_gemm: .*matrix unit does not answer"),
    ("memory", 1, "requirements", "MemoryError: grouped_gemm: no memory is left"),
    ("wrong", 2, "numbers f32", r"y\[.*\] is .*; expected"),
    ("overrun", 3, "guards", "memory around an output or the workspace was written"),
    ("late", 3, "streams", "y on a stream of its own differs, or came after its event"),
    ("leak", 3, "memory", "bytes of the device stay allocated after 300 calls"),
]


@pytest.mark.parametrize("fault, level, check, says", FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_fails_at_its_level(fault, level, check, says, on_path):
    on_path.setenv("TRANSOM_SIM_FAULT", f"{fault}:grouped_gemm")
    outcome = verify("sim", "sim", ops=["grouped_gemm", "ngram_hash"], level=level, examples=2)
    assert not outcome.passed and outcome.crashes == 0
    failed = {f.check: f for f in outcome.failed}
    assert {(f.op, f.level) for f in outcome.failed} == {("grouped_gemm", level)}
    assert check in failed
    assert re.search(says, failed[check].text)
    if level == 3:  # a manner is broken, and no other
        assert list(failed) == [check]


def test_a_crash_at_load_is_a_finding(on_path):
    on_path.setenv("TRANSOM_SIM_FAULT", "crash")
    outcome = verify("sim", "sim", ops=["ngram_hash"], level=1, examples=1)
    (finding,) = outcome.failed
    assert (finding.level, finding.check) == (0, "loads")
    assert finding.text == "while it was loaded, the process died of SIGABRT"
