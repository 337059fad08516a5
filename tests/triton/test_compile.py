"""Ahead-of-time compilation: a representative set; all of it by `transom verify --compile`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from types import SimpleNamespace

import pytest

from transom.cli import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
TARGETS = os.environ.get("TRANSOM_TEST_TARGETS", "sm_90,gfx942")
"""`all` compiles for every architecture."""


def module(name):
    return importlib.import_module(f"transom.backends.triton.{name}")


@pytest.fixture(scope="module")
def found():
    kit = module("compile")
    return kit.compile_all(kit.targets(TARGETS), ["grouped_gemm"], every=False)


def test_the_chosen_tiles_compile_without_faults(found):
    assert found.kernels and not [k for k in found.kernels if k.faults]


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
    assert faults(spills=4, op="grouped_gemm_dx") == ""
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
    assert "_route" in (tmp_path / "found.html").read_text()
