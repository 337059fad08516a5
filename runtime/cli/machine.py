"""What a figure must be read with: versions, device, threads, and the commit of the source tree."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from .. import __version__
from .. import device as _device

_PACKAGES = ("numpy", "transformers", "triton", "numba", "safetensors", "tokenizers")


def versions() -> dict[str, str | None]:
    """Versions of transom, Python, torch and of the packages beside it; None for those that are not
    installed."""
    found: dict[str, str | None] = {
        "transom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit of the source tree that this package is run from, with '-dirty' if files differ;
    else None."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy below somebody else's repository must not take that repository's commit.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return git("describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")


def devices() -> list[dict[str, str]]:
    """Every device type that this process can use: its name, architecture and fingerprint."""
    return [
        {
            "device": d,
            "name": _device.describe(d),
            "arch": _device.arch(d),
            "fingerprint": _device.fingerprint(d),
        }
        for d in _device.available()
    ]


def load() -> float | None:
    """How many processes wanted a processor during the last minute, on average; None where the
    system doesn't tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy(load_before: float | None) -> str | None:
    """A caution for figures that were taken while other processes were at work."""
    processors = os.cpu_count() or 1
    if load_before is None or load_before < 0.75 * processors:
        return None
    return (
        f"Caution: other processes were busy when this began (load {load_before:.1f} on "
        f"{processors} processors); "
        "times may be several times too long and are hardly comparable"
    )


def system() -> dict[str, str | int]:
    """The operating system, and how many threads torch computes with."""
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
