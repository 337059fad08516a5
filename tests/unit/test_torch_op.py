"""Operators as torch operators: opcheck, compile, autograd, vmap, autocast, meta, quantised
weights."""

from __future__ import annotations

import pytest
import torch

import transom


@pytest.fixture
def x():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def test_opcheck(norm, linear, x):
    torch.library.opcheck(
        norm.torch_op, (x.requires_grad_(), torch.rand(8, requires_grad=True), None, 1e-6)
    )
    torch.library.opcheck(
        linear.torch_op, (torch.randn(2, 4), torch.randn(3, 4), None, None, "", None, "plain")
    )


def test_fullgraph_compile_equals_eager(norm, x):
    w = torch.rand(8)
    step = torch.compile(
        lambda x, w: norm(x * 2, w, eps=1e-3)[0] + 1, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(step(x, w), norm(x * 2, w, eps=1e-3)[0] + 1)


def test_compiled_gradients_equal_eager(norm, x):
    def gradients(f):
        a, w = x.clone().requires_grad_(), torch.linspace(0.5, 2, 8).requires_grad_()
        f(a, w)[0].square().sum().backward()
        return a.grad, w.grad

    eager = gradients(norm)
    compiled = gradients(
        torch.compile(lambda a, w: norm(a, w), backend="aot_eager", fullgraph=True)
    )
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_shapes_fail_at_trace_time_with_the_same_line(norm, x):
    step = torch.compile(lambda x, w: norm(x, w)[0], backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="scaled_norm: weight has D = 7; x has D = 8"):
        step(x, torch.rand(7))


def test_value_checks_run_in_compiled_code(linear):
    step = torch.compile(lambda x, w, i: linear(x, w, i), backend="aot_eager", fullgraph=True)
    args = torch.randn(2, 4), torch.randn(3, 4)
    step(*args, torch.tensor([1]))
    with pytest.raises(Exception, match="index holds 3; expected below N = 3"):
        step(*args, torch.tensor([3]))


def test_gradients_are_operators_of_their_own(norm, x):
    with transom.record() as calls:
        norm(x.requires_grad_(), torch.rand(8))[0].sum().backward()
    assert [c.op for c in calls] == ["scaled_norm", "scaled_norm_backward"]


def test_gradcheck(norm):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    w, b = (torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: norm(*a)[0], (x, w, b))


def test_functional_gradients_equal_autograd(norm, x):
    w = torch.rand(8)
    got = torch.func.grad(lambda x: norm(x, w)[0].square().sum())(x)
    norm(x.requires_grad_(), w)[0].square().sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_per_sample_gradients_say_what_is_in_the_way(norm, x):
    with pytest.raises(transom.NotSupported, match="scaled_norm_backward: vmap over dy"):
        torch.func.vmap(torch.func.grad(lambda x: norm(x, torch.ones(8))[0].sum()))(x[:, None])


def test_a_second_derivative_is_refused_clearly(norm, x):
    y = norm(x.requires_grad_(), torch.rand(8))[0].sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(
        transom.NotSupported, match="scaled_norm_backward: a gradient through it was asked for"
    ):
        g.sum().backward()


def test_direct_and_torch_paths_give_the_same_bits(norm, x):
    w = torch.rand(8)
    assert torch.equal(norm(x, w)[0], norm.torch_op(x, w, None, 1e-6)[0])


def test_vmap_folds_into_the_batch_dim(norm, linear, x):
    xs, w = torch.randn(5, 3, 8), torch.rand(8)
    torch.testing.assert_close(torch.vmap(lambda a: norm(a, w)[0])(xs), norm(xs, w)[0])
    torch.testing.assert_close(
        torch.vmap(lambda a: norm(a, w)[0], in_dims=1)(xs), norm(xs.movedim(1, 0), w)[0]
    )
    lw = torch.randn(6, 8)
    torch.testing.assert_close(
        torch.vmap(lambda a: linear(a, lw))(xs), linear(xs.flatten(0, 1), lw).view(5, 3, 6)
    )


def test_vmap_over_a_shared_argument_names_it(norm, x):
    with pytest.raises(
        transom.NotSupported, match="scaled_norm: vmap over weight; it is shared by the batch dim"
    ):
        torch.vmap(lambda w: norm(x, w)[0])(torch.rand(5, 8))


def test_autocast_casts_what_the_declaration_names(norm, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, rms = norm(x, torch.rand(8))
    assert y.dtype == torch.bfloat16 and rms.dtype == torch.float32


def test_autocast_gradients_reach_the_original(norm, x):
    a = x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(a, torch.rand(8))[0].float().sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32


def test_meta_tensors_give_shapes(norm):
    y, rms = norm(torch.empty(2, 8, device="meta"), torch.empty(8, device="meta"))
    assert y.shape == (2, 8) and rms.shape == (2,) and y.is_meta


def test_export_keeps_the_operator(norm, x):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(8))

        def forward(self, x):
            return norm(x, self.weight)[0]

    exported = torch.export.export(Layer(), (x,))
    assert any("scaled_norm" in str(n.target) for n in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), exported.module()(x))


def test_quantised_weights_pass_through_every_path(linear):
    x, w = torch.randn(3, 64), transom.quantize(torch.randn(8, 64), "int8")
    want = x @ w.dequantize().t()
    torch.testing.assert_close(linear(x, w), want)
    torch.testing.assert_close(
        torch.compile(lambda x: linear(x, w), backend="aot_eager", fullgraph=True)(x), want
    )
    torch.testing.assert_close(linear(x.requires_grad_(), w), want)


def test_autocast_stays_out_of_implementations():
    """A composite that multiplies float32 tiles gets float32, forward and backward."""
    x = torch.randn(8, 64, requires_grad=True)
    w, ends = torch.randn(2, 16, 64, requires_grad=True), torch.tensor([4, 8])
    want = transom.grouped_gemm(x.bfloat16(), w, ends)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = transom.grouped_gemm(x, w, ends)
        got.float().sum().backward()  # inside autocast: gradient operators too
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    exact = w.detach().sum(1).repeat_interleave(4, 0)
    assert float((x.grad - exact).abs().max()) < 2e-2 * float(exact.abs().max())
    logits = torch.randn(3, 4, 4)
    alone = transom.sinkhorn(logits, iterations=3, eps=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transom.sinkhorn(logits, iterations=3, eps=1e-6), alone)


@pytest.mark.parametrize("mode", ["inference", "training", "compiled"])
def test_a_device_mismatch_is_seen_in_every_mode(mode):
    x, w, ends = torch.randn(6, 4), torch.randn(3, 5, 4), torch.tensor([2, 2, 6])
    call = transom.grouped_gemm
    if mode == "compiled":
        call = torch.compile(
            lambda *a: transom.grouped_gemm(*a), backend="aot_eager", fullgraph=True
        )
    elif mode == "training":
        x.requires_grad_()
    with pytest.raises(Exception, match="grouped_gemm: weight is on meta; x is on cpu"):
        call(x, w.to("meta"), ends)
    with pytest.raises(Exception, match="grouped_gemm: weight is on cpu; x is on meta"):
        call(x.to("meta"), w, ends)


def test_plain_arguments_of_a_wrong_type_keep_their_line_under_compile():
    step = torch.compile(
        lambda x: transom.route(x, "two", score="softmax"), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match="route: k is 'two'; expected int"):
        step(torch.randn(3, 8))


def test_fronts_name_what_is_wrong_with_their_tensors():
    kv = torch.randn(1, 4, 8)
    with pytest.raises(TypeError, match="sparse_attention: q is list; expected a torch.Tensor"):
        transom.sparse_attention([[1.0]], kv)
    with pytest.raises(TypeError, match=r"sparse_attention\(\) missing 1 required .* 'kv'"):
        transom.sparse_attention(torch.randn(1, 2, 2, 8))
    weight = transom.quantize(torch.randn(4, 8), "int8")
    with pytest.raises(TypeError, match="kv is QuantizedWeight; expected a torch.Tensor"):
        transom.sparse_attention(torch.randn(1, 2, 2, 8), weight)
