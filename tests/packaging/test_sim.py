"""The simulated accelerator as a vendor ships it: its package beside transom's wheel, in an
environment that has nothing else of either."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from .conftest import NOT_SOURCE, ROOT, Environment, run


@pytest.fixture(scope="session")
def with_sim(wheel, made_once):
    """An environment with both."""
    if sys.platform != "linux":
        pytest.skip("its memory is a Linux memfd")

    def make(folder):
        shutil.copytree(
            ROOT / "tests" / "plugins" / "transom_sim", folder / "source", ignore=NOT_SOURCE
        )
        environment = Environment(folder / "venv")
        environment.install(wheel, cwd=folder)
        environment.install(folder / "source", cwd=folder)

    return Environment(made_once("with_sim", make) / "venv")


def test_it_passes_verify_beside_the_wheel(with_sim, tmp_path):
    told = run(
        with_sim.python,
        "-m",
        "transom.cli",
        "verify",
        "--backend",
        "sim",
        "--device",
        "sim",
        "--ops",
        "grouped_gemm,ngram_hash",
        "--level",
        "3",
        "--examples",
        "2",
        "--report",
        "sim.html",
        "--json",
        "sim.json",
        cwd=tmp_path,
        TRANSOM_CACHE=str(tmp_path),
    )
    assert "passed: " in told
    found = json.loads((tmp_path / "sim.json").read_text())
    assert found["passed"] and found["crashes"] == 0
    assert ["plugin sim", "transom-sim 0.1.0"] in found["rows"]
    assert ["sim", "transom simulated accelerator"] in found["rows"]
    peaks = "512 GFLOP/s in float32, 64.0 GB/s, as the vendor states"
    assert ["peaks of sim", peaks] in found["rows"]
    page = (tmp_path / "sim.html").read_text()
    assert "grouped_gemm" in page and "transom simulated accelerator" in page
