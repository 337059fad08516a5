"""The native library in a process without Python: guard pages, poison, threads, far addresses."""

from __future__ import annotations

import platform
import shutil

import pytest

import transom

from .replay import calls

REASON = transom.backends()["native"]
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LEVELS = {"x86_64": ("baseline", "avx2", "avx512"), "aarch64": ("neon",)}
HERE = LEVELS.get(platform.machine(), ("baseline",))
OPERATORS = calls.operators()
NAMES = {op.name for op in OPERATORS}


def sinkhorn():
    """The call that the plugins with faults are given."""
    return calls.example(transom.ops()["sinkhorn"])


def library():
    from transom.backends.native import library

    return library().path


def run_at(level, *args, **kwargs):
    try:
        return calls.run(*args, TRANSOM_NATIVE_LEVEL=level, **kwargs)
    except AssertionError as error:
        if f"TRANSOM_NATIVE_LEVEL is '{level}'" in str(error):
            pytest.skip(f"this processor has no {level}")
        raise


@needs_library
@pytest.mark.parametrize("level", HERE)
def test_guard_pages_poison_and_threads(driver, tmp_path, level):
    """Every operator agrees with its reference and gives the same bits on 1, 2, 3 and 7 threads, in
    a pool that gives fewer, with poison of any kind around, and when several calls run at once."""
    given = calls.everything(8)
    answers = run_at(level, [driver], library(), given, tmp_path)
    assert calls.wrong(given, answers) == []
    assert calls.threads_of(given, answers, least=2) == NAMES


@needs_library
@pytest.mark.parametrize("level", HERE)
def test_rows_of_16_bits_and_quantised_weights_stay_within_their_bounds(driver, tmp_path, level):
    """Long enough for products in integers (csrc/cpu/gemm/integers.h)."""
    gemm, experts = (transom.ops()[name] for name in ("grouped_gemm", "moe_experts"))
    given = [
        call
        for dtype in calls.DTYPES[1:]
        for call in (
            *calls.quantised(gemm, dtype, M=1, K=320, N=35, E=1),
            *calls.quantised(gemm, dtype, M=40, K=576, N=50, E=3),
            *calls.quantised(experts, dtype, T=1, D=320, I=256, E=2),
            *calls.quantised(experts, dtype, T=40, D=256, I=384, E=3),
        )
    ]
    answers = run_at(level, [driver], library(), given, tmp_path)
    assert calls.wrong(given, answers) == []
    assert calls.threads_of(given, answers) == {"grouped_gemm", "moe_experts"}


@needs_library
@pytest.mark.parametrize("level", HERE)
def test_every_dim_of_every_tensor_is_addressed_with_64_bits(driver, tmp_path, level):
    given = [
        call
        for op in OPERATORS
        for dtype in calls.DTYPES[:2]
        for near in (calls.example(op, dtype), *calls.drawn(op, 3, dtype))
        for call in calls.far(near)
    ]
    answers = run_at(level, [driver], library(), given, tmp_path, threads=(1, 2))
    assert calls.wrong(given, answers) == []
    assert calls.threads_of(given, answers) == NAMES


@pytest.fixture
def old(driver):
    """The driver on a processor of 2008: SSE4.2, no AVX."""
    if platform.machine() != "x86_64":
        pytest.skip(f"this processor is {platform.machine()}; AVX is x86_64's")
    qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if qemu is None:
        pytest.skip("no qemu-x86_64 to run an old processor; on Debian: apt install qemu-user")
    return [qemu, "-cpu", "Nehalem", driver]


@needs_library
def test_a_processor_without_avx_runs_all_of_it(old, tmp_path):
    given = calls.everything(4)
    answers = calls.run(old, library(), given, tmp_path, threads=(1, 3), TRANSOM_NATIVE_LEVEL="")
    assert calls.wrong(given, answers) == []
    assert calls.threads_of(given, answers) == NAMES
    with pytest.raises(AssertionError, match="which this library or processor has not"):
        calls.run(old, library(), [], tmp_path, TRANSOM_NATIVE_LEVEL="avx2")


def test_the_old_processor_stops_at_an_instruction_of_avx(old, wrong, tmp_path):
    with pytest.raises(AssertionError, match="illegal instruction"):
        calls.run(old, wrong("NEEDS_AVX"), [sinkhorn()], tmp_path)


FAULTS = {
    "READS_BEHIND": "touched a guard page",
    "READS_BEFORE": "touched a guard page",
    "WRITES_BEHIND": "touched a guard page",
    "WRITES_INPUT": "touched a guard page",
    "LEAVES_A_HOLE": "has other bits than in the first run",
    "READS_WORKSPACE": "has other bits than in the first run",
    "OVERRUNS_WORKSPACE": "wrote beside its workspace",
    "COUNTS_THREADS": "has other bits than in the first run",
    "NEEDS_THREADS": "7 threads asked for and one given",
    "ASKS_FOR_MORE": "1 threads, guard page behind: asked the pool for 2",
    "KEEPS_STATE": "has other bits than in the first run",
    "WRAPS_ADDRESSES": "touched a guard page",
    "OVERRUNS_ITS_PACK": "packed: wrote beside its pack",
    "DIFFERS_WHEN_PACKED": "packed: result 0 has other bits than in the first run",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_driver_sees_a_kernel_that(driver, wrong, tmp_path, fault):
    given = [sinkhorn()]
    if fault == "WRAPS_ADDRESSES":
        given = calls.far(sinkhorn())[:1]
    elif "PACK" in fault:
        given = [calls.example(transom.ops()["grouped_gemm"])]
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        calls.run([driver], wrong(fault), given, tmp_path)


def test_the_driver_sees_nothing_in_a_kernel_without_fault(driver, wrong, tmp_path):
    given = [sinkhorn(), calls.example(transom.ops()["grouped_gemm"])]
    answers = calls.run([driver], wrong("NONE"), given, tmp_path)
    assert [len(answer.tensors) for answer in answers] == [1, 1]
