"""The package as installed: from the wheel, editable, and not from the repository's root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Environment, copy_source, run


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """An environment with a copy of the tree installed editable, and that copy."""
    folder = tmp_path_factory.mktemp("editable")
    environment = Environment(folder / "venv")
    copy = copy_source(folder / "source")
    environment.install("-e", copy, cwd=folder, TRANSOM_NO_EXT="1")
    return environment, copy


def test_the_wheel_imports_from_where_it_was_installed(
    installed: Environment, tmp_path: Path
) -> None:
    print_file = "import transom; print(transom.__file__)"
    where = run(installed.python, "-c", print_file, cwd=tmp_path)
    assert Path(where.strip()) == installed.site / "transom" / "__init__.py"


def test_the_version_stands_in_one_place(installed: Environment, tmp_path: Path) -> None:
    text = (
        "from importlib.metadata import version\n"
        "import transom\n"
        "print(transom.__version__, version('transom'))"
    )
    told, recorded = run(installed.python, "-c", text, cwd=tmp_path).split()
    assert told == recorded
    assert f"## [{told}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_installed_command_answers(installed: Environment, tmp_path: Path) -> None:
    assert "doctor" in run(installed.python.parent / "transom", "--help", cwd=tmp_path)


def test_the_installed_kit_runs_with_its_options(installed: Environment, tmp_path: Path) -> None:
    chosen = "--transom-ops", "sinkhorn", "--transom-examples", "2"
    said = run(installed.python, "-m", "transom.conformance", *chosen, cwd=tmp_path)
    assert " passed" in said and "failed" not in said


def test_an_editable_install_uses_the_folders(editable: tuple[Environment, Path]) -> None:
    environment, source = editable
    folders = ("runtime", "kernels", "backends", "tests/conformance", "csrc/include")
    text = (
        "from importlib import import_module\n"
        "for name in '', '.kernels', '.backends', '.conformance', '.include':\n"
        "    print(import_module('transom' + name).__file__)"
    )
    assert run(environment.python, "-c", text, cwd=source.parent).split() == [
        str(source / folder / "__init__.py") for folder in folders
    ]


@pytest.mark.parametrize(
    "file, module",
    [("runtime/newer.py", "transom.newer"), ("kernels/moe/newer.py", "transom.kernels.moe.newer")],
)
def test_an_editable_install_sees_a_new_file_at_once(
    editable: tuple[Environment, Path], file: str, module: str
) -> None:
    environment, source = editable
    (source / file).write_text("answer = 42\n")
    text = f"from {module} import answer; print(answer)"
    assert run(environment.python, "-c", text, cwd=source.parent).split() == ["42"]


def test_the_link_tree_has_the_shape_of_the_installed_package(
    editable: tuple[Environment, Path], installed: Environment
) -> None:
    tree = editable[1] / "build/ide/transom"

    def modules(folder: Path) -> set[str]:
        # rglob does not follow links to folders, hence the second glob
        found = [*folder.glob("*.py"), *(p for d in folder.iterdir() for p in d.rglob("*.py"))]
        return {p.relative_to(folder).as_posix() for p in found if p.stem != "newer"}

    assert modules(tree) == modules(installed.site / "transom")
    assert (tree / "py.typed").exists()


def test_a_second_editable_install_renews_the_link_tree(editable: tuple[Environment, Path]) -> None:
    environment, source = editable
    (source / "runtime/later.py").write_text("")
    environment.install("-e", source, cwd=source.parent, TRANSOM_NO_EXT="1")
    assert (source / "build/ide/transom/later.py").is_file()


def test_the_repository_root_does_not_offer_a_second_registry() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import runtime"], cwd=ROOT, capture_output=True, text=True
    )
    assert "ImportError: this folder is the package 'transom'" in done.stderr
    assert "pip install -e ." in done.stderr
