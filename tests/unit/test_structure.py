"""What keeps the tree small and findable: sizes, twins, and the one direction of imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("runtime", "kernels", "backends", "tests", "bench")
SOURCES = {".py", ".pyi", ".c", ".cpp", ".h", ".html"}
SHARED = ("base", "weights", "gemm")
FLAT = sorted((ROOT / "runtime").glob("*.py"))


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def sources(folder: Path) -> list[Path]:
    """The source files below `folder`, without caches."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in SOURCES
        and not any(p.startswith(".") for p in path.relative_to(ROOT).parts)
    ]


def without_twin(root: Path) -> list[str]:
    """Files of an implementation for which there is no kernels/<family>/<operator>.py.

    What begins with an underscore is shared by several of them. The gradient of an operator, and a
    variant of it that writes, is declared in the operator's file and named after it: it may have a
    source of its own in csrc/cpu, never a module in backends/, which nothing would load. What all
    families share lies in the folders SHARED there.
    """
    found = []
    for place in (*sorted((root / "backends").iterdir()), root / "csrc/cpu"):
        for path in sorted(place.rglob("*") if place.is_dir() else ()):
            parts = path.relative_to(place)
            private = any(part.startswith(("_", ".")) for part in parts.parts)
            private |= place.name == "cpu" and parts.parts[0] in SHARED
            if path.is_file() and len(parts.parts) > 1 and not private:
                twins = (root / "kernels" / parts.parent).glob("*.py")
                names = {twin.stem for twin in twins}
                own = path.stem in names
                if path.suffix == ".cpp":
                    own |= any(path.stem.startswith(f"{name}_") for name in names)
                if not own:
                    found.append(path.relative_to(root).as_posix())
    return found


def imported(text: str) -> set[str]:
    """The modules and names that a flat file of the package imports, each in full."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ("transom" if node.level else "", node.module)))
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


def upward(text: str) -> list[str]:
    """Those of them that lie in kernels/ or backends/."""
    parts = {name: name.removeprefix("transom.").split(".")[0] for name in imported(text)}
    return sorted(name for name, first in parts.items() if first in ("kernels", "backends"))


def test_the_registry_stays_below_2500_lines():
    sizes = {path.name: lines(path) for path in FLAT}
    assert sum(sizes.values()) <= 2500, sizes


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_longer_than_600_lines(folder):
    found = {path.relative_to(ROOT).as_posix(): lines(path) for path in sources(ROOT / folder)}
    assert not {name: size for name, size in found.items() if size > 600}


def test_every_implementation_has_a_twin_in_kernels():
    assert without_twin(ROOT) == []


def test_a_missing_twin_is_seen(tmp_path):
    for name in (
        "kernels/moe/route.py",
        "backends/numba/moe/route.py",
        "backends/numba/moe/__init__.py",
        "backends/numba/moe/_tiles.py",
        "backends/numba/moe/rout.py",
        "backends/numba/probe.py",
        "csrc/cpu/moe/route.cpp",
        "csrc/cpu/moe/route_backward.cpp",
        "backends/numba/moe/route_backward.py",
        "csrc/cpu/moe/_simd.h",
        "csrc/cpu/mhc/route.cpp",
        "csrc/cpu/gemm/multiply.cpp",
        "backends/numba/gemm/multiply.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert without_twin(tmp_path) == [
        "backends/numba/gemm/multiply.py",
        "backends/numba/moe/rout.py",
        "backends/numba/moe/route_backward.py",
        "csrc/cpu/mhc/route.cpp",
    ]


@pytest.mark.parametrize("path", [p for p in FLAT if p.name != "__init__.py"], ids=lambda p: p.name)
def test_the_registry_imports_neither_kernels_nor_backends(path):
    """It finds operators and implementations by their path; __init__.py alone names folders."""
    assert upward(path.read_text()) == []


@pytest.mark.parametrize(
    "text, seen",
    [
        ("from . import kernels", ["transom.kernels"]),
        (
            "def f():\n    from .backends.numba import x",
            ["transom.backends.numba", "transom.backends.numba.x"],
        ),
        ("import transom.kernels.moe.route", ["transom.kernels.moe.route"]),
        ("from transom import backends, op", ["transom.backends"]),
        ("from .plugins import backends", []),
        ("import torch.backends.cpu", []),
    ],
)
def test_an_import_upwards_is_seen(text, seen):
    assert upward(text) == seen
