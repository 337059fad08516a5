"""Builds the library as setup.py does, and the driver, with any compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .calls import ROOT

HERE = Path(__file__).resolve().parent
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")


def run(*command: str | Path, **environment: str) -> str:
    """What the command printed; its failure is the test's."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def library(folder: Path, compiler: str, flags: str = "", **environment: str) -> Path:
    """_native.so, by setup.py; environment as it takes it (TRANSOM_LEVELS, TRANSOM_SANITIZE)."""
    link = f"{compiler} -shared"
    command = (sys.executable, "setup.py", "-q", "build_ext")
    places = ("--build-lib", folder / "lib", "--build-temp", folder / "objects")
    printed = run(
        *command,
        *places,
        CC=compiler,
        CXX=compiler,
        LDSHARED=link,
        LDCXXSHARED=link,
        CFLAGS=flags,
        CXXFLAGS=flags,
        TRANSOM_NO_EXT="_C",
        **environment,
    )
    built = folder / "lib/transom/_native.so"
    assert built.exists(), printed
    return built


def driver(folder: Path, compiler: str, *flags: str) -> Path:
    """replay.cpp, linked so that a library finds the driver's OpenMP entries."""
    target = folder / "replay"
    headers = f"-I{ROOT / 'csrc/include'}"
    options = ("-std=c++20", "-O1", "-rdynamic", "-pthread", "-ldl", "-lm", *WARNINGS, headers)
    run(compiler, HERE / "replay.cpp", "-o", target, *options, *flags)
    return target


def host_compiler() -> str | None:
    """The compiler that setup.py would take, or None."""
    named = os.environ.get("CXX", "g++").split()[0]
    return next((c for c in (named, "c++", "clang++") if shutil.which(c)), None)
