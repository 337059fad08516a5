"""Native gradients of the experts: borders, strides, parts of the rows, threads."""

from __future__ import annotations

import pytest
import torch

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(op, *args, impl="native", **kwargs):
    with transom.use(impl), transom.record() as calls:
        out = transom.ops()[op](*args, **kwargs)
    assert [c.impl for c in calls if c.op == op] == [impl]
    return out if isinstance(out, tuple) else (out,)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(got, want, size=1.0):
    for a, b in zip(got, want, strict=True):
        largest = b.double().abs().max() if b.numel() else 0.0
        limit = 3e-6 * size * largest + 2 * torch.finfo(a.dtype).eps * b.double().abs()
        assert ((a.double() - b.double()).abs() <= limit + 1e-30).all()


def transposed(w):
    return w.transpose(1, 2).contiguous().transpose(1, 2)


def gemm(M, N, K, E, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    dy, x = (torch.randn(M, n, generator=g).to(dtype) for n in (N, K))
    return dy, x, (torch.randn(E, N, K, generator=g) / N**0.5).to(dtype)


def experts(T, D, width, E, K, dtype=torch.float32, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E - 1, (T, K), generator=g)  # the last expert has no rows
    gate_up = (torch.randn(E, 2 * width, D, generator=g) / D**0.5).to(dtype)
    down = (torch.randn(E, D, width, generator=g) / width**0.5).to(dtype)
    dy, x = (torch.randn(T, D, generator=g).to(dtype) for _ in range(2))
    form = {}
    if bias:
        form["gate_up_bias"] = torch.randn(E, 2 * width, generator=g).to(dtype)
    return (dy, x, ids, torch.rand(T, K, generator=g), gate_up, down), form


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K", [(31, 17), (129, 257), (1, 40), (256, 5), (128, 256)])
def test_gradients_of_grouped_gemm_at_the_borders_of_blocks(dtype, N, K):
    dy, x, w = gemm(530, N, K, 4, dtype)
    offsets = torch.tensor([1, 300, 300, 520])
    for weight in (w, transposed(w)):
        args = dy, weight, offsets
        close(
            run("grouped_gemm_backward_x", *args),
            run("grouped_gemm_backward_x", *args, impl="reference"),
        )
    args = dy.t().contiguous().t(), torch.cat([x, x], 1)[:, :K], offsets, w
    (got,) = run("grouped_gemm_backward_weight", *args)
    close((got,), run("grouped_gemm_backward_weight", *args, impl="reference"), 4)
    assert (got[2] == 0).all()


def test_a_gradient_in_another_dtype_than_the_rows():
    dy, x, w = gemm(40, 33, 47, 2, torch.bfloat16)
    args = dy, x, torch.tensor([20, 40]), w.float()
    (got,) = run("grouped_gemm_backward_weight", *args)
    assert got.dtype == torch.float32
    close((got,), run("grouped_gemm_backward_weight", *args, impl="reference"))


@pytest.mark.parametrize("spec", ["int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("N, K", [(70, 320), (33, 40), (130, 66)])
def test_dx_of_a_quantised_weight_is_that_of_the_dequantised_one(spec, N, K):
    dy, _, w = gemm(50, N, K, 2, torch.float32)
    weight = transom.quantize(w, spec)
    plain = weight.dequantize()
    for ends in ([1, 4], [20, 50]):
        offsets = torch.tensor(ends)
        got = run("grouped_gemm_backward_x", dy, weight, offsets)
        assert same(got, run("grouped_gemm_backward_x", dy, plain, offsets))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("T, D, width", [(1, 33, 31), (9, 130, 129), (140, 64, 40)])
def test_gradients_of_the_experts(activation, interleaved, T, D, width):
    args, form = experts(T, D, width, 5, 3)
    form |= dict(activation=activation, limit=0.9, interleaved=interleaved)
    want = run("moe_experts_backward_experts", *args, impl="reference", **form)
    close(run("moe_experts_backward_experts", *args, **form), want, 20)
    form["down_bias"] = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    want = run("moe_experts_backward", *args, impl="reference", **form)
    close(run("moe_experts_backward", *args, **form), want, 20)
    turned = (*args[:4], transposed(args[4]), transposed(args[5]))
    close(run("moe_experts_backward", *turned, **form), want, 20)


@pytest.mark.parametrize("op", ["moe_experts_backward", "moe_experts_backward_experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("megabytes", ["0.05", "0.3", "1"])
def test_parts_and_threads_give_the_same_bits(monkeypatch, threads, op, dtype, megabytes):
    args, form = experts(400, 96, 64, 4, 2, dtype)
    threads(1)
    want = run(op, *args, **form)
    for n in (2, 5):
        threads(n)
        assert same(run(op, *args, **form), want)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", megabytes)
    got = run(op, *args, **form)
    if op == "moe_experts_backward":
        assert same(got, want)
    else:  # sums of pieces of the rows, whose borders are those of the parts
        close(got, want, 20)
    assert all((g[-1] == 0).all() for g in got if g.shape[0] == 4)


def test_what_lies_behind_empty_slots_reaches_no_gradient():
    args, form = experts(12, 40, 30, 4, 2)
    dy, x, ids, weights, gate_up, down = args
    ids[3] = -1
    x[3] = dy[3] = float("nan")
    weights[3] = float("inf")
    gate_up[3] = down[3] = float("nan")
    for op in ("moe_experts_backward", "moe_experts_backward_experts"):
        assert all(torch.isfinite(g).all() for g in run(op, *args, **form))
    dx, dweights, *_ = run("moe_experts_backward", *args, **form)
    assert (dx[3] == 0).all()
    assert (dweights[3] == 0).all()


@pytest.mark.parametrize("spec", ["int8", "mxfp4"])
def test_gradients_in_x_through_quantised_experts(spec):
    args, form = experts(30, 64, 96, 4, 2)
    weights = [transom.quantize(w, spec) for w in args[4:]]
    got = run("moe_experts_backward", *args[:4], *weights, **form)
    plain = [w.dequantize() for w in weights]
    assert same(got, run("moe_experts_backward", *args[:4], *plain, **form))


def test_no_rows_give_gradients_of_zero():
    args, form = experts(0, 40, 30, 4, 2)
    dx, dweights, *biases = run("moe_experts_backward", *args, **form)
    assert (dx.shape, dweights.shape) == ((0, 40), (0, 2))
    grads = [*biases, *run("moe_experts_backward_experts", *args, **form)]
    dy, x, w = gemm(0, 33, 47, 3, torch.bfloat16)
    offsets = torch.zeros(3, dtype=torch.int64)
    assert run("grouped_gemm_backward_x", dy, w, offsets)[0].shape == (0, 47)
    grads += run("grouped_gemm_backward_weight", dy, x, offsets, w)
    assert all(g.numel() > 0 and (g == 0).all() for g in grads)


@pytest.mark.parametrize("spec", [None, "mxfp4"])
def test_gradients_of_a_token_have_the_same_bits_beside_any_others(spec):
    (dy, x, ids, weights, *both), form = experts(150, 96, 64, 2, 2, torch.bfloat16)
    ids.clamp_(min=0)
    if spec:
        both = [transom.quantize(w, spec) for w in both]
    together = run("moe_experts_backward", dy, x, ids, weights, *both, **form)[:2]
    for first, tokens in ((3, 1), (7, 2), (0, 9), (11, 130)):
        some = slice(first, first + tokens)
        alone = run(
            "moe_experts_backward", dy[some], x[some], ids[some], weights[some], *both, **form
        )[:2]
        assert same(alone, [g[some] for g in together])
