"""What the tests of the native library build: each once for all test processes."""

from __future__ import annotations

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
