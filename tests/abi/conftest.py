"""Plugins in C, compiled by the tests."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch

import transom
from transom.abi import extension, library
from transom.abi.plugin import CFunction
from transom.registry import forget_plans

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("cc")


def pytest_collection_modifyitems(items):
    if COMPILER is None:
        skip = pytest.mark.skip(reason="no C compiler (cc) to build with")
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(skip)


@pytest.fixture
def build(tmp_path):
    """(defines) -> path of the toy plugin, or of another source, compiled with them; warnings are
    errors."""

    def make(
        *defines: str,
        file: str | None = None,
        source: str | None = None,
        language: str = "c11",
        include: Path = ROOT / "csrc/include",
    ) -> Path:
        what = ROOT / "csrc/toy_plugin/toy.c" if file is None else HERE / file
        if source is not None:
            what = tmp_path / "made.c"
            what.write_text(textwrap.dedent(source))
        target = tmp_path / f"lib{len([*tmp_path.iterdir()])}.so"
        warnings = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
        kind = ("-x", "c++" if "++" in language else "c", f"-std={language}")
        options = ("-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{include}")
        flags = [f"-D{d}" for d in defines]
        subprocess.run(
            [COMPILER, *kind, *warnings, *options, *flags, what, "-o", target], check=True
        )
        return target

    return make


@pytest.fixture(autouse=True)
def restored():
    """What a test registers is taken away again."""
    yield
    for op in transom.ops().values():
        for name, impl in list(op.impls.items()):
            function = impl.function
            if isinstance(function, CFunction) and function.library.path.name != "_native.so":
                del op.impls[name]
    for path in [path for path in library._open if path.name != "_native.so"]:
        del library._open[path]
    forget_plans()


@pytest.fixture
def deterministic():
    """A function that turns torch.use_deterministic_algorithms on and off; off at the end."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gemm():
    """(dtype) -> x, weight, offsets of a small grouped_gemm."""

    def make(dtype=torch.float32):
        g = torch.Generator().manual_seed(3)
        x = torch.randn(6, 8, generator=g).to(dtype)
        return x, torch.randn(3, 5, 8, generator=g).to(dtype), torch.tensor([2, 2, 5])

    return make


@pytest.fixture(params=["cffi", "extension"])
def by(request, monkeypatch):
    """How C is called: by transom._C, and without it."""
    if request.param == "cffi":
        monkeypatch.setattr(extension, "_found", lambda: (None, "the test asked for cffi"))
        forget_plans()
    elif extension.why_cffi() is not None:
        pytest.skip(extension.why_cffi())
    return request.param
