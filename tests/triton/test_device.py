"""What only a GPU can show: capture in a graph, and agreement at the sizes of real models. The rest
is asked by `transom verify --backend triton --device cuda`."""

from __future__ import annotations

import pytest
import torch

import transom

REASON = transom.backends()["triton"]
pytestmark = pytest.mark.skipif(
    REASON is not None or not torch.cuda.is_available(), reason=str(REASON or "no CUDA device")
)


def experts(T=64, D=4096, width=2048, E=16, K=6):
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, device="cuda")

    ids = randn(T, E).topk(K).indices
    gate_up, down = randn(E, 2 * width, D) / D**0.5, randn(E, D, width) / width**0.5
    low = torch.bfloat16
    return randn(T, D).to(low), ids, randn(T, K).softmax(-1), gate_up.to(low), down.to(low)


def products(T=512, D=4096, N=4096, E=16):
    x, _, _, weight, _ = experts(T, D, N // 2, E)
    return x, weight, torch.linspace(0, T, E, device="cuda").int()


CALLS = {
    "grouped_gemm": lambda: (products(), {}),
    "moe_experts": lambda: (experts(), {"limit": 10.0}),
    "route": lambda: ((torch.randn(512, 256, device="cuda"), 6), {"score": "sqrtsoftplus"}),
}


def tensors(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("op", CALLS)
def test_a_graph_replays_with_new_inputs(op):
    args, kwargs = CALLS[op]()
    call = getattr(transom, op)
    with transom.use(**{op: "triton"}), torch.no_grad():
        call(*args, **kwargs)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(*args, **kwargs)
        args[0].copy_(torch.randn_like(args[0]))
        graph.replay()
        want = call(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(tensors(captured), tensors(want), strict=True))


@pytest.mark.parametrize("op", CALLS)
def test_it_agrees_with_the_composite_at_the_size_of_a_model(op):
    args, kwargs = CALLS[op]()
    out = {}
    for impl in ("triton", "composite"):
        with transom.use(**{op: impl}), torch.no_grad():
            out[impl] = tensors(getattr(transom, op)(*args, **kwargs))
    for got, want in zip(out["triton"], out["composite"], strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("op", CALLS)
def test_equal_calls_give_equal_bits(op):
    args, kwargs = CALLS[op]()
    with transom.use(**{op: "triton"}), torch.no_grad():
        first, *others = (tensors(getattr(transom, op)(*args, **kwargs)) for _ in range(20))
    assert all(torch.equal(a, b) for o in others for a, b in zip(first, o, strict=True))
