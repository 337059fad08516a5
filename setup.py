"""Assemble the import package `transom` from the fixed top-level folders.

Everything that can be said as data stands in pyproject.toml. Here is what can't: which folder
becomes which package, the C++ extension (found, not listed), and the link tree that an editable
install leaves for type checkers.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
FOLDER = {
    "transom": "runtime",
    "transom.kernels": "kernels",
    "transom.backends": "backends",
    "transom.conformance": "tests/conformance",
    "transom.include": "csrc/include",
}


def packages() -> list[str]:
    """Every package below every folder, by its import name."""
    return [
        package
        for name, folder in FOLDER.items()
        for package in (name, *(f"{name}.{inner}" for inner in find_packages(folder)))
    ]


def native() -> list[Extension]:
    """`transom._C`, or nothing where it isn't wanted (TRANSOM_NO_EXT=1) or can't be built.

    Without an extension setuptools tags the wheel py3-none-any.
    """
    if os.environ.get("TRANSOM_NO_EXT") == "1" or not (ROOT / "csrc/bind.cpp").exists():
        return []
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return []
    from pybind11.setup_helpers import Pybind11Extension

    sources = [ROOT / "csrc/bind.cpp", *sorted((ROOT / "csrc/cpu").rglob("*.cpp"))]
    extension = Pybind11Extension(
        "transom._C",
        [path.relative_to(ROOT).as_posix() for path in sources],
        include_dirs=["csrc/include"],
        cxx_std=17,
    )
    # A compiler that fails costs speed, not the installation: everything has a composite.
    extension.optional = True
    return [extension]


def link_tree(target: Path) -> None:
    """Links in the shape of the installed package, for type checkers.

    An editable install maps names to folders by code, which pyright and mypy do not run; both
    follow links.
    """
    shutil.rmtree(target, ignore_errors=True)
    package = target / "transom"
    package.mkdir(parents=True)
    links = {path.name: path for path in (ROOT / FOLDER["transom"]).iterdir()}
    for name, folder in FOLDER.items():
        if "." in name:
            links[name.partition(".")[2]] = ROOT / folder
    for name, path in links.items():
        if not name.startswith(("__pycache__", ".")):
            (package / name).symlink_to(os.path.relpath(path, package))


class develop(editable_wheel):
    """The editable install, which also writes build/ide."""

    def run(self) -> None:
        super().run()
        try:
            link_tree(ROOT / "build/ide")
        except OSError as error:
            # Some file systems have no links; the installation itself is complete without them.
            self.warn(f"build/ide: {error}; type checkers will not find the package")


setup(
    packages=packages(),
    package_dir=FOLDER,
    ext_modules=native(),
    cmdclass={"editable_wheel": develop},
    package_data={"": ["py.typed", "*.h", "*.pyi", "*.html", "*.json"]},
    include_package_data=False,
)
