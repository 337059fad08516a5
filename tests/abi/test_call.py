"""Calls of plugins in C: what is handed over and what comes back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import transom

pytestmark = pytest.mark.usefixtures("by")


def test_a_plugin_runs_and_is_recorded(build, gemm):
    plugin = transom.CPlugin(build())
    x, w, offsets = gemm()
    with transom.use(grouped_gemm="composite"):
        want = transom.grouped_gemm(x, w, offsets)
    with transom.use(grouped_gemm="toy"), transom.record() as calls:
        got = transom.grouped_gemm(x, w, offsets)
    assert [c.impl for c in calls] == ["toy"]
    torch.testing.assert_close(got, want)
    assert plugin.refused.keys() == {"no_such_operator/toy"}
    assert "no operator 'no_such_operator'" in plugin.refused["no_such_operator/toy"]


def test_strided_and_int32_arguments_arrive_as_they_are(build, gemm):
    transom.CPlugin(build())
    x, w, offsets = gemm()
    strided = torch.empty(6, 16)[:, ::2].copy_(x)
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    with transom.use(grouped_gemm="toy"):
        want = transom.grouped_gemm(x, w, offsets)
        assert torch.equal(transom.grouped_gemm(strided, transposed, offsets.int()), want)


@pytest.mark.parametrize(
    "code, error",
    [
        (1, ValueError),
        (2, transom.NotSupported),
        (3, MemoryError),
        (4, transom.PluginError),
        (77, transom.PluginError),
    ],
)
def test_the_code_of_a_failure_says_what_is_raised(build, code, error, gemm):
    transom.CPlugin(build(f"TOY_FAILS={code}"))
    with transom.use(grouped_gemm="toy"), pytest.raises(error, match="the toy is broken"):
        transom.grouped_gemm(*gemm())


@pytest.fixture
def told(gemm):
    """A function that answers what a call of tells.c sees."""

    def call():
        with transom.use(grouped_gemm="tells"):
            return transom.grouped_gemm(*gemm()).flatten()[:7].tolist()

    return call


def test_a_call_tells_of_determinism_and_threads_and_starts_with_a_clean_status(
    build, told, deterministic
):
    transom.CPlugin(build(file="tells.c"))
    threads = torch.get_num_threads()
    for asked in (False, True, False):
        deterministic(asked)
        for _ in range(2):
            assert told() == [asked, 80, threads, 0, 0, 1, 1]
    try:
        torch.set_num_threads(threads + 2)
        assert told()[2] == threads + 2
    finally:
        torch.set_num_threads(threads)


def test_supports_is_told_of_determinism(build, told, deterministic):
    transom.CPlugin(build("FAST_ONLY", file="tells.c"))
    assert told()[0] == 0
    deterministic(True)
    with pytest.raises(transom.NotSupported, match="tells: sums in any order"):
        told()


def test_floats_that_are_equal_but_not_the_same_arrive_as_they_are(build):
    """0.0 and -0.0 are one key of a plan."""
    name = "TRANSOM_SPARSE_ATTENTION"
    defines = ('OP="sparse_attention"', f"HASH={name}_HASH", f"FLOAT={name}_SCALE")
    transom.CPlugin(build(*defines, file="tells.c"))
    q, kv, visible = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 4), torch.ones(1, 1).long()
    with transom.use(sparse_attention="tells"):
        seen = [
            transom.sparse_attention(q, kv, visible=visible, scale=scale).flatten()[0].item()
            for scale in (0.0, -0.0, 0.5)
        ]
    assert [str(number) for number in seen] == ["0.0", "-0.0", "0.5"]


@pytest.mark.parametrize("bytes", [64, 1 << 16], ids=["of its own", "of the thread"])
def test_threads_that_call_at_once_share_nothing(build, gemm, bytes):
    transom.CPlugin(build("SLOW", f"BYTES={bytes}", file="tells.c"))
    _, w, offsets = gemm()
    inputs = [torch.full((6, 8), float(i)) for i in range(6)]
    together = threading.Barrier(len(inputs))

    def work(x):
        together.wait()
        return [transom.grouped_gemm(x, w, offsets) for _ in range(10)]

    with transom.use(grouped_gemm="tells"), ThreadPoolExecutor(len(inputs)) as pool:
        for x, results in zip(inputs, pool.map(work, inputs), strict=True):
            assert all(torch.equal(y, x[:, :5]) for y in results)


def test_a_call_within_a_call_shares_nothing(build, gemm, by):
    """As when the garbage collector runs a finaliser that computes, amid the writing of a call."""
    transom.CPlugin(build("SLOW", "BYTES=65536", file="tells.c"))
    function = transom.grouped_gemm.impls["tells"].function
    x, w, offsets = gemm()
    ones, twos = torch.full_like(x, 1.0), torch.full_like(x, 2.0)
    run = function.prepared()
    inner = []

    def call_within(*args):
        inner.append(run(twos, w, offsets))
        return torch.empty(6, 5)

    if by == "cffi":

        class Tensor(torch.Tensor):
            def data_ptr(self):
                if not inner:
                    call_within()
                return super().data_ptr()

        y = run(ones, w.as_subclass(Tensor), offsets)
    else:
        run(ones, w, offsets)

        def makers(values):
            del function.makers  # the call within has its own
            return ((call_within, (), None),)

        function.makers = makers
        y = function.prepared()(ones, w[:, :, :], offsets.int())  # of which no maker is known
    assert torch.equal(y, ones[:, :5]) and torch.equal(inner[0], twos[:, :5])


def test_a_view_that_negates_when_read_is_resolved(build, gemm):
    transom.CPlugin(build())
    x, w, offsets = gemm()
    negative = torch.complex(torch.zeros(6, 8), -x).conj().imag
    assert negative.is_neg() and torch.equal(negative, x)
    with transom.use(grouped_gemm="toy"):
        want = transom.grouped_gemm(x.clone(), w, offsets)
        strided = torch.empty(6, 16)[:, ::2].copy_(x)
        assert torch.equal(transom.grouped_gemm(strided, w, offsets), want)
        assert torch.equal(transom.grouped_gemm(negative, w, offsets), want)


def test_what_a_call_writes_to_is_marked_as_written(build):
    name = "TRANSOM_HASHED_EMBEDDING_OUT"
    defines = ('OP="hashed_embedding_out"', f"HASH={name}_HASH", f"WRITES={name}_OUT")
    transom.CPlugin(build(*defines, file="tells.c"))
    tokens, table, out = torch.zeros(1, 4).long(), torch.zeros(8, 4), torch.zeros(1, 4, 4)
    numbers = dict(multipliers=torch.tensor([3, 5]), moduli=torch.tensor([[7]]))
    numbers |= dict(offsets=torch.tensor([0]), pad=0)
    before = out._version
    with transom.use(hashed_embedding_out="tells"):
        transom.hashed_embedding(tokens, table, out=out, **numbers)
    assert out.flatten()[1] == 80
    assert out._version == before + 1


QUANTISED = {
    "plain": [232, 128, 0, 0, 0, 0, 0, 0],
    "int8": [8, 128, 232, 1, 0, 0, 5, 8],  # int8 codes, float32 scales, no zeros, "int8:1x0"
    "int4": [108, 64, 232, 1, 108, 1, 5, 10],
    "mxfp4": [108, 64, 108, 4, 0, 0, 5, 10],
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_weight_takes_four_places(build, kind):
    transom.CPlugin(build("PLACES=TRANSOM_GROUPED_GEMM_WEIGHT", file="tells.c"))
    w = torch.randn(3, 5, 128)
    w = w if kind == "plain" else transom.quantize(w, kind)
    with transom.use(grouped_gemm="tells"):
        y = transom.grouped_gemm(torch.randn(6, 128), w, torch.tensor([2, 2, 5]))
    assert y.flatten()[:8].tolist() == QUANTISED[kind]


def test_an_absurd_workspace_is_an_error_of_the_plugin(build, gemm):
    transom.CPlugin(build("BYTES=(UINT64_C(1)<<41)", file="tells.c"))
    with transom.use(grouped_gemm="tells"):
        with pytest.raises(transom.PluginError, match="asks for 2199023255552 bytes of workspace"):
            transom.grouped_gemm(*gemm())


@pytest.mark.parametrize("T", [0, 1])
def test_quantised_and_optional_and_many_arguments_arrive(build, by, T):
    """By both roads the native kernels compute the same bits: they share one call."""
    if transom.backends()["native"] is not None:
        pytest.skip(transom.backends()["native"])
    g = torch.Generator().manual_seed(5)
    x, ids = torch.randn(T, 32, generator=g), torch.randint(0, 4, (T, 2), generator=g)
    weights = torch.rand(T, 2, generator=g)
    gate_up, down = torch.randn(4, 64, 32, generator=g), torch.randn(4, 32, 32, generator=g)
    args = dict(gate_up_bias=torch.randn(4, 64, generator=g), limit=7.0)
    with transom.use(moe_experts="composite"):
        want = transom.moe_experts(x, ids, weights, gate_up, down, **args)
    with transom.use(moe_experts="native"), transom.record() as calls:
        got = transom.moe_experts(x, ids, weights, gate_up, down, **args)
    assert calls[0].impl == "native"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
