"""L1 to L3 with the vendor's tools, where their environment has been made.

`transom verify --target ascend --quick` makes it, in TRANSOM_CACHE.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from transom.conformance.ascend import environment as environments

ENVIRONMENT = environments.find() if importlib.util.find_spec("triton") else None
pytestmark = pytest.mark.skipif(
    ENVIRONMENT is None,
    reason="Ascend's compilers are not installed; transom verify --target ascend installs them",
)


@pytest.fixture
def launched(kernels):
    """(kernel, grid, arguments) -> the launch, as the host code of an operator would make it."""
    from transom.backends.triton._choice import Tile
    from transom.backends.triton._launch import Launch

    def make(name, grid, **arguments):
        kernel = getattr(kernels, name)
        sizes = {n: v for n, v in arguments.items() if n.isupper()}
        rest = {n: v for n, v in arguments.items() if not n.isupper()}
        return Launch(kernel, grid, rest, sizes, Tile(()), "")

    return make


@pytest.fixture
def run(launched):
    """Lowers a launch and executes it over its tensors."""
    from transom.conformance.ascend.launch import execute, lower

    def do(name, grid, **arguments):
        launch = launched(name, grid, **arguments)
        execute(ENVIRONMENT, launch, lower(ENVIRONMENT, launch))

    return do


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_lowered_kernel_computes(run, dtype):
    x, y = torch.randn(300).to(dtype), torch.zeros(300, dtype=dtype)
    run("double", (2,), x=x, y=y, n=300, B=256)
    assert torch.equal(y, (x.float() * 2).to(dtype))


def test_a_masked_gather_reads_what_is_masked(run):
    from transom.conformance.ascend.launch import Failed

    table, y = torch.randn(4, 16), torch.zeros(16, 16)
    ids = torch.full((16,), -1, dtype=torch.int32)
    with pytest.raises(Failed, match="outside its tensors"):
        run("gather", (1,), table=table, ids=ids, y=y, n=16, D=16, R=16)
    run("clamped_gather", (1,), table=table, ids=ids, y=y, n=16, D=16, R=16)
    assert (y == 0).all()


@pytest.mark.parametrize(
    "name, why",
    [("last_writes", "y depends on the order of the programs"), ("one_too_many", "y|outside")],
)
def test_a_wrong_kernel_is_caught(run, name, why):
    from transom.conformance.ascend.launch import Failed

    with pytest.raises(Failed, match=why):
        run(name, (3,), y=torch.zeros(64), B=64)


def test_what_the_frontend_refuses_has_its_reason(run):
    from transom.conformance.ascend.launch import Failed

    x = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(Failed, match="umulhi|int32") as caught:
        run("high_product", (1,), x=x, y=x.clone(), B=16)
    assert caught.value.stage == "frontend"


def test_a_frontend_that_crashes_is_a_result(run, monkeypatch, tmp_path):
    from transom.conformance.ascend import launch

    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))  # where lowered programs are kept
    monkeypatch.setattr(launch, "standalone", lambda kernel: "import os\nos.abort()\n")
    with pytest.raises(launch.Failed, match="the compiler's process was ended by SIGABRT"):
        run("double", (1,), x=torch.zeros(16), y=torch.zeros(16), n=16, B=16)


@pytest.mark.parametrize("chip", ["Ascend910B3", "Ascend910_9391", "Ascend950PR_9589"])
def test_a_tile_fits_or_says_by_how_much_not(launched, chip):
    from transom.conformance.ascend.chips import compile_for
    from transom.conformance.ascend.launch import lower

    def plan(size):
        a, b = torch.zeros(size, 64).bfloat16(), torch.zeros(64, size).bfloat16()
        sizes = dict(BM=size, BN=size, BK=64)
        launch = launched("product", (1,), a=a, b=b, y=torch.zeros(size, size), **sizes)
        return compile_for(ENVIRONMENT, lower(ENVIRONMENT, launch), chip)

    small, large = plan(64), plan(512)
    assert small.fits and small.use["L0C"] == 64 * 64 * 4
    assert not large.fits and "needs" in large.why and large.fullest[1] > 1


def test_an_operator_runs_whole(kernels):
    import transom
    from transom.conformance import cases
    from transom.conformance.ascend import calls, verify

    op = transom.ops()["grouped_gemm"]
    with calls.implementations(["grouped_gemm"]) as impls:
        case = cases.build(op, dict(M=24, K=40, N=48, E=4))
        found = list(verify.ran(ENVIRONMENT, op, impls[op.name], case, ("Ascend910B3",)))
    assert [(f.stage, f.why) for f in found] == [("", "")]
    assert found[0].launches == 2


@pytest.mark.parametrize(
    "name, sizes",
    [
        # no multiple of any tile, and rows gathered from the last ones of x
        ("moe_experts", dict(T=6, D=40, I=24)),
        ("moe_experts", dict(T=6, D=37, I=19)),
        ("moe_experts_backward_experts", dict(T=6, D=37, I=19)),
        ("short_conv", dict(C=7)),
        ("engram_gate", dict(D=150)),
        ("engram_gate_backward", dict(D=5000, T=(1,))),
        # one of what is divided by
        ("engram_gate", dict(R=1)),
        ("mhc_head", dict(T=(1,))),
    ],
    ids=str,
)
def test_odd_sizes_stay_inside_their_tensors(kernels, name, sizes):
    import transom
    from transom.conformance import cases
    from transom.conformance.ascend import calls, verify

    op = transom.ops()[name]
    with calls.implementations([name]) as impls:
        case = cases.build(op, {**op.examples[0], **sizes}, torch.bfloat16)
        found = list(verify.ran(ENVIRONMENT, op, impls[name], case, ("Ascend910B3",)))
    assert [(f.stage, f.why) for f in found] == [("", "")]


def test_a_wrong_result_is_caught(kernels, monkeypatch):
    import transom
    from transom.conformance import cases
    from transom.conformance.ascend import calls, kept, verify

    op = transom.ops()["grouped_gemm"]
    run = verify.run
    monkeypatch.setattr(kept, "find", lambda *_: None)  # an earlier run's, when it was right

    def off_by_one(*args):
        out, launches = run(*args)
        return out + np.float32(1), launches

    monkeypatch.setattr(verify, "run", off_by_one)
    with calls.implementations(["grouped_gemm"]) as impls:
        case = cases.build(op, dict(M=24, K=40, N=48, E=4))
        found = list(verify.ran(ENVIRONMENT, op, impls[op.name], case, ("Ascend910B3",)))
    assert found[0].stage == "result" and "expected" in found[0].why
