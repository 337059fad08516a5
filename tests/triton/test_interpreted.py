"""Every Triton kernel in Triton's interpreter: the conformance kit, in a process for each family.

TRITON_INTERPRET must be set before Triton is imported, and holds for the whole process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import transom

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
EXAMPLES = os.environ.get("TRANSOM_TEST_EXAMPLES", "1")
LEFT_OUT = ("memory", "threads", "opcheck", "compile", "vmap", "autocast")
"""What asks little of a kernel and takes the interpreter minutes: many calls, and what is the
operator's, not the implementation's. `transom verify` asks it all."""
OPS = {
    name: op
    for name, op in transom.ops().items()
    if (ROOT / "backends/triton" / f"{op.path}.py").exists()
}


def in_the_interpreter(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A pytest in a process that runs kernels in the interpreter."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--import-mode=importlib",
            *arguments,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
        cwd=ROOT,
    )


def test_the_kit_catches_wrong_kernels_and_tiles_are_measured():
    files = (
        "wrong_kernels.py",
        "interpreted_tiles.py",
        "interpreted_attention.py",
        "interpreted_engram.py",
        "interpreted_quant.py",
    )
    shared = "tests/unit/test_keys_not_finite.py"
    asked = (*(f"tests/triton/{name}" for name in files), shared)
    done = in_the_interpreter(*(str(ROOT / path) for path in asked))
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({op.family for op in OPS.values()}))
def test_every_operator_conforms(family):
    asked = [name for name, op in OPS.items() if op.family == family]
    done = in_the_interpreter(
        str(ROOT / "tests/conformance"),
        "--transom-impl",
        "triton",
        "--transom-ops",
        ",".join(asked),
        "--transom-examples",
        EXAMPLES,
        "-k",
        f"not ({' or '.join(LEFT_OUT)})",
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
