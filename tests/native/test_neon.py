"""The kernels for AArch64: compiled by a cross compiler, run by an emulator."""

from __future__ import annotations

import platform
import shutil

import pytest

from .replay import build, calls

COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
pytestmark = [
    pytest.mark.skipif(
        platform.machine() == "aarch64", reason="this machine is AArch64: test_replay.py runs here"
    ),
    pytest.mark.skipif(
        COMPILER is None or QEMU is None,
        reason="no aarch64-linux-gnu-g++ or no qemu-aarch64; "
        "on Debian: apt install g++-aarch64-linux-gnu qemu-user",
    ),
]


@pytest.fixture(scope="module")
def built(made_once):
    """(driver, library) for AArch64."""

    def make(folder):
        build.driver(folder, COMPILER)
        build.library(folder, COMPILER, "-Werror", _PYTHON_HOST_PLATFORM="linux-aarch64")

    folder = made_once("neon", make)
    # The headers' folder of Debian's cross packages; the C library is beside it.
    emulated = [QEMU, "-L", "/usr/aarch64-linux-gnu", folder / "replay"]
    return emulated, folder / "lib/transom/_native.so"


@pytest.mark.slow
def test_every_operator_agrees_with_its_reference(built, tmp_path):
    """In float32, bfloat16 and float16, on 1 and 3 threads, between guard pages; without a warning
    of the compiler."""
    driver, library = built
    given = calls.everything(4)
    answers = calls.run(driver, library, given, tmp_path, threads=(1, 3), TRANSOM_NATIVE_LEVEL="")
    assert calls.wrong(given, answers) == []
    assert calls.threads_of(given, answers) == {op.name for op in calls.operators()}
