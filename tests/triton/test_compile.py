"""Ahead-of-time compilation: a representative set; all of it by `transom verify --compile`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from transom.cli import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
TARGETS = os.environ.get("TRANSOM_TEST_TARGETS", "sm_86,sm_90,gfx942")
"""`all` compiles for every architecture."""


def module(name):
    return importlib.import_module(f"transom.conformance.compiled.{name}")


@pytest.fixture(scope="module", autouse=True)
def figures(tmp_path_factory):
    """Figures of earlier runs stay out of the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSOM_CACHE", str(tmp_path_factory.mktemp("figures")))
        yield


@pytest.fixture(scope="module")
def found():
    kit = module("compile")
    return kit.compile_all(kit.targets(TARGETS), ["grouped_gemm"], every=False)


def test_the_chosen_tiles_compile_without_faults(found):
    assert found.kernels and not [k for k in found.kernels if k.faults]


def test_attention_fits_the_chips_with_the_least_shared_memory():
    kit = module("compile")
    ops = ["sparse_attention", "block_sparse_attention_backward"]
    outcome = kit.compile_all(("sm_86",), ops, every=False)
    assert outcome.passed, [k.faults for k in outcome.failed]
    assert all(k.shared <= 99 * 1024 and not k.spills for k in outcome.kernels)
    assert {k.op for k in outcome.kernels if k.product} == set(ops)


def test_what_is_picked_for_which_target():
    """In a process of its own: once a test has met the backend without a device, this one would be
    told that it is unavailable."""
    file = Path(__file__).with_name("picked_launches.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


def test_a_kernel_is_not_compiled_again_from_the_same_source(found):
    kit = module("compile")
    again = kit.compile_all(kit.targets(TARGETS), ["grouped_gemm"], every=False)
    assert all(k.before for k in again.kernels) and not any(k.before for k in found.kernels)
    assert [replace(k, before=False) for k in again.kernels] == found.kernels


def test_the_summary_has_the_most_that_a_chosen_tile_takes():
    kit = module("compile")
    one = kit.Compiled("a", "k", "sm_90", "", "BM=16", True, registers=10, shared=5)
    more = replace(one, op="b", registers=9, shared=6, spills=4, faults=["x"])
    tried = replace(one, tile="BM=32", chosen=False, registers=255, spills=99)
    (row,) = kit.Outcome(("sm_90",), ("a",), [one, more, tried]).summary()
    assert (row["registers"], row["spills"], row["shared"]) == (10, 4, 6)
    assert (row["compiled"], row["faults"], row["spills_of_others"]) == (3, 1, 99)
    assert row["ops"] == ["a", "b"] and row["tiles"] == {"BM=16": [10, 4, 6]}


def test_products_run_on_matrix_instructions_and_rows_are_read_wide(found):
    plain = [k for k in found.kernels if k.tile.startswith("BM") and "mxfp4" not in k.call]
    assert plain and all(k.product and k.wide for k in plain)


def test_what_a_kernel_must_not_be_is_a_fault(found):
    kit = module("compile")
    good = next(k for k in found.kernels if k.target == "sm_90" and k.product)
    launch = SimpleNamespace(constants={"EVEN": True}, entry="grouped_gemm.few")
    ttir = "tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x16xbf16> * tensor<16x16xbf16>"

    def faults(**changed):
        return " ".join(kit.faults(kit.Compiled(**{**vars(good), **changed}), launch, ttir))

    assert faults() == ""
    assert "spills 4 bytes" in faults(spills=4)
    assert faults(spills=4, chosen=False) == ""
    assert faults(spills=4, op="grouped_gemm_backward_x") == ""
    assert "shared memory is 999999 bytes" in faults(shared=999999)
    assert "matrix instructions" in faults(product="")
    assert "16 bytes" in faults(wide=0)


def test_a_compiler_that_dies_is_a_finding(monkeypatch):
    kit = module("compile")
    monkeypatch.setattr(kit, "__name__", "transom.no_such_module")  # what the process would run
    (found,) = kit._batch("route", ("sm_90",), False, 60.0)
    assert "the compiler's process ended with status 1" in found.faults[0]


def test_the_command_refuses_what_it_does_not_know(capsys):
    assert main(["verify", "--compile", "--target", "sm_70"]) == 2
    assert "target is 'sm_70'; expected all, or some of sm_80" in capsys.readouterr().err


def test_the_command_writes_json(tmp_path):
    path = tmp_path / "found.json"
    asked = ["--compile", "--quick", "--target", "sm_90", "--ops", "route", "--json", str(path)]
    assert main(["verify", *asked, "--html", str(tmp_path / "found.html")]) == 0
    found = json.loads(path.read_text())
    assert found["passed"] and [k["kernel"] for k in found["kernels"]] == ["moe.route: _route"]
    assert [row["kernel"] for row in found["summary"]] == ["moe.route: _route"]
    assert "_route" in (tmp_path / "found.html").read_text()


def test_the_command_writes_a_table(tmp_path, capsys):
    page = tmp_path / "found.md"
    asked = ["--compile", "--quick", "--target", "sm_90,gfx942", "--ops", "route"]
    assert main(["verify", *asked, "--report", str(page)]) == 0
    row = next(x for x in page.read_text().splitlines() if "`moe.route: _route`" in x)
    cells = row.strip("| ").split(" | ")[1:]
    assert len(cells) == 2 and all(int(cell.split(" / ")[0]) > 8 for cell in cells)
    assert cells[0] in capsys.readouterr().out


def test_without_triton_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["verify", "--compile"]) == 2
    assert "triton is not installed; pip install 'transom[triton]'" in capsys.readouterr().err
