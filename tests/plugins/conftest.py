"""The simulated accelerator, built and installed as a vendor's package is. It is a device of torch
in the processes that find it on their path: here in child processes, which are given it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parent / "transom_sim"


@pytest.fixture(scope="session")
def site(made_once: Callable[..., Path]) -> Path:
    """A folder of packages with transom_sim in it."""
    if sys.platform != "linux":
        pytest.skip("its memory is a Linux memfd")
    if not hasattr(torch._C, "_acc"):
        pytest.skip(f"torch {torch.__version__} has no devices in Python; needs >= 2.10")
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler; apt install gcc")

    def make(folder: Path) -> None:
        # A copy: building leaves nothing in the working tree.
        left = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
        shutil.copytree(SOURCE, folder / "source", ignore=left)
        pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index")
        target = ("--no-build-isolation", "--target", str(folder / "site"))
        done = subprocess.run(
            [*pip, *target, str(folder / "source")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    return made_once("transom_sim", make) / "site"


@pytest.fixture
def on_path(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """Child processes find the package, and a cache of their own."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRANSOM_PLUGINS", "all")
    yield monkeypatch


@pytest.fixture
def child(on_path: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a script in this folder, run in a process of its own, prints; it must end well."""

    def run(script: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / script), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
