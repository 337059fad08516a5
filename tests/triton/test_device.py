"""What only a GPU can show: capture in a graph, and agreement at the sizes of real models. The rest
is asked by `transom verify --backend triton --device cuda`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import transom
from transom import dispatch
from transom.conformance.cases import build
from transom.registry import OPS

ROOT = Path(__file__).resolve().parents[2]
OFFERED = sorted(
    name for name, op in OPS.items() if (ROOT / "backends/triton" / f"{op.path}.py").exists()
)
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


def declared(name, example=0):
    """A small call of an operator as its declaration draws it, on the device."""
    op = OPS[name]
    return list(build(op, op.examples[example], torch.bfloat16, device="cuda").values)


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


def written(op, values):
    """What a call returns, or the tensors that it writes."""
    out = dispatch.run(op, tuple(values))
    names = [p.name for p in op.parameters]
    return tuple(values[names.index(n)] for n in op.mutates) if op.mutates else tensors(out)


@pytest.mark.parametrize("name", OFFERED)
def test_every_operator_can_be_captured(name):
    """Gradients and quantisers too: no host code waits for the device or allocates beside torch."""
    op, values = OPS[name], declared(name)
    with transom.use(**{name: "triton"}), torch.no_grad():
        want = [t.clone() for t in written(op, values)]  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = written(op, values)
        for t in captured:
            t.zero_()
        graph.replay()
    assert all(
        torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
        for a, b in zip(captured, want, strict=True)
    )


@pytest.mark.parametrize("quantised", (False, True))
def test_a_pinned_table_is_read_in_place(quantised):
    g = torch.Generator().manual_seed(0)
    table = torch.randn(300, 64, generator=g)
    if quantised:
        table = transom.quantize(table, "fp8", group=(1, 64))
    numbers = dict(
        multipliers=torch.tensor([3, 5, 7]),
        moduli=torch.tensor([[97, 89], [83, 79]]),
        offsets=torch.tensor([0, 97, 186, 221]),
    )
    tokens = torch.randint(1000, (2, 33), generator=g)
    want = transom.hashed_embedding(tokens, table, **numbers, pad=2)
    there = {name: tensor.cuda() for name, tensor in numbers.items()}
    got = transom.hashed_embedding(tokens.cuda(), table.pin_memory(), **there, pad=2)
    assert got.device.type == "cuda" and torch.equal(got.cpu(), want)
    with pytest.raises(transom.NotSupported, match="table is in pageable host memory"):
        transom.hashed_embedding(tokens.cuda(), table, **there, pad=2)


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
