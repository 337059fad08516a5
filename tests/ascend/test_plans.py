"""Memory plans read from what the compilers left, kernels as text, the search for tiles: none of it
needs the vendor's tools."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from transom.conformance.ascend import chips

GOLDEN = Path(__file__).parent / "golden"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
def test_what_ascend_does_not_take_has_its_sentence():
    import transom
    from transom.conformance import cases
    from transom.conformance.ascend import calls

    op = transom.ops()["sparse_attention"]
    with calls.implementations([op.name]) as impls:
        case = cases.build(op, {**op.examples[0], "v_dim": 0})
        why = calls.refused(op, impls[op.name], case.values, "Ascend910B3")
        case = cases.build(op, dict(op.examples[0]))
        assert calls.refused(op, impls[op.name], case.values, "Ascend910B3") is None
    assert why == "v_dim = 0; supported by Ascend's compiler: 1 or more"
    op = transom.ops()["compress_kv"]
    with calls.implementations([op.name]) as impls:
        case = cases.build(op, {**op.examples[0], "m": 1})
        why = calls.refused(op, impls[op.name], case.values, "Ascend910B3")
    assert why == "m = 1; supported by Ascend's compiler: 2 or more"
    op = transom.ops()["sparse_attention_backward"]
    with calls.implementations([op.name]) as impls:
        case = cases.build(op, dict(op.examples[0]))
        assert calls.refused(op, impls[op.name], case.values, "Ascend910B3") is None
        why = calls.refused(op, impls[op.name], case.values, "Ascend950PR_9589")
    assert why and why.startswith("architecture is 'ascend950pr_9589'; Ascend's compiler fails")


@needs_triton
def test_tiles_shrink_where_gathered_rows_are_ragged():
    import torch

    from transom.backends.triton._choice import Tile
    from transom.backends.triton._launch import even, ragged, record

    tile, x = Tile((("BM", 64), ("BK", 128))), torch.empty(0)
    with record("ascend910b3"):
        assert even(tile, "BK", 2880, x).sizes == (("BM", 64), ("BK", 64))
        assert even(tile, "BK", 37, x)["BK"] == 16 and ragged(x, 37, 16)
        assert not ragged(x, 2880, 64)
    with record("sm_90"):
        assert even(tile, "BK", 37, x) == tile and not ragged(x, 37, 128)


def left(name):
    return (GOLDEN / name).read_text()


def records(name):
    return [json.loads(left(name))]


def test_a_910_plan_is_read_from_its_records():
    plan = chips.read_plan(
        "Ascend910B3", 0, "", records("product.aic.json"), left("product.910b3.mlir")
    )
    assert plan.fits and plan.cores == 20
    assert plan.use == {"L1": 24576, "L0C": 8192}
    assert plan.capacity == {"UB": 192 << 10, "L1": 512 << 10, "L0C": 128 << 10}
    assert plan.fullest == ("L0C", 0.0625)


def test_a_950_plan_is_read_from_its_program_and_one_line():
    printed = "[AscendNPU IR] Allocated UB size = 197632 bits \n"
    plan = chips.read_plan("Ascend950PR_9589", 0, printed, [], left("attention.950.mlir"))
    assert plan.fits and plan.cores == 32
    assert plan.use == {"UB": 24704, "L1": 11264, "L0C": 12288}
    assert plan.capacity == {"UB": 248 << 10, "L1": 512 << 10, "L0C": 256 << 10}


def test_an_overflow_says_by_how_much():
    printed = (
        'loc("kernel.mlir":2:3): error: ub overflow, requires 1576960 bits while 1572864 bits '
        "available! (possible reason: tiling basic block is too large)\n"
    )
    plan = chips.read_plan("Ascend910B3", 1, printed, [], "")
    assert not plan.fits
    assert plan.why == "UB needs 197120 bytes; the chip has 196608"
    assert plan.fullest == ("UB", 197120 / 196608)


def test_an_overflow_that_was_only_recorded_is_seen():
    told = "cc overflow, requires 2097152 bits while 1048576 bits available!"
    part = {"scope": "cc", "status": "fail", "memory_info_array": [], "error_info": told}
    record = {"Record": [part]}
    plan = chips.read_plan("Ascend910_9391", 1, "error: Failed to run", [record], "")
    assert plan.why == "L0C needs 262144 bytes; the chip has 131072"


def test_an_overflow_that_the_compiler_mended_itself_fits():
    printed = "[NOTE] Ub overflow detected; automatically set enable-code-motion to false"
    buffer = {"offset": [0], "extent": 8 << 22}
    failed = {"scope": "ub", "status": "fail", "error_info": "", "memory_info_array": [buffer]}
    record = {"Record": [failed, {**failed, "status": "success", "memory_info_array": []}]}
    plan = chips.read_plan("Ascend910B3", 0, printed, [record], left("product.910b3.mlir"))
    assert plan.fits and plan.fullest is None


@pytest.mark.parametrize(
    "status, printed, why",
    [
        (
            -6,
            "x/PatternMatch.cpp:135: f(): Assertion `a == b' failed.\nStack dump:\n#0 0x1",
            "the compiler was ended by SIGABRT: `a == b' failed.",
        ),
        (
            1,
            "kernel.mlir:9:1: error: Failed to run pipeline\nkernel.mlir:2:3: error: no such op",
            "the compiler ended with status 1: no such op",
        ),
        (None, "", "the compiler did not end within 900 s"),
    ],
    ids=["assertion", "error", "hang"],
)
def test_a_compiler_that_ends_otherwise_is_a_finding(status, printed, why):
    plan = chips.read_plan("Ascend950PR_9589", status, printed, [], "")
    assert (plan.fits, plan.why) == (False, why)


@needs_triton
def test_a_kernel_becomes_a_module_of_its_own(tmp_path):
    from transom.backends.triton.moe import _gemm
    from transom.conformance.ascend.source import standalone

    text = standalone(_gemm._rows)
    names = [line.split("(")[0][4:] for line in text.splitlines() if line.startswith("def ")]
    assert names[-1] == "_rows" and len(names) == len(set(names))
    assert names.index("rows_of") < names.index("find_tile") < names.index("_rows")
    assert "transom" not in "\n".join(x for x in text.splitlines() if "import" in x)
    compile(text, "kernel.py", "exec")


@needs_triton
def test_what_cannot_be_sent_as_text_is_said():
    from triton import jit

    from transom.conformance.ascend.source import NotPortable, standalone

    with pytest.raises(NotPortable, match="GOLDEN is a PosixPath; expected a function"):
        standalone(jit(_names_a_path))


def _names_a_path(x):
    GOLDEN


@needs_triton
@pytest.mark.parametrize(
    "room, found",
    [
        (64 * 128 * 64, dict(BM=64, BN=128, BK=64)),
        (16**3 - 1, None),
        (10**9, dict(BM=256, BN=256, BK=128)),
        (16 * 16 * 32, dict(BM=16, BN=32, BK=16)),
    ],
)
def test_the_largest_tile_is_found(room, found):
    from transom.conformance.ascend.tiles import climb

    most = dict(BM=256, BN=256, BK=128)
    tile = climb(dict(BM=32, BN=64, BK=32), lambda t: t["BM"] * t["BN"] * t["BK"] <= room, most)
    if found is None:
        assert tile is None
    else:
        product = 1
        for _, size in tile.sizes:
            product *= size
        wanted = 1
        for size in found.values():
            wanted *= size
        assert product == wanted


@needs_triton
@pytest.mark.parametrize(
    "device, said",
    [("npu", ["v_dim = 0; supported by Ascend's compiler: 1 or more"]), ("cuda", [])],
)
def test_what_a_kernel_cannot_take_there_is_a_requirement(device, said):
    import dataclasses

    import transom
    from transom.conformance import cases
    from transom.conformance.ascend import calls

    op = transom.ops()["sparse_attention"]
    case = cases.build(op, {**op.examples[0], "v_dim": 0})
    facts = dataclasses.replace(transom.dispatch.facts_of(op, case.values), device=device)
    with calls.implementations() as impls:
        seen = [r(facts) for r in impls[op.name].requires if "v_dim" in r.reads]
    assert [why for why in seen if why] == said


@needs_triton
def test_a_found_tile_is_stored_beside_the_others(tmp_path, monkeypatch):
    from transom.backends.triton import _choice
    from transom.conformance.ascend import tiles

    shutil.copy(_choice.FOLDER / "grouped_gemm.json", tmp_path)
    monkeypatch.setattr(_choice, "FOLDER", tmp_path)
    _choice._file.cache_clear()
    before = _choice.table("grouped_gemm.many")
    tiles.store("grouped_gemm.many", "ascend910b", _choice.Tile((("BM", 32), ("BN", 64))))
    after = dict(_choice.table("grouped_gemm.many"))
    assert after.pop("ascend910b")[0].sizes == (("BM", 32), ("BN", 64))
    before.pop("ascend910b", None)
    assert after == before
    assert _choice.tiles("grouped_gemm.many", "ascend910b3")[0]["BM"] == 32
    _choice._file.cache_clear()


def test_a_running_sum_is_written_out():
    from transom.conformance.ascend.lower import plain_of

    text = plain_of(
        "  func.func private @triton_cumsum_0(tensor<8xi32>, i32, i1) -> tensor<8xi32>\n"
        "    annotation.mark %4 {hint} : tensor<8xi32>\n"
        "    %9 = func.call @triton_cumsum_0(%7, %c0, %f) : (tensor<8xi32>, i32, i1)"
        " -> tensor<8xi32>\n"
    )
    assert "triton_cumsum" not in text and "annotation" not in text
    assert "%9, %sum_9_all = scf.for" in text and "arith.addi" in text
