"""The Python environment that holds the vendor's compilers, made when it is first needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from transom.config import cache_folder

PINS = (
    "triton-ascend==3.2.0",
    "ascendnpu-ir==1.2.0",
    "llvmlite==0.50.0",
    "numpy>=1.26",
    "pybind11>=2.13",
)
"""What is installed. Kernels reach it as source, so neither torch nor transom is."""

SECONDS = 900.0
"""How long pip may take."""

CLOSED = ("hivmc", "hivmc-a5")
"""The vendor's last step, not published: stand-ins keep what they are given, which is the final
program in the open dialect, and say that all is well."""

STAND_IN = """#!/bin/sh
case "$*" in *--version*) echo "hivmc 1.2.0"; exit 0;; esac
for a in "$@"; do [ -f "$a" ] && cp "$a" "$TRANSOM_ASCEND_FINAL" && break; done
exit 0
"""


class Unavailable(Exception):
    """The environment can't be made here; one sentence why."""


@dataclass(frozen=True)
class Environment:
    """A folder with an interpreter, the vendor's packages, the helpers that we compiled."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def symbols(self) -> Path:
        """The library that lowered kernels call."""
        return self.folder / "symbols.so"

    def compiler(self, newer: bool) -> Path:
        """The vendor's compiler for the 950 family (newer) or the 910 family."""
        library = f"lib/python{sysconfig.get_python_version()}/site-packages"
        name = "bishengir-compile-a5" if newer else "bishengir-compile"
        return self.folder / library / "ascendnpuir" / "bin" / name

    def variables(self, folder: Path) -> dict[str, str]:
        """Environment variables of a child that works in `folder`: the stand-ins come first."""
        tools = self.compiler(newer=False).parent
        path = os.pathsep.join((str(self.folder / "closed"), str(tools), os.environ["PATH"]))
        ours = {"PATH": path, "TRANSOM_ASCEND_FINAL": str(folder / "final.mlir")}
        alien = ("PYTHON", "TRITON", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(alien)}
        return {**kept, **ours, "TRITON_CACHE_DIR": str(folder / "triton")}


def find() -> Environment | None:
    """The environment, if it has been made."""
    environment = Environment(_place())
    return environment if (environment.folder / "complete").exists() else None


def ready() -> Environment:
    """The environment; made now (a minute, 1 GB of disk) if it isn't there. Unavailable says why
    it can't be."""
    if (found := find()) is not None:
        return found
    place = _place()
    place.parent.mkdir(parents=True, exist_ok=True)
    # made in place: an environment's scripts hold its path. `complete` is written last.
    shutil.rmtree(place, ignore_errors=True)
    try:
        venv.create(place, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"no virtual environment can be made in {place}: {error}") from None
    environment = Environment(place)
    _install(environment)
    _compile_symbols(environment)
    closed = place / "closed"
    closed.mkdir()
    for name in CLOSED:
        (closed / name).write_text(STAND_IN)
        (closed / name).chmod(0o755)
    (place / "complete").touch()
    return environment


def _place() -> Path:
    helpers = Path(__file__).with_name("symbols.c").read_bytes() + STAND_IN.encode()
    made_of = "|".join((*PINS, sys.version, sysconfig.get_platform())).encode() + helpers
    return cache_folder() / "ascend" / f"environment-{hashlib.sha256(made_of).hexdigest()[:12]}"


def _install(environment: Environment) -> None:
    command = [environment.python, "-m", "pip", "install", "--quiet", *PINS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip install did not end within {SECONDS:.0f} s") from None
    if done.returncode:
        raise Unavailable(
            f"pip cannot install {', '.join(PINS[:2])} for Python "
            f"{sysconfig.get_python_version()} on {sysconfig.get_platform()}: "
            f"{reason_of(done.stderr)}; expected a package index that has their wheels"
        )


def reason_of(errors: str) -> str:
    """The last error that pip printed."""
    lines = errors.splitlines()
    told = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (told or lines or ["it said nothing"])[-1]


def _compile_symbols(environment: Environment) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise Unavailable("no C compiler is installed; executing kernels needs cc, gcc or clang")
    source = Path(__file__).with_name("symbols.c")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "symbols.so"
        command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{source.name} does not compile: {done.stderr.splitlines()[-1]}")
        shutil.copy(made, environment.symbols)
