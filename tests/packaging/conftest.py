"""The built forms of the package, each made once for all tests and processes.

Everything is built from a copy of the tree, without network access: the build leaves nothing in the
working tree, and nothing that lies there from an earlier build gets into it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.pyc",
    "*.so",
    "*.o",
)


# Of the environment that a test runs in: what would change where the package comes from or what
# importing it costs.
DROPPED = ("PYTHONPATH", "TRANSOM_NO_EXT", "PYTHONDONTWRITEBYTECODE")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What the command printed; a failure shows it and fails the test."""
    inherited = {k: v for k, v in os.environ.items() if k not in DROPPED}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(source: Path, target: Path, *what: str, **environment: str) -> Path:
    """`python -m build`; the folder that holds what it built."""
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target))
    run(*command, *what, ".", cwd=source, **environment)
    return target


def copy_source(target: Path) -> Path:
    """A copy of the tree without what builds and tools left in it."""
    shutil.copytree(ROOT, target, ignore=NOT_SOURCE, symlinks=True)
    return target


class Environment:
    """A virtual environment that sees this one's packages by path only.

    So torch need not be installed again, and an editable transom here is invisible there.
    """

    def __init__(self, folder: Path) -> None:
        new = not folder.exists()
        if new:
            venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        self.site = next((folder / "lib").glob("python*")) / "site-packages"
        if new:
            outer = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
            (self.site / "outer.pth").write_text("\n".join(outer) + "\n")

    def install(self, *what: str | Path, cwd: Path, **variables: str) -> None:
        """pip install, from what is at hand only."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "-q")
        options = ("--no-deps", "--no-index", "--no-build-isolation")
        run(*pip, *options, *what, cwd=cwd, **variables)


@pytest.fixture(scope="session")
def source(made_once: Callable[..., Path]) -> Path:
    """The tree as a clone has it; read only."""
    return made_once("source", lambda f: copy_source(f / "tree")) / "tree"


@pytest.fixture(scope="session")
def dist(source: Path, made_once: Callable[..., Path]) -> Path:
    """A source distribution, and the wheel built from that source distribution."""

    def make(folder: Path) -> None:
        shutil.copytree(source, folder / "tree")
        build(folder / "tree", folder / "dist")

    return made_once("dist", make) / "dist"


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    """The wheel of this platform."""
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, made_once: Callable[..., Path]) -> Environment:
    """An environment with the wheel installed."""

    def make(folder: Path) -> None:
        Environment(folder / "venv").install(wheel, cwd=folder)

    return Environment(made_once("installed", make) / "venv")
