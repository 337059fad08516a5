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


LAYERS = (
    ("errors", "config", "dtypes", "shapes", "device", "interrupts"),
    ("weights.codes", "weights.layout", "weights.tiles", "weights.checkpoints"),
    ("weights.quantized_weight", "weights.huge_pages", "weights"),
    ("facts", "parameters", "requires", "op", "registry", "ranges", "tolerance"),
    ("abi.library", "abi.services", "abi.frame", "abi.output_memory", "abi.weight_forms"),
    ("abi.extension", "abi.plugin", "abi"),
    ("plugins", "guard", "host_memory", "measured", "selection", "record", "dispatch", "explain"),
    ("tune", "torch_op", "declare"),
)
"""Modules of runtime/ that make a call, lowest first; within a floor they stand in order too. One
imports only what stands before it, wherever in the file the import stands. nn/, models/, report/
and cli/ are built on all of them."""

ORDER = [name for floor in LAYERS for name in floor]
TOOLCHAINS = {"cffi", "triton"}
"""What is imported late because it takes long, or may be missing; a neighbour may not be."""


def path_of(module: str) -> Path:
    path = ROOT / "runtime" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(text: str, package: str = "transom") -> set[str]:
    """The modules and names that a file of the package imports, each in full."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            names = {f"{module}.{name.name}" for name in node.names}
            inside = {name for name in names if name.removeprefix("transom.") in ORDER}
            found |= names if inside == names else {module, *names}
    return found


def upwards(module: str, text: str, order: list[str]) -> list[str]:
    """What a module imports although it does not stand before it in `order`."""
    at = order.index(module)
    package = f"transom.{module}"
    if path_of(module).name != "__init__.py":
        package = package.rpartition(".")[0]
    found = []
    for name in imported(text, package):
        inner = name.removeprefix("transom.")
        if name.startswith("transom.") and inner in order and order.index(inner) >= at:
            found.append(inner)
        elif name.split(".")[:2] in (
            ["transom", f]
            for f in ("kernels", "backends", "nn", "models", "cli", "report", "bench")
        ):
            found.append(inner)
    return sorted(found)


def long_functions(text: str) -> list[tuple[str, int]]:
    """(name, lines) of the functions of more than 80 lines, with one line for each statement: into
    how many a formatter breaks it tells nothing."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
            found += [(node.name, size)] if size > 80 else []
    return found


def test_how_a_call_is_made_stays_readable():
    """All that one reads to know it: the floors and abi/, without the weights and how results are
    compared."""
    apart = ("weights", "tolerance")
    sizes = {name: lines(path_of(name)) for name in ORDER if not name.startswith(apart)}
    assert sum(sizes.values()) <= 4560, sizes


def test_every_module_has_its_floor():
    modules = {path.stem for path in FLAT if path.stem != "__init__"}
    for package in ("abi", "weights"):
        modules |= {f"{package}.{p.stem}" for p in (ROOT / "runtime" / package).glob("*.py")}
    assert {name.removesuffix(".__init__") for name in modules} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module):
    assert upwards(module, path_of(module).read_text(), ORDER) == []


def test_an_import_upwards_is_seen():
    order = ["errors", "op", "abi.frame"]
    for text, seen in (
        ("from .abi import frame", ["abi.frame"]),
        ("def f():\n    from .abi.frame import x", ["abi.frame"]),
        ("if TYPE_CHECKING:\n    from transom.abi.frame import x", ["abi.frame"]),
        ("import transom.kernels.moe.route", ["kernels.moe.route"]),
        ("from . import errors\nimport torch.nn", []),
    ):
        assert upwards("op", text, order) == seen


@pytest.mark.parametrize("module", ORDER)
def test_nothing_but_a_toolchain_is_imported_late(module):
    late = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path_of(module).read_text()))
        if isinstance(node, ast.FunctionDef)
        for name in imported(ast.unparse(node), "transom")
    }
    assert late <= TOOLCHAINS | {"importlib"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_longer_than_80_lines(folder):
    found = {
        path.relative_to(ROOT).as_posix(): long
        for path in sources(ROOT / folder)
        if path.suffix == ".py" and (long := long_functions(path.read_text()))
    }
    assert found == {}


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
