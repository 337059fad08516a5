"""The sources of the native library under each compiler, and what the built library consists of."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from unittest import mock

import pytest

import transom

from .replay import build

ROOT = build.ROOT
with mock.patch("setuptools.setup"):  # its functions and flags are wanted, not its action
    SETUP = runpy.run_path(str(ROOT / "setup.py"))
TARGETS = {
    "g++": ("x86_64", "apt install g++"),
    "clang++": ("x86_64", "apt install clang"),
    "aarch64-linux-gnu-g++": ("aarch64", "apt install g++-aarch64-linux-gnu"),
    "clang++ --target=aarch64-linux-gnu": ("aarch64", "apt install clang g++-aarch64-linux-gnu"),
}
CASES = [
    (compiler, machine, level)
    for compiler, (machine, _) in TARGETS.items()
    for level in SETUP["LEVELS"][machine]
]
REASON = transom.backends()["native"]


def needs(compiler):
    """Skips where the compiler, or for another processor its headers, are not installed."""
    install = TARGETS[compiler][1]
    command = compiler.split()
    if shutil.which(command[0]) is not None:
        source = "#include <stdint.h>\n#include <string.h>\n"
        done = subprocess.run(
            [*command, "-fsyntax-only", "-x", "c++", "-"],
            input=source,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return command
    pytest.skip(f"no {compiler} that compiles here; on Debian: {install}")


@pytest.mark.parametrize("compiler, machine, level", CASES)
def test_the_sources_give_no_warning(tmp_path, compiler, machine, level):
    command = needs(compiler)
    if machine == "x86_64" and " " not in compiler:
        told = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True)
        if not told.stdout.startswith("x86_64"):
            pytest.skip(f"{compiler} compiles for {told.stdout.strip()}; this is a level of x86_64")
    every = sorted((ROOT / "csrc/cpu").rglob("*.cpp"))
    names = [path.relative_to(ROOT).as_posix() for path in every]
    kernels = [name for name in names if SETUP["is_kernel"](name)]
    SETUP["write_list"](tmp_path / "transom_kernels.h", kernels, SETUP["LEVELS"][machine])
    headers = [f"-I{ROOT / 'csrc/include'}", f"-I{tmp_path}"]
    flags = [*SETUP["FLAGS"], "-Werror", "-fsyntax-only", *headers]
    below = [name for name in names if SETUP["has_levels"](name)]
    once = [name for name in names if name not in below]
    build.run(*command, *flags, *once)
    special = SETUP["LEVELS"][machine][level]
    build.run(*command, *flags, *special, f"-DTRANSOM_LEVEL={level}", *below)


def disassembled(library):
    """(function, instruction) of the whole library."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump to disassemble with; on Debian: apt install binutils")
    text = build.run(objdump, "-d", "-C", "--no-show-raw-insn", library)
    if "file format elf64-x86-64" not in text:
        pytest.skip("a question of x86-64 processors")
    function = ""
    for line in text.splitlines():
        if found := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = found[1]
        elif "\t" in line:
            yield function, line.split("\t", 1)[1]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_instructions_of_a_level_stay_in_its_functions():
    """No AVX in the baseline and in what is compiled once, no AVX-512 in avx2."""
    from transom.backends.native import library

    avx = re.compile(r"v[a-z0-9]+\s.*%[xy]mm")
    avx512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|[23]\d)")
    # Some binutils leave names of local functions mangled: there a length stands before it.
    of_level = re.compile(r"(?:::|_)(avx2|avx512|vnni)\b|^_Z.*?transom(?:4(avx2)|6(avx512))")
    seen = {"avx2": False, "avx512": False}
    leaked = []
    for function, instruction in disassembled(library().path):
        named = of_level.search(function)
        level = named and next(filter(None, named.groups())).replace("vnni", "avx512")
        wide = avx512.search(instruction) is not None
        if wide and level != "avx512" or level is None and avx.match(instruction):
            leaked.append(f"{function}: {instruction}")
        if level is not None:
            seen[level] |= wide if level == "avx512" else avx.match(instruction) is not None
    assert leaked == []
    assert all(seen.values()), "the library has no symbols to tell functions by"


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_the_library_imports_only_from_the_c_library():
    """And what may be missing: the two OpenMP functions, the linker's hooks."""
    from transom.backends.native import library

    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf to ask; on Debian: apt install binutils")
    told = build.run(readelf, "--dyn-syms", "-W", library().path)
    wanted = re.findall(r" (GLOBAL|WEAK) +DEFAULT +UND +(\S+)", told)
    assert wanted
    assert {name for bind, name in wanted if bind == "GLOBAL" and "@GLIBC_" not in name} == set()
    weak = {name.partition("@")[0] for bind, name in wanted if bind == "WEAK"}
    hooks = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    assert weak - hooks - {"__cxa_finalize"} == {"GOMP_parallel", "omp_get_thread_num"}
