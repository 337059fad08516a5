"""The native library under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

One level by default. TRANSOM_TEST_SANITIZERS=all takes every level that this processor has, and
ThreadSanitizer as well.
"""

from __future__ import annotations

import os
import platform

import pytest
import torch

import transom

from .replay import build, calls

COMPILER = build.host_compiler()
ALL = os.environ.get("TRANSOM_TEST_SANITIZERS") == "all"
pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler (g++, c++ or clang++) to build with"
)
CAPABILITY = torch.backends.cpu.get_cpu_capability()


def levels():
    """Of this processor, the one to run by default first."""
    if platform.machine() == "aarch64":
        return ["neon"]
    if platform.machine() != "x86_64" or CAPABILITY == "DEFAULT":
        return ["baseline"]
    return ["avx2", "baseline", *(["avx512"] if "AVX512" in CAPABILITY else [])]


def links(kind, folder):
    """True if the compiler has the sanitizer's library, which is a package of its own here and
    there."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    try:
        build.run(COMPILER, f"-fsanitize={kind}", source, "-o", folder / "empty")
    except AssertionError:
        return False
    return True


@pytest.fixture
def checked(made_once, tmp_path):
    """(kind, level) -> (driver, library) built with that sanitizer."""

    def built(kind, level):
        if not links(kind, tmp_path):
            pytest.skip(
                f"{COMPILER} has no library for -fsanitize={kind}; install libasan, "
                "libubsan and libtsan, or clang's compiler-rt"
            )

        def make_driver(folder):
            build.driver(folder, COMPILER, f"-fsanitize={kind}", "-g", "-fno-sanitize-recover=all")

        def make_library(folder):
            build.library(folder, COMPILER, TRANSOM_SANITIZE=kind, TRANSOM_LEVELS=level)

        driver = made_once(f"replay-{kind}", make_driver) / "replay"
        return driver, made_once(f"{kind}-{level}", make_library) / "lib/transom/_native.so"

    return built


def run(driver, library, given, folder, level, threads):
    # Nothing is freed at the end of a process that is about to end.
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return calls.run(
        [driver], library, given, folder, threads, TRANSOM_NATIVE_LEVEL=level, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("level", levels() if ALL else levels()[:1])
def test_memory_and_undefined_behaviour(checked, tmp_path, level):
    given = calls.everything(20 if ALL else 6)
    answers = run(*checked("address,undefined", level), given, tmp_path, level, (1, 3))
    assert calls.wrong(given, answers) == []
    assert calls.threads_of(given, answers, least=2) == {op.name for op in calls.operators()}


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="ThreadSanitizer runs with TRANSOM_TEST_SANITIZERS=all")
@pytest.mark.parametrize("level", levels()[:1])
def test_races(checked, tmp_path, level):
    given = calls.everything(6)
    answers = run(*checked("thread", level), given, tmp_path, level, (1, 2, 5))
    assert calls.wrong(given, answers) == []
    assert calls.threads_of(given, answers, least=2) == {op.name for op in calls.operators()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, fault, seen",
    [
        ("address,undefined", "OVERFLOWS", "signed integer overflow"),
        ("address,undefined", "READS_BEHIND", r"AddressSanitizer: SEGV(.|\n)*running sinkhorn"),
        pytest.param(
            "thread",
            "RACES",
            "ThreadSanitizer: data race",
            marks=pytest.mark.skipif(
                not ALL, reason="ThreadSanitizer runs with TRANSOM_TEST_SANITIZERS=all"
            ),
        ),
    ],
    ids=["overflows_an_int", "reads_behind_its_input", "races"],
)
def test_the_sanitizer_sees_a_kernel_that(checked, wrong, tmp_path, kind, fault, seen):
    driver, _ = checked(kind, levels()[0])
    library = wrong(fault, f"-fsanitize={kind}", "-fno-sanitize-recover=all")
    given = [calls.example(transom.ops()["sinkhorn"])]
    with pytest.raises(AssertionError, match=seen):
        run(driver, library, given, tmp_path, "", (1, 2))
