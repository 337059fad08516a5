"""Builds csrc/*.c into the package: a plain shared library, without Python's or torch's headers."""

import importlib.util
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = re.search(r'^version = "(.+)"', (HERE / "pyproject.toml").read_text(), re.M)[1]
# The headers of the transom that is installed.
INCLUDE = importlib.util.find_spec("transom.include").submodule_search_locations[0]


class library(build_ext):
    """One file for every Python: its name has no Python version in it."""

    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"


setup(
    ext_modules=[
        Extension(
            "transom_sim.libtransom_sim",
            sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob("*.c")),
            depends=sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").glob("*.h")),
            include_dirs=[INCLUDE],
            define_macros=[("SIM_VERSION", f'"{VERSION}"')],
            # No contraction: the same bits from every compiler.
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
            ],
            libraries=["m", "pthread"],
        )
    ],
    cmdclass={"build_ext": library},
)
