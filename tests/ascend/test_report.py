"""What transom verify --target ascend says, without running it."""

from __future__ import annotations

import importlib.util
import json

import pytest
from rich.console import Console

from transom import cli
from transom.conformance.ascend import command as ascend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ABOUT = {"transom": "1.0", "date": "2026-11-22", "rows": [("torch", "2.13")]}


CALLS = (("route(T=2)", False), ("T=4096", True))
"""What a requirement excludes: a call that would be executed, and one whose kernels planned."""


@pytest.fixture
def outcome():
    """A call that is right, one that isn't; a tile that fits, one that doesn't and is only listed
    beside it, one that doesn't and is taken."""
    from transom.conformance.ascend.chips import Plan
    from transom.conformance.ascend.verify import Fit, Outcome, Ran, Refused

    good = Plan("Ascend910B3", True, {"UB": 98304, "L0C": 65536}, {"UB": 196608, "L0C": 131072})
    large = Plan("Ascend910B3", False, {"UB": 393216}, {"UB": 196608}, 0, "UB needs 393216 bytes")
    ran = [
        Ran("route", "route(T=3)", "Ascend910B3", 1),
        Ran("route", "route(T=0)", "Ascend910B3", 1, "result", "ids[0] is <4>; expected 5"),
    ]
    fits = [
        Fit("route", "moe.route: _top", "route.rows", "BT=8", True, "T=4096", good),
        Fit("route", "moe.route: _top", "route.rows", "BT=64", False, "T=4096", large),
        Fit("route", "moe.route: _back", "route.rows", "BT=8", True, "T=4096", large),
    ]
    why = "K = 0; supported: 1 or more"
    refused = [Refused("route", call, "Ascend910B3", why, large) for call, large in CALLS]
    return Outcome(ran, refused, fits, ["npu_swiglu: torch_npu 9.9 has no such operator"])


def note():
    from transom.conformance.ascend.verify import NOTE

    return NOTE


def test_what_failed_is_what_a_user_gets(outcome):
    assert [getattr(f, "kernel", f.op) for f in outcome.failed] == ["route", "moe.route: _back"]
    assert not outcome.passed
    assert outcome.levels == {
        "L1 lowered": (2, 0, 1),
        "L2 executed": (1, 1, 1),
        "L3 planned": (1, 1, 1),
    }
    assert json.loads(json.dumps(outcome.plain()))["fits"][1]["plan"]["use"] == {"UB": 393216}


def test_the_report_says_that_no_binary_ran(outcome):
    page = ascend.render(outcome, note(), ABOUT)
    assert "No binary ran on a device" in page
    assert "ids[0] is &lt;4&gt;; expected 5" in page and "UB needs 393216 bytes" in page
    assert "<td>(no)</td>" in page and "<td>UB 200%</td>" in page
    assert "2 calls executed, 2 kernels planned for 1 chips in 0 min, 2 failed" in page


def test_the_terminal_shows_the_same(outcome):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    ascend.show(console, outcome, note())
    text = console.export_text()
    for said in (
        "No binary ran",
        "(no)",
        "UB 50%",
        "route on Ascend910B3, result",
        "npu_swiglu",
        "K = 0",
    ):
        assert said in text


def test_without_the_wheels_one_line_says_why(monkeypatch, capsys):
    from transom.conformance.ascend import environment

    def unavailable():
        raise environment.Unavailable("pip cannot install triton-ascend: no index")

    monkeypatch.setattr(environment, "ready", unavailable)
    assert cli.main(["verify", "--target", "ascend", "--quick"]) == 2
    assert "transom verify: pip cannot install triton-ascend: no index" in capsys.readouterr().err


def test_another_target_is_refused(capsys):
    assert cli.main(["verify", "--target", "sm_90"]) == 2
    assert "target is 'sm_90'; expected ascend" in capsys.readouterr().err


def test_pip_says_what_is_missing(monkeypatch, tmp_path):
    import subprocess

    from transom.conformance.ascend import environment

    def refused(command, **_):
        errors = "WARNING: x\nERROR: No matching distribution found for triton-ascend==3.2.0\n"
        return subprocess.CompletedProcess(command, 1, "", errors)

    monkeypatch.setattr(environment.subprocess, "run", refused)
    with pytest.raises(environment.Unavailable, match="No matching distribution found for triton"):
        environment._install(environment.Environment(tmp_path))


def test_schemas_that_could_not_be_read_are_said(outcome):
    outcome.contract, outcome.unasked = [], "pip cannot fetch torch-npu==2.14.0: no index"
    assert "the vendor's schemas were not compared" in ascend.summary(outcome)
    assert "torch-npu==2.14.0: no index" in ascend.render(outcome, note(), ABOUT)
