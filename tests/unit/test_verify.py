"""`transom verify`: a process of its own, findings, exceptions, the command and its report."""

from __future__ import annotations

import json
import os
import textwrap

import pytest

from transom.cli import main
from transom.conformance.exceptions import Exceptions
from transom.conformance.levels import CHECKS, Finding
from transom.conformance.verify import verify

PLUGIN = """
import ctypes, os, time
import torch
def register(transom):
    from transom.requires import at_most, device, dtype

    right = transom.sinkhorn.impls["composite"].function

    single = dtype("logits", torch.float32)

    @transom.sinkhorn.impl(requires=[device("cpu"), single, at_most("R", 4)])
    def fine(logits, *, iterations, eps):
        return right(logits, iterations=iterations, eps=eps)

    @transom.sinkhorn.impl(requires=[device("cpu")])
    def dies(logits, *, iterations, eps):
        if logits.dtype == torch.float16:
            ctypes.string_at(0)
        return right(logits, iterations=iterations, eps=eps)

    @transom.sinkhorn.impl(requires=[device("cpu")])
    def hangs(logits, *, iterations, eps):
        if logits.dtype == torch.float16:
            time.sleep(60)
        return right(logits, iterations=iterations, eps=eps)

    @transom.sinkhorn.impl(requires=[device("cpu")])
    def leaves(logits, *, iterations, eps):
        os._exit(3)

    @transom.sinkhorn.impl(requires=[device("cpu"), at_most("R", 4)])
    def boasts(logits, *, iterations, eps):
        out = right(logits, iterations=iterations, eps=eps)
        return out + (logits.shape[-1] == 4)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A vendor's package, as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "odd_vendor.py").write_text(PLUGIN)
    info = folder / "odd_vendor-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-vendor\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[transom.plugins]\nodd = odd_vendor:register\n")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    yield folder
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def found(outcome, check):
    return next(f for f in outcome.findings if f.check == check and f.op)


def test_a_right_implementation_passes_every_level(plugin):
    outcome = verify("fine", ops=["sinkhorn"], examples=4)
    assert outcome.passed and outcome.crashes == 0, outcome.failed
    assert {f.check for f in outcome.findings if f.op} == {c.name for c in CHECKS}
    assert found(outcome, "numbers bf16").status == "refused"
    assert "bfloat16" in found(outcome, "numbers bf16").text
    assert found(outcome, "limits").status == "pass"
    assert "times as fast as the composite" in found(outcome, "speed").text


def test_a_process_that_dies_is_a_finding_and_the_rest_goes_on(plugin):
    outcome = verify("dies", ops=["sinkhorn"], level=3, examples=3)
    died = found(outcome, "numbers f16")
    assert died.status == "fail" and died.text == "the process died of SIGSEGV"
    assert "float16" in died.case and "rebuild('sinkhorn'" in died.reproduce
    assert found(outcome, "numbers bf16").status == "pass"
    assert found(outcome, "threads").status == "pass"
    assert not outcome.passed


def test_a_process_that_hangs_is_ended(plugin):
    outcome = verify("hangs", ops=["sinkhorn"], level=2, examples=1, seconds=8)
    stuck = found(outcome, "numbers f16")
    assert stuck.text == "the process did not come back within 8 seconds"
    assert "float16" in stuck.case
    assert found(outcome, "numbers bf16").status == "pass"


def test_a_process_that_leaves_is_a_finding(plugin):
    outcome = verify("leaves", ops=["sinkhorn"], level=2, examples=1)
    assert found(outcome, "numbers f32").text.startswith("the process ended with status 3")


def test_a_limit_that_does_not_hold_is_found_at_the_limit(plugin):
    limits = found(verify("boasts", ops=["sinkhorn"], level=1, examples=1), "limits")
    assert limits.status == "fail" and "[3, 4, 4]" in limits.case


def test_the_failing_call_is_the_smallest_and_can_be_pasted(plugin, tmp_path):
    import subprocess
    import sys

    failing = found(verify("boasts", ops=["sinkhorn"], level=2, examples=20), "numbers f32")
    assert failing.status == "fail" and len(failing.reproduce.splitlines()) <= 5
    done = subprocess.run(
        [sys.executable, "-c", failing.reproduce], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == failing.text


def test_a_plugin_that_dies_while_it_loads_is_a_finding(plugin, tmp_path, monkeypatch):
    (tmp_path / "bang.py").write_text("import os\nos.abort()\n")
    info = tmp_path / "bang-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bang\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[transom.plugins]\nbang = bang:register\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    outcome = verify("bang")
    (only,) = outcome.findings
    assert only.level == 0 and only.text == "while it was loaded, the process died of SIGABRT"


def test_a_plugin_that_fails_to_load_is_a_finding(plugin, tmp_path, monkeypatch):
    (tmp_path / "worse.py").write_text("raise RuntimeError('no driver')\n")
    info = tmp_path / "worse-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: worse\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[transom.plugins]\nworse = worse:register\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    outcome = verify("worse")
    assert not outcome.passed
    assert any("RuntimeError: no driver" in f.text for f in outcome.failed)


# Exceptions


def lines(tmp_path, text):
    path = tmp_path / "known.txt"
    path.write_text(textwrap.dedent(text))
    return Exceptions.read(path)


def test_an_exception_excuses_its_failure_and_no_other(tmp_path):
    known = lines(
        tmp_path,
        """
        # what the chip cannot do
        route   acme  numbers f16:  sums in half precision
        *       acme  vmap:         no batched launch yet
        """,
    )
    failing = [
        Finding("route", "acme", 2, "numbers f16", "fail", "off by 1"),
        Finding("route", "acme", 2, "numbers f32", "fail", "off by 2"),
    ]
    first, second, stale = known.applied(failing)
    assert first.status == "expected" and first.text == "sums in half precision: off by 1"
    assert second.status == "fail"
    assert stale.status == "stale" and "known.txt:4 excuses what does not fail" in stale.text


@pytest.mark.parametrize(
    "text, says",
    [
        ("route acme numbers f16", "expected `operator implementation check: reason`"),
        ("route acme: why", "expected `operator implementation check: reason`"),
        ("route acme numbers f16:", "expected `operator implementation check: reason`"),
        ("route acme nombers: why", "'nombers' is no check; expected *, autocast"),
    ],
)
def test_a_line_that_is_no_exception_is_refused(tmp_path, text, says):
    with pytest.raises(ValueError) as told:
        lines(tmp_path, text)
    assert "known.txt:1: " in str(told.value) and says in str(told.value)


# The command


def test_the_command_writes_a_report_that_stands_alone(plugin, tmp_path, capsys):
    html, findings = tmp_path / "out.html", tmp_path / "out.json"
    status = main(
        [
            "verify",
            "--backend",
            "boasts",
            "--ops",
            "sinkhorn",
            "--level",
            "2",
            "--examples",
            "3",
            "--report",
            str(html),
            "--json",
            str(findings),
        ]
    )
    text = html.read_text()
    assert status == 1 and "<strong>Failed.</strong>" in text and "rebuild(" in text
    assert "http" not in text.replace("http-equiv", "") and "src=" not in text
    assert json.loads(findings.read_text())["passed"] is False
    assert "failed: " in capsys.readouterr().out


def test_the_command_on_this_tree_passes(capsys):
    assert main(["verify", "--ops", "mhc_post", "--level", "2", "--examples", "2"]) in (0, 1)
    assert "mhc_post" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--backend", "nobody"], "backend is 'nobody'; expected an implementation's name or one"),
        (["--ops", "rout"], "rout: is not an operator"),
        (["--exceptions", "/nowhere/x"], "/nowhere/x cannot be read"),
        (["--report", "/"], "/ is a folder; expected a file to write"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, says, capsys):
    assert main(["verify", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("transom verify: ") and says in line
