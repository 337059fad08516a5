"""Assemble the import package `transom` from the fixed top-level folders.

Everything that can be said as data stands in pyproject.toml. Here is what can't: which folder
becomes which package, the C++ library (found, not listed) and the extension that calls it, and the
link tree that an editable install leaves for type checkers.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
FOLDER = {
    "transom": "runtime",
    "transom.kernels": "kernels",
    "transom.backends": "backends",
    "transom.bench": "bench",
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


# Each source but those of csrc/cpu/base is compiled once for each level of its processor, the best
# one last; csrc/cpu/base/plugin.cpp takes the best that runs. A new name needs its has_<level>()
# there.
LEVELS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl"],
    },
    "aarch64": {"neon": []},
}
# Sums are the same with every compiler only if all of them fuse a product with its addition.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wconversion"]
# With TRANSOM_SANITIZE: compiled in a fifth of -O1's time, without the warnings that gcc gives of
# its own checks; a fault ends the program. Python's own flags may say -fwrapv, which would define
# what is to be found; memset of 0 bytes at NULL is no fault (C2y, WG14 N3322).
CHECKED = ["-O0", "-g", "-fno-wrapv", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
CHECKED += ["-w", "-fno-sanitize=nonnull-attribute"]


def extensions() -> list[Extension]:
    """What is compiled; nothing where it isn't wanted (TRANSOM_NO_EXT=1) or can't be.

    transom/_native.so: the kernels, a plain shared library without Python's API: one serves every
    Python. transom/_C.cpython-...so: the extension that calls C implementations, for one Python;
    where pybind11 isn't at hand (or TRANSOM_NO_EXT=_C) it is left out, and they are called through
    cffi.
    """
    if os.environ.get("TRANSOM_NO_EXT") == "1" or os.name != "posix":
        return []
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return []
    found = []
    kernels = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/**/*.cpp"))
    if kernels:
        found.append(Extension("transom._native", kernels))
    bind = os.environ.get("TRANSOM_NO_EXT") != "_C" and (ROOT / "csrc/python").exists()
    if bind and (pybind11 := pybind11_include()):
        flags = ["-std=c++20", "-O2", "-fvisibility=hidden"]
        found.append(
            Extension(
                "transom._C",
                ["csrc/python/call.cpp", "csrc/python/reading.cpp"],
                include_dirs=["csrc/include", pybind11],
                depends=["csrc/include/transom_plugin.h", "csrc/python/extension.h"],
                extra_compile_args=flags,
                language="c++",
            )
        )
    for extension in found:
        # A compiler that fails costs speed, not the installation: everything has a composite.
        extension.optional = True
    return found


def pybind11_include() -> str | None:
    """Where pybind11's headers lie, if it is installed."""
    try:
        import pybind11
    except ImportError:
        return None
    return str(pybind11.get_include())


class build_compiled(build_ext):
    """Compiles transom._C as any extension, and csrc/cpu as a library: files of its base once, all
    others once for each level.

    Of the library, what is up to date in the build folder is kept; the rest is compiled on all
    processors at once.
    """

    def get_ext_filename(self, name: str) -> str:
        if name.rpartition(".")[2] != "_native":
            return str(super().get_ext_filename(name))
        return "_native.so" if name == "_native" else "transom/_native.so"

    def build_extension(self, extension: Extension) -> None:
        if extension.name == "transom._C":
            super().build_extension(extension)
        else:
            self.build_library(extension)

    def build_library(self, extension: Extension) -> None:
        """transom/_native.so."""
        machine = sysconfig.get_platform().rpartition("-")[2]
        levels = LEVELS.get(machine, {"baseline": []})
        # For a build of some levels: TRANSOM_LEVELS=baseline,avx2
        if asked := os.environ.get("TRANSOM_LEVELS"):
            levels = {level: levels[level] for level in asked.split(",")}
        # For a build that is checked while it runs: TRANSOM_SANITIZE=address,undefined
        checked = os.environ.get("TRANSOM_SANITIZE")
        sanitize = [f"-fsanitize={checked}", *CHECKED] if checked else []
        below = [source for source in extension.sources if has_levels(source)]
        kernels = [source for source in below if is_kernel(source)]
        write_list(Path(self.build_temp) / "transom_kernels.h", kernels, levels)
        jobs = [(source, level, levels[level]) for source in below for level in levels]
        jobs += [(source, "once", []) for source in extension.sources if source not in below]

        def compiled(job: tuple[str, str, list[str]]) -> list[str]:
            source, level, flags = job
            folder = os.path.join(self.build_temp, level)
            done = Path(folder, source).with_suffix(".o")
            if not self.force and up_to_date(done):
                return [str(done)]
            return self.compiler.compile(
                [source],
                output_dir=folder,
                macros=[("TRANSOM_LEVEL", level)] if level != "once" else [],
                include_dirs=["csrc/include", self.build_temp],
                extra_postargs=[*FLAGS, *flags, *sanitize, "-MMD"],
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for some in pool.map(compiled, jobs) for path in some]
        # No C++ library is needed, and no OpenMP library may be: torch has loaded its own.
        target = self.get_ext_fullpath(extension.name)
        self.mkpath(os.path.dirname(target))
        own = ["-Wl,--as-needed", "-lm"] if sys.platform == "linux" else []
        self.compiler.link_shared_object(objects, target, extra_postargs=[*own, *sanitize])


def has_levels(source: str) -> bool:
    """Whether a source is compiled once for each level: any but those of csrc/cpu/base."""
    return Path(source).parent.name != "base"


def is_kernel(source: str) -> bool:
    """csrc/cpu/<family>/<op>.cpp; what all families share lies in folders that are no family, what
    the operators of one share begins with an underscore."""
    return (ROOT / "kernels" / Path(source).parent.name).is_dir() and Path(source).name[0] != "_"


def write_list(target: Path, kernels: list[str], levels: Iterable[str]) -> None:
    """The header by which csrc/cpu/base/plugin.cpp knows every kernel, F(level, op) for each, and
    every level, F(level), the best one first."""
    each = " ".join(f"F(level, {Path(source).stem})" for source in kernels)
    best_first = " ".join(f"F({level})" for level in reversed(list(levels)))
    text = f"#define TRANSOM_EACH(F, level) {each}\n#define TRANSOM_LEVELS(F) {best_first}\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def up_to_date(done: Path) -> bool:
    """An object newer than everything that its compilation read, and than this file."""
    listed = done.with_suffix(".d")
    if not done.exists() or not listed.exists():
        return False
    read = [path for path in listed.read_text().partition(":")[2].split() if path != "\\"]
    newest = done.stat().st_mtime
    return all(
        os.path.exists(path) and os.path.getmtime(path) < newest for path in (*read, __file__)
    )


class platform_wheel(bdist_wheel):
    """A wheel with the library alone fits every Python 3 of its platform; with the extension, the
    Python that it was built for."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        if self.root_is_pure or any(Path(self.bdist_dir).glob("transom/_C.*.so")):
            return tag
        return "py3", "none", tag[2]


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
    ext_modules=extensions(),
    cmdclass={
        "bdist_wheel": platform_wheel,
        "build_ext": build_compiled,
        "editable_wheel": develop,
    },
    package_data={
        "": ["py.typed", "*.h", "*.pyi", "*.html", "*.json"],
        "transom.conformance.ascend": ["*.c"],
        "transom.cli": ["templates/**/*.jinja"],
    },
    include_package_data=False,
)
