"""What is in a wheel and a source distribution, and what isn't."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from .conftest import ROOT, build, copy_source

FOLDER = {
    "runtime": "transom",
    "kernels": "transom/kernels",
    "backends": "transom/backends",
    "bench": "transom/bench",
    "tests/conformance": "transom/conformance",
    "csrc/include": "transom/include",
}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{file}"))
        return archive.read(name).decode()


def tracked(source: Path) -> set[str]:
    """The files that git tracks; every file where git has no answer (an unpacked distribution)."""
    listed = subprocess.run("git ls-files", shell=True, cwd=ROOT, capture_output=True, text=True)
    return set(listed.stdout.splitlines()) & files(source) or files(source)


def add_library(source: Path, broken: bool = False) -> None:
    """The smallest sources that setup.py must find: one compiled once, one for every level."""
    for folder in ("base", "moe"):
        (source / "csrc/cpu" / folder).mkdir(parents=True, exist_ok=True)
    for old in (source / "csrc").rglob("*.cpp"):
        old.unlink()
    text = "#error broken\n" if broken else 'extern "C" int once() { return 7; }\n'
    (source / "csrc/cpu/base/once.cpp").write_text(text)
    (source / "csrc/cpu/moe/seven.cpp").write_text(
        "namespace TRANSOM_LEVEL { extern const int seven = 7; }\n"
    )


def test_the_wheel_holds_every_file_of_the_mapped_folders_and_nothing_else(
    source: Path, wheel: Path
) -> None:
    expected = {
        f"{package}/{file}"
        for folder, package in FOLDER.items()
        for file in files(source / folder)
        if not file.startswith("results/")  # measured on one machine
    }
    held = {n for n in names(wheel) if ".dist-info/" not in n and not n.endswith(".so")}
    assert held == expected


def test_site_packages_gets_one_folder(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"transom"}


@pytest.mark.parametrize("file", ["py.typed", "include/__init__.py", "conformance/__init__.py"])
def test_the_wheel_holds(wheel: Path, file: str) -> None:
    assert f"transom/{file}" in names(wheel)


def test_every_folder_of_the_package_is_a_regular_package(wheel: Path) -> None:
    held = {n for n in names(wheel) if n.endswith(".py")}
    folders = {name.rpartition("/")[0] for name in held}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in held} == set()


def test_the_platform_is_named_only_if_something_was_compiled(wheel: Path) -> None:
    compiled = any(name.endswith(".so") for name in names(wheel))
    assert wheel.name.endswith("-py3-none-any.whl") is not compiled


def test_a_pure_wheel_can_be_asked_for(source: Path, tmp_path: Path) -> None:
    copy = copy_source(tmp_path / "source")
    add_library(copy)
    (pure,) = build(copy, tmp_path / "dist", "--wheel", TRANSOM_NO_EXT="1").glob("*.whl")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(pure) if name.endswith(".so")]


def test_the_library_is_found_and_built_once_for_every_python(tmp_path: Path) -> None:
    copy = copy_source(tmp_path / "source")
    add_library(copy)
    (built,) = build(copy, tmp_path / "dist", "--wheel").glob("*.whl")
    assert not built.name.endswith("-any.whl")
    assert "transom/_native.so" in names(built)
    assert "-py3-none-" in built.name


def test_with_the_extension_a_wheel_is_for_one_python(tmp_path: Path) -> None:
    copy = copy_source(tmp_path / "source")
    shutil.rmtree(copy / "csrc/cpu")
    (built,) = build(copy, tmp_path / "dist", "--wheel").glob("*.whl")
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert f"-{python}-" in built.name
    (name,) = (n for n in names(built) if n.endswith(".so"))
    assert name.startswith("transom/_C.")


def test_an_extension_that_does_not_compile_costs_only_itself(tmp_path: Path) -> None:
    copy = copy_source(tmp_path / "source")
    add_library(copy)
    (copy / "csrc/python/call.cpp").write_text("#error broken\n")
    (built,) = build(copy, tmp_path / "dist", "--wheel").glob("*.whl")
    assert "-py3-none-" in built.name
    assert [n for n in names(built) if n.endswith(".so")] == ["transom/_native.so"]


def test_the_binaries_need_neither_torch_nor_openmp(wheel: Path, tmp_path: Path) -> None:
    reader = shutil.which("readelf")
    if reader is None:
        pytest.skip("no readelf")
    with zipfile.ZipFile(wheel) as archive:
        binaries = [archive.extract(n, tmp_path) for n in names(wheel) if n.endswith(".so")]
    for binary in binaries:
        dynamic = subprocess.run([reader, "-dW", binary], capture_output=True, text=True).stdout
        lines = [line for line in dynamic.splitlines() if "NEEDED" in line]
        needed = {line.rpartition("[")[2].rstrip("]") for line in lines}
        assert not [n for n in needed if re.search("torch|c10|omp", n)]
        symbols = subprocess.run([reader, "-sW", binary], capture_output=True, text=True).stdout
        assert not [s for s in ("3c10", "2at", "THP", "5torch") if f"_ZN{s}" in symbols]


def test_a_library_that_does_not_compile_costs_only_itself(tmp_path: Path) -> None:
    copy = copy_source(tmp_path / "source")
    add_library(copy, broken=True)
    (built,) = build(copy, tmp_path / "dist", "--wheel").glob("*.whl")
    assert "transom/__init__.py" in names(built)
    assert not [name for name in names(built) if name.endswith(".so")]


def test_the_source_distribution_is_the_whole_tree(source: Path, dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in held if "egg-info" in name} | {"PKG-INFO", "setup.cfg"}
    assert tracked(source) - held == set()
    assert held - made - files(source) == set()


def test_metadata_names_the_licence_the_python_and_the_command(wheel: Path) -> None:
    message = Parser().parsestr(metadata(wheel, "METADATA"))
    assert message["License-Expression"] == "Apache-2.0"
    assert message["Requires-Python"] == ">=3.10"
    assert "transom = transom.cli:main" in metadata(wheel, "entry_points.txt")
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")


def test_required_dependencies_are_few_and_extras_stay_extras(wheel: Path) -> None:
    lines = Parser().parsestr(metadata(wheel, "METADATA")).get_all("Requires-Dist", [])
    required = {line.split(">")[0] for line in lines if "extra ==" not in line}
    assert required == {"torch", "numpy", "cffi", "typer", "rich", "jinja2"}


def test_what_the_makefile_installs_is_pinned(source: Path, wheel: Path) -> None:
    lines = Parser().parsestr(metadata(wheel, "METADATA")).get_all("Requires-Dist", [])
    wanted = {line.split(">")[0] for line in lines if 'extra == "all"' not in line}
    pins = {line.split("==")[0] for line in (source / "constraints.txt").read_text().splitlines()}
    assert {name for name in wanted if "[" not in name} <= pins
