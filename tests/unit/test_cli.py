"""The command line: help, doctor, explain, tune, and bad input in one line."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import subprocess
import sys

import pytest
import torch

import transom
from transom.cli import main, units
from transom.conformance.calls import describe, made
from transom.device import Peaks
from transom.registry import lookup


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No measured choice or peak of the machine decides a test, and none is left behind."""
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRANSOM_USE", raising=False)
    transom.measured._table.cache_clear()
    yield
    transom.measured._table.cache_clear()


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    done = capsys.readouterr()
    return status, done.out, done.err


def refused(capsys, *arguments: str) -> str:
    """The one line that bad input gives."""
    status, out, err = call(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.count("\n") == 1, err
    return err.strip()


# Help -------------------------------------------------------------------------------------------


def test_without_a_command_the_help_is_shown(capsys):
    status, out, _ = call(capsys)
    assert status == 0
    for command in ("run", "doctor", "explain", "tune"):
        assert command in out


@pytest.mark.parametrize("command", ["run", "doctor", "explain", "tune"])
def test_every_command_has_examples_in_its_help(capsys, command):
    status, out, _ = call(capsys, command, "--help")
    assert status == 0
    assert "Examples:" in out and f"transom {command}" in out


def test_version(capsys):
    assert call(capsys, "--version")[:2] == (0, f"transom {transom.__version__}\n")


@pytest.mark.parametrize(
    "arguments", [("bogus",), ("explain", "--bogus"), ("run", "--tokens", "x")]
)
def test_usage_errors_are_one_line(capsys, arguments):
    assert refused(capsys, *arguments).startswith("transom: ")


def test_the_command_line_imports_no_extra():
    code = (
        "import sys, transom.cli; "
        "print([m for m in ('transformers', 'triton', 'numba', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# doctor -----------------------------------------------------------------------------------------


def test_doctor_tells_versions_devices_backends_and_variables(capsys):
    status, out, _ = call(capsys, "doctor", "--json", "--no-peaks")
    found = json.loads(out)
    assert status == 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu" and found["devices"][0]["peaks"] is None
    backends = {b["name"]: b for b in found["backends"]}
    assert backends["composite"]["unavailable"] is None
    assert backends["composite"]["operators"] == len(transom.ops())
    assert {v["name"] for v in found["variables"]} >= {"TRANSOM_USE", "TRANSOM_CACHE"}
    assert found["slow_path"]["mode"] == "warn"


def test_doctor_measures_peaks_once(capsys, monkeypatch):
    measured = []

    def measure(device):
        measured.append(device)
        return Peaks("cpu", 123.0, 45.0, 1)

    monkeypatch.setattr("transom.device._measure", measure)
    assert "123" in call(capsys, "doctor")[1]
    assert "123" in call(capsys, "doctor", "-v")[1]
    assert len(measured) == 1
    call(capsys, "doctor", "--fresh")
    assert len(measured) == 2


def test_doctor_shows_why_a_plugin_failed(capsys, monkeypatch):
    entry = metadata.EntryPoint("acme", "no_such_module:register", "transom.plugins")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    transom.plugins.cache_clear()
    try:
        out = call(capsys, "doctor", "--no-peaks", "-v")[1]
    finally:
        monkeypatch.undo()
        transom.plugins.cache_clear()
    assert "plugin acme failed to load: ModuleNotFoundError" in out
    assert "Traceback" in out


def test_doctor_lists_ties(capsys, norm):
    for name in ("second", "first"):

        def function(x, weight, bias=None, *, eps=1e-6):
            return x

        function.__name__ = name
        norm.impl(tier="portable")(function)
    found = json.loads(call(capsys, "doctor", "--json", "--no-peaks")[1])
    tie = next(t for t in found["ties"] if t["op"] == norm.name)
    assert tie["order"] == ["first", "second"]


# explain ----------------------------------------------------------------------------------------


def test_explain_lists_operators(capsys):
    status, out, _ = call(capsys, "explain")
    assert status == 0
    assert all(name in out for name in transom.ops())


def test_explain_an_unknown_operator_lists_the_names(capsys):
    assert "grouped_gemm" in refused(capsys, "explain", "nope")


def test_explain_takes_missing_dims_from_the_first_example_and_says_so(capsys):
    out = call(capsys, "explain", "grouped_gemm", "--shapes", "M=4096,K=2048", "--dtype", "bf16")[1]
    assert "bfloat16[4096, 2048]" in out
    assert "from the operator's first example: N=48, E=4" in out
    assert "runs as composite" in out or "runs as native" in out
    assert "reference: runs only when asked for by name" in out
    assert "805 Mflop" in out


def test_explain_allocates_no_tensor_of_the_call(capsys):
    out = call(capsys, "explain", "grouped_gemm", "--shapes", "M=1000000000,K=1000000,N=1000000")[1]
    assert "runs as composite" in out or "runs as native" in out


def test_explain_passes_on_the_operators_own_message(capsys):
    text = refused(capsys, "explain", "route", "--shapes", "E=8,k=9")
    assert text.startswith("transom explain: route: k is 9")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--shapes", "T=-4"), "T is '-4'; expected an integer of 0 or more"),
        (("--shapes", "T"), "'T' was given; expected name=value"),
        (("--shapes", "Q=4"), "Q is not a dim; expected one of T, E, k"),
        (("--set", "colour=red"), "colour is not an argument"),
        (("--set", "logits=f8"), "logits is 'f8'; expected one of"),
        (("--set", "logits=none"), "it is not optional"),
        (("--set", "renormalize=perhaps"), "expected true or false"),
        (("--dtype", "f8"), "dtype: 'f8' is unknown"),
    ],
)
def test_explain_refuses_bad_input(capsys, arguments, text):
    assert text in refused(capsys, "explain", "route", *arguments)


def test_explain_another_machine(capsys):
    out = call(capsys, "explain", "route", "--device", "cuda", "--arch", "sm_90")[1]
    assert "device cuda, architecture sm_90" in out


def test_explain_quantised_weight_and_absent_tensor(capsys):
    out = call(capsys, "explain", "grouped_gemm", "--set", "weight=int4")[1]
    assert "int4 weight[4, 48, 32]" in out
    out = call(capsys, "explain", "sparse_attention", "--set", "indices=none")[1]
    assert "indices      absent" in out


def test_explain_names_the_least_time_when_peaks_are_known(capsys, monkeypatch):
    monkeypatch.setattr("transom.device._measure", lambda device: Peaks("cpu", 100.0, 10.0, 1))
    assert "are not measured here" in call(capsys, "explain", "route")[1]
    transom.device.peaks("cpu")
    out = call(capsys, "explain", "mhc_post", "--shapes", "T=1000,R=4,D=1000")[1]
    assert "bound by memory" in out


def test_explain_says_what_a_better_implementation_lacks(capsys, norm):
    from transom.requires import at_most

    @norm.impl(requires=[at_most("D", 64)], tier="tuned")
    def small(x, weight, bias=None, *, eps=1e-6):
        return x

    assert f"{norm.name}" in call(capsys, "explain")[1]
    found = json.loads(call(capsys, "explain", norm.name, "--shapes", "D=128", "--json")[1])
    assert found["chosen"] == "composite"
    assert "128" in found["others"]["small"][0]
    found = json.loads(call(capsys, "explain", norm.name, "--shapes", "D=8", "--json")[1])
    assert found["chosen"] == "small"
    assert found["others"]["composite"] == ["can run; small comes first (tier tuned)"]


@pytest.mark.parametrize("name", sorted(transom.ops()))
def test_every_operator_can_be_explained_at_its_first_example(capsys, name):
    status, out, _ = call(capsys, "explain", name, "--json")
    assert status == 0
    assert json.loads(out)["chosen"] in ("composite", "native", "numba")  # what is here


# tune -------------------------------------------------------------------------------------------


def test_tune_says_when_only_composites_can_run(capsys):
    status, out, _ = call(capsys, "tune", "quantize_int4")
    assert status == 0
    assert "only the composite can run on cpu: nothing to choose for quantize_int4" in out


def test_tune_times_and_stores_the_fastest(capsys, norm):
    composite = norm.impls["composite"].function

    @norm.impl(tier="portable")
    def other(x, weight, bias=None, *, eps=1e-6):
        return composite(x, weight, bias, eps=eps)

    status, out, _ = call(capsys, "tune", norm.name, "--repeats", "1")
    assert status == 0
    assert "other" in out and "composite" in out
    assert "stored in" in out


def test_tune_refuses_a_candidate_that_is_wrong(capsys, norm):
    @norm.impl(tier="portable")
    def wrong(x, weight, bias=None, *, eps=1e-6):
        return torch.zeros_like(x), x.float().mean(-1)

    status, out, _ = call(capsys, "tune", norm.name, "--repeats", "1")
    assert status == 1
    assert "differs from the composite" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nope",), "is not an operator"),
        (("route", "--device", "cuda:9"), "available here: cpu"),
        (("route", "--repeats", "0"), "expected 1 or more"),
        (("route", "--dtype", "f8"), "dtype: 'f8' is unknown"),
    ],
)
def test_tune_refuses_bad_input(capsys, arguments, text):
    assert text in refused(capsys, "tune", *arguments)


@pytest.mark.parametrize("name", ["route", "sparse_attention", "hashed_embedding", "moe_experts"])
def test_a_declared_call_becomes_one_that_runs(name):
    op = lookup(name)
    values = made(describe(op, {}, torch.float32), torch.device("cpu"))
    op.invoke(op.call, *values)


# Numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123, "0.0123"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
    ],
)
def test_digits(value, text):
    assert units.digits(value) == text


def test_units_say_what_was_not_measured():
    assert {units.digits(None), units.memory(None), units.percent(None), units.seconds(None)} == {
        "-"
    }
    assert units.fixed(0.001) == "< 0.01"
    assert units.seconds(0.00123) == "1.23 ms"
    assert units.memory(3 * 2**20) == "3.00 MiB"
