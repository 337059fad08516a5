"""What the tests of the native library build: each once for all test processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .replay import build


@pytest.fixture(scope="session")
def driver(made_once: Callable[..., Path]) -> Path:
    """replay.cpp for this machine."""
    compiler = build.host_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler (g++, c++ or clang++) to build the replay driver with")
    return made_once("replay", lambda folder: build.driver(folder, compiler)) / "replay"


@pytest.fixture(scope="session")
def wrong(made_once: Callable[..., Path]) -> Callable[..., Path]:
    """(fault, *flags) -> the plugin with that fault."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build with")

    def make(fault: str, *flags: str) -> Path:
        def compiled(folder: Path) -> None:
            headers = f"-I{build.ROOT / 'csrc/include'}"
            options = ("-std=c11", "-O1", "-shared", "-fPIC", f"-DFAULT={fault}", headers, *flags)
            build.run(compiler, build.HERE / "wrong.c", "-o", folder / "wrong.so", *options)

        return made_once(f"wrong-{fault}{''.join(flags)}", compiled) / "wrong.so"

    return make
