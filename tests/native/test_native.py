"""The native kernels: what the kit cannot know of threads, levels, sizes and the library itself."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import transom
from transom.abi import open_library
from transom.backends import native

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def library():
    from transom.backends.native import library

    return library()


def gemm(dtype=torch.float32, M=53, K=1100, N=61, E=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=g).to(dtype)
    w = (torch.randn(E, N, K, generator=g) / K**0.5).to(dtype)
    return x, w, torch.tensor([3, 3, 40, M])


def experts(dtype=torch.float32, T=37, D=70, width=50, E=6, K=3):
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(-1, E, (T, K), generator=g)
    gate_up = torch.randn(E, 2 * width, D, generator=g).to(dtype) / D**0.5
    down = torch.randn(E, D, width, generator=g).to(dtype) / width**0.5
    x, weights = torch.randn(T, D, generator=g).to(dtype), torch.rand(T, K, generator=g)
    return x, ids, weights, gate_up, down


def streams(dtype=torch.float32, T=300, R=4, D=1100):
    g = torch.Generator().manual_seed(3)
    f, x = torch.randn(T, D, generator=g).to(dtype), torch.randn(T, R, D, generator=g).to(dtype)
    return f, x, torch.rand(T, R, generator=g), torch.rand(T, R, R, generator=g)


def logits(dtype=torch.float32, T=4100, R=4):
    g = torch.Generator().manual_seed(4)
    return ((4 * torch.randn(T, R, R, generator=g)).to(dtype),)


def mixing(dtype=torch.float32, T=300, R=4, D=1100):
    g = torch.Generator().manual_seed(5)
    N = (2 + R) * R
    x, fn = torch.randn(T, R, D, generator=g).to(dtype), torch.randn(N, R * D, generator=g)
    return x, fn / (R * D) ** 0.5, torch.rand(3, generator=g), torch.randn(N, generator=g)


CALLS = {
    "grouped_gemm": gemm,
    "moe_experts": experts,
    "mhc_post": streams,
    "mhc_pre": mixing,
    "sinkhorn": logits,
}
NUMBERS = {
    "mhc_pre": dict(iterations=5, eps=1e-6, rms_eps=1e-6, post_scale=2.0),
    "sinkhorn": dict(iterations=5, eps=1e-6),
}


def run(op, *args, impl="native", **kwargs):
    with transom.use(impl), transom.record() as calls:
        out = getattr(transom, op)(*args, **NUMBERS.get(op, {}) | kwargs)
    assert [c.impl for c in calls if c.op == op] == [impl]
    return out


def same(a, b):
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fresh(code, **environment):
    """What a fresh process prints."""
    code = "import torch, transom\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_at_any_number_of_threads(threads, op, dtype):
    args = CALLS[op](dtype)
    threads(1)
    one = run(op, *args)
    for n in (2, 5):
        threads(n)
        assert same(run(op, *args), one)


def test_a_row_has_the_same_bits_alone_and_among_others():
    x, w, _ = gemm(torch.bfloat16)
    together = run("grouped_gemm", x, w, torch.tensor([0, 0, 53, 53]))
    for m in (0, 1, 30, 52):
        alone = run("grouped_gemm", x[m : m + 1], w, torch.tensor([0, 0, 1, 1]))
        assert torch.equal(alone[0], together[m])


def test_a_token_has_the_same_bits_alone_and_among_others():
    x, ids, weights, gate_up, down = experts()
    together = run("moe_experts", x, ids, weights, gate_up, down)
    for t in (0, 17, 36):
        one = slice(t, t + 1)
        alone = run("moe_experts", x[one], ids[one], weights[one], gate_up, down)
        assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize("op", ["mhc_pre", "sinkhorn"])
@pytest.mark.parametrize("R", [1, 3, 4, 16])
def test_a_token_of_streams_has_the_same_bits_alone_and_among_others(threads, op, R):
    args = CALLS[op](torch.bfloat16, T=70, R=R)
    together = run(op, *args)
    for n in (1, 3):
        threads(n)
        for t in (0, 33, 69):
            alone = run(op, args[0][t : t + 1], *args[1:])
            whole = together if isinstance(together, tuple) else (together,)
            assert same(
                alone,
                tuple(y[t : t + 1] for y in whole) if op == "mhc_pre" else whole[0][t : t + 1],
            )


@pytest.mark.parametrize("R, D", [(1, 1), (2, 9), (3, 341), (4, 512), (5, 1024), (16, 70), (4, 0)])
@pytest.mark.parametrize("T", [0, 1, 2, 17, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mhc_pre_across_the_edges_of_blocks_and_pieces(dtype, T, R, D):
    x, *rest = mixing(dtype, T, R, D)
    apart = torch.full((T, R + 1, D + 3), float("nan"), dtype=dtype)[:, 1:, :D].copy_(x)
    want = run("mhc_pre", x, *rest, impl="reference")
    for given in (x, apart):
        for got, expected in zip(run("mhc_pre", given, *rest), want, strict=True):
            limit = 1e-4 + 2 * torch.finfo(got.dtype).eps * expected.abs()
            assert ((got - expected).abs() <= limit).all()


@pytest.mark.parametrize("R", [1, 2, 4, 7, 16])
def test_sinkhorn_of_masked_and_extreme_logits(R):
    (x,) = logits(T=19, R=R)
    x[0] *= 20
    x[1, 0, R // 2] = -float("inf") if R > 1 else 0.0
    x[2] = -95.0 * torch.eye(R)
    x[3, R - 1] = float("nan")
    for eps in (0.0, 1e-6):
        got = run("sinkhorn", x, iterations=20, eps=eps)
        want = run("sinkhorn", x, impl="reference", iterations=20, eps=eps)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_pieces_of_the_tokens_give_the_same_bits(monkeypatch):
    args = experts(T=3000, D=512, width=256)
    want = run("moe_experts", *args)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "1")
    assert torch.equal(run("moe_experts", *args), want)


@pytest.mark.parametrize("op", CALLS)
def test_several_threads_may_call_at_once(op):
    args = CALLS[op]()
    want = run(op, *args)
    function = getattr(transom, op).impls["native"].function
    call = functools.partial(function, *args, **NUMBERS.get(op, {}))
    with ThreadPoolExecutor(4) as pool:
        found = [f.result() for f in [pool.submit(call) for _ in range(40)]]
    assert all(same(y, want) for y in found)


def test_a_forked_child_computes_the_same():
    out = fresh(
        """
        import os
        x, w, o = torch.randn(9, 40), torch.randn(2, 30, 40), torch.tensor([4, 9])
        torch.set_num_threads(2)
        with transom.use("native"):
            want = transom.grouped_gemm(x, w, o)
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(transom.grouped_gemm(x, w, o), want) else 1)
            print(os.waitpid(child, 0)[1])
        """
    )
    assert out.split() == ["0"]


def test_no_second_pool_of_threads_is_made():
    out = fresh(
        """
        import os
        torch.set_num_threads(3)
        big = torch.randn(400, 400); big @ big; torch.randn(1 << 20).sin()
        before = len(os.listdir("/proc/self/task"))
        x, w, o = torch.randn(64, 256), torch.randn(2, 300, 256), torch.tensor([40, 64])
        with transom.use("native"):
            for _ in range(5):
                transom.grouped_gemm(x, w, o)
        print(len(os.listdir("/proc/self/task")) - before)
        """
    )
    assert out.split() == ["0"]


def test_the_threads_of_torch_are_used():
    out = fresh(
        """
        import os
        torch.set_num_threads(3)
        x, w, o = torch.randn(64, 256), torch.randn(2, 300, 256), torch.tensor([40, 64])
        before = len(os.listdir("/proc/self/task"))
        with transom.use("native"):
            transom.grouped_gemm(x, w, o)
        print(len(os.listdir("/proc/self/task")) - before)
        """
    )
    assert out.split() == ["2"]


def test_the_library_offers_what_csrc_has_a_file_of():
    root = Path(__file__).parents[2]
    families = [
        p.name for p in (root / "kernels").iterdir() if (root / "csrc/cpu" / p.name).is_dir()
    ]
    files = {p.stem for f in families for p in (root / "csrc/cpu" / f).glob("[!_]*.cpp")}
    assert {entry.op for entry in library().entries} == files
    with_files = {op.name for op in transom.ops().values() if native.offered(op) is not None}
    assert with_files == files


def test_without_the_library_each_operator_that_it_has_says_so(monkeypatch):
    has = {op.path for op in transom.ops().values() if native.offered(op) is not None}
    monkeypatch.setattr(native, "probe", lambda: "there is none")
    assert {op.path for op in transom.ops().values() if native.offered(op) is not None} == has


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "neon"])
def test_every_level_that_this_processor_has_computes_the_same(level):
    code = """
        from transom.backends.native import probe
        print(probe() or "")
        if probe() is None:
            g = torch.Generator().manual_seed(1)
            x, w = torch.randn(30, 333, generator=g), torch.randn(3, 41, 333, generator=g)
            o = torch.tensor([1, 9, 30])
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                a, b = x.to(dtype), w.to(dtype)
                with transom.use("native"): y = transom.grouped_gemm(a, b, o).double()
                with transom.use("reference"): want = transom.grouped_gemm(a, b, o).double()
                limit = 333 * 2**-24 * 40 + torch.finfo(dtype).eps * want.abs()
                assert ((y - want).abs() <= limit).all()
    """
    out = fresh(code, TRANSOM_NATIVE_LEVEL=level).strip()
    assert out == "" or f"TRANSOM_NATIVE_LEVEL is '{level}'" in out
    if library().version.endswith(level):
        assert out == ""


@pytest.mark.parametrize("op", ["grouped_gemm", "moe_experts"])
def test_what_it_cannot_read_is_declined_with_a_sentence(op):
    args = [a.double() if a.is_floating_point() else a for a in CALLS[op]()]
    (shown,) = transom.explain(op, *args).rejected["native"]
    assert shown == "x is float64; supported: float32, bfloat16, float16"


def test_more_streams_than_its_tile_holds_are_declined_with_a_sentence():
    (shown,) = transom.explain("mhc_post", *streams(T=1, R=17, D=3)).rejected["native"]
    assert shown == "R = 17; supported: at most 16"
    run("mhc_post", *streams(T=1, R=16, D=3))
    for op, args in ("mhc_pre", mixing(T=1, R=17, D=3)), ("sinkhorn", logits(T=1, R=17)):
        (shown,) = transom.explain(op, *args, **NUMBERS[op]).rejected["native"]
        assert shown == "R = 17; supported: at most 16"
        (wide,) = transom.explain(
            op, args[0].double(), *(a.double() for a in args[1:]), **NUMBERS[op]
        ).rejected["native"]
        assert wide.endswith("is float64; supported: float32, bfloat16, float16")


def test_rows_beyond_2_to_the_31_elements_are_addressed():
    far = 2**31 + 64
    try:
        storage = torch.empty(2 * far + 64, dtype=torch.bfloat16)  # touched in three places only
    except RuntimeError:
        pytest.skip("the system promises no 8 GB of address space")
    w = storage.as_strided((3, 4, 16), (far, 16, 1))
    w.copy_(torch.randn(3, 4, 16))
    x = torch.randn(5, 16).bfloat16()
    offsets = torch.tensor([1, 2, 5])
    got = run("grouped_gemm", x, w, offsets)
    assert torch.equal(got, run("grouped_gemm", x, w.contiguous(), offsets))


def test_the_library_needs_neither_torch_nor_an_openmp_of_its_own():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf to ask")
    path = library().path
    options = (["-d"], ["--dyn-syms", "--wide"])
    told = "".join(
        subprocess.run([readelf, *o, path], capture_output=True, text=True, check=True).stdout
        for o in options
    )
    needed = [line for line in told.splitlines() if "NEEDED" in line]
    assert not [n for n in needed if any(x in n for x in ("omp", "torch", "c10", "stdc++"))]
    exported = [
        line.split()[-1] for line in told.splitlines() if " GLOBAL " in line and " UND " not in line
    ]
    # the probes are what `transom bench` calls: transom.bench.ceilings
    assert [name for name in exported if not name.startswith("transom_probe_")] == [
        "transom_plugin_v1"
    ]


def test_the_library_is_opened_once():
    assert open_library(library().path).handle is library().handle
