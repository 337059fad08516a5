"""moe_experts: slots, clamps, layouts, shards, gradients and bits, against a float64 formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import transom
from transom import moe_experts
from transom.kernels.moe._gated import ACTIVATIONS, gated, gated_backward
from transom.kernels.moe.moe_experts import moe_experts_backward_experts

LIMIT = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAN = float("nan")


def randn(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def inputs(
    rng: np.random.Generator,
    T: int = 11,
    D: int = 24,
    I: int = 10,
    E: int = 5,
    K: int = 3,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    return {
        "x": randn(rng, T, D, dtype=dtype),
        "ids": torch.from_numpy(rng.integers(-1, E, (T, K))),
        "weights": torch.from_numpy(rng.random((T, K))).to(
            torch.promote_types(dtype, torch.float32)
        ),
        "gate_up": randn(rng, E, 2 * I, D, dtype=dtype),
        "down": randn(rng, E, D, I, dtype=dtype),
    }


def biases(given: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    E, D, I = given["down"].shape
    dtype = given["x"].dtype
    return {
        **given,
        "gate_up_bias": randn(rng, E, 2 * I, dtype=dtype),
        "down_bias": randn(rng, E, D, dtype=dtype),
    }


def by_formula(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_position: str = "after",
    interleaved: bool = False,
    alpha: float = 1.702,
) -> Tensor:
    """Every expert for every token in float64, then a dense combination; differentiable."""
    E = gate_up.shape[0]
    both = torch.einsum("td,efd->tef", x.double(), gate_up.double())
    if gate_up_bias is not None:
        both = both + gate_up_bias.double()
    gate, up = (both[..., ::2], both[..., 1::2]) if interleaved else both.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    h = {
        "silu": lambda: functional.silu(gate) * up,
        "gelu": lambda: functional.gelu(gate) * up,
        "gelu_tanh": lambda: functional.gelu(gate, approximate="tanh") * up,
        "relu": lambda: gate.relu() * up,
        "swiglu_oai": lambda: (up + 1) * gate * (alpha * gate).sigmoid(),
    }[activation]()
    y = torch.einsum("tei,edi->ted", h, down.double())
    if down_bias is not None:
        y = y + down_bias.double()
    one_hot = functional.one_hot(ids.long() + 1, E + 1)[..., 1:]
    w = torch.where(ids[..., None] >= 0, weights.double()[..., None], 0.0) * one_hot
    return torch.einsum("te,ted->td", w.sum(1), y)


def error(got: Tensor, want: Tensor) -> float:
    want = want.detach().double()
    return float((got.detach().double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


def call(given: dict[str, Tensor], **changes: Any) -> Tensor:
    return moe_experts(**{**given, **changes})


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_formula(rng, activation, interleaved, limit):
    given = biases(inputs(rng), rng)
    form = dict(activation=activation, interleaved=interleaved, limit=limit)
    with transom.record() as calls:
        y = call(given, **form)
    assert [(c.op, c.impl) for c in calls] == [("moe_experts", "composite")]
    assert error(y, by_formula(**given, **form)) <= 2e-5


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_rounds_once(rng, dtype):
    given = inputs(rng, dtype=dtype)
    y = call(given, limit=2.0)
    assert y.dtype == dtype
    assert error(y, by_formula(**given, limit=2.0)) <= LIMIT[dtype]


def test_the_weight_before_or_after_the_down_product_is_the_same_but_for_rounding(rng):
    given = biases(inputs(rng, dtype=torch.float64), rng)
    assert error(call(given, weight_position="before"), call(given)) <= 1e-14


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_edge_01_no_tokens(rng, index):
    given = inputs(rng, T=0)
    given["ids"] = given["ids"].to(index)
    for name in ("x", "weights", "gate_up", "down"):
        given[name].requires_grad_()
    y = call(given)
    assert y.shape == (0, 24)
    y.sum().backward()
    assert torch.equal(given["gate_up"].grad, torch.zeros(5, 20, 24))


def test_edge_02_gradients_of_experts_without_rows_are_exactly_zero(rng):
    given = biases(inputs(rng), rng)
    given["ids"] = torch.tensor([[1, 3, -1]] * 11)
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    for name in names:
        given[name].requires_grad_()
    call(given).backward(randn(rng, 11, 24))
    for name in names:
        assert (given[name].grad[[0, 2, 4]] == 0).all()
        assert (given[name].grad[[1, 3]] != 0).any()


@pytest.mark.parametrize("K", [1, 3])
def test_edge_03_all_tokens_to_one_expert(rng, K):
    """With K slots its segment has K*T rows."""
    given = inputs(rng, T=40, K=K)
    given["ids"] = torch.full((40, K), 2)
    assert error(call(given), by_formula(**given)) <= 2e-5


def test_edge_04_a_batch_without_experts_is_zero_and_reads_nothing(rng):
    given = {
        n: t.fill_(NAN) if t.is_floating_point() else t.fill_(-1) for n, t in inputs(rng).items()
    }
    for name in ("x", "weights", "gate_up", "down"):
        given[name].requires_grad_()
    y = call(given)
    assert torch.equal(y, torch.zeros(11, 24))
    y.backward(torch.full((11, 24), NAN))
    for name in ("x", "weights", "gate_up", "down"):
        assert (given[name].grad == 0).all()


@pytest.mark.parametrize("position", ["after", "before"])
def test_edge_05_and_07_nan_behind_empty_slots_reaches_nothing(rng, position):
    given = inputs(rng)
    given["ids"][:, 1] = -1
    given["ids"][0] = -1
    given["ids"][given["ids"] == 4] = 3
    want = by_formula(**given)
    given["weights"][given["ids"] < 0] = NAN
    given["x"][0] = NAN
    given["gate_up"][4] = given["down"][4] = NAN
    for name in ("x", "weights", "gate_up", "down"):
        given[name].requires_grad_()
    y = call(given, weight_position=position)
    assert error(y, want) <= 2e-5
    dy = torch.ones(11, 24)
    dy[0] = NAN
    y.backward(dy)
    for name in ("x", "weights", "gate_up", "down"):
        assert torch.isfinite(given[name].grad).all()
    assert (given["weights"].grad[given["ids"] < 0] == 0).all()
    assert (given["x"].grad[0] == 0).all()


def test_edge_06_the_sentinel_E_is_refused_with_advice(rng):
    given = inputs(rng)
    given["ids"][3, 1] = 5
    with pytest.raises(
        ValueError,
        match=r"moe_experts: ids holds 5; must be in -1..E-1 = -1..4; an empty slot is -1",
    ):
        call(given)


def test_edge_08_a_repeated_expert_counts_in_each_slot(rng):
    given = inputs(rng, dtype=torch.float64)
    given["ids"] = torch.tensor([[2, 2, 2]] * 11)
    names = ("x", "weights", "gate_up", "down")
    exact = {n: t.clone().requires_grad_(n in names) for n, t in given.items()}
    for name in names:
        given[name].requires_grad_()
    y, want = call(given), by_formula(**exact)
    assert error(y, want) <= 1e-13
    y.sum().backward()
    want.sum().backward()
    for name in names:
        assert error(given[name].grad, exact[name].grad) <= 1e-12


@pytest.mark.parametrize(("E", "K"), [(1, 1), (4, 1), (4, 4), (1, 3)])
def test_edge_09_one_expert_one_slot_all_slots(rng, E, K):
    given = inputs(rng, E=E, K=K)
    assert error(call(given), by_formula(**given)) <= 2e-5


def test_no_slots_give_zero(rng):
    assert torch.equal(call(inputs(rng, K=0)), torch.zeros(11, 24))


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
def test_edge_12_clamps(activation):
    """gate from above, up from both sides; exactly L passes its gradient; NaN stays NaN."""
    L = 7.0
    above, below = float(np.nextafter(np.float32(L), np.float32(9))), -50.0
    gate = torch.tensor([L, above, below, 1.0, 1.0, 1.0, float("inf"), NAN, 1.0])
    up = torch.tensor([2.0, 2.0, 2.0, L, above, -above, 2.0, 1.0, NAN])
    both = torch.cat([gate, up])[None]
    h = gated(both, activation, L, False, 1.702)[0]
    extra = 1.0 if activation == "swiglu_oai" else 0.0
    a = 1.702 if activation == "swiglu_oai" else 1.0
    g, u = gate.double().clamp(max=L), up.double().clamp(-L, L)
    want = (u + extra) * g * (a * g).sigmoid()
    assert torch.allclose(h.double(), want, rtol=1e-6, atol=1e-30, equal_nan=True)
    assert torch.isnan(h).tolist() == [False] * 7 + [True] * 2
    dgate, dup = gated_backward(torch.ones(1, 9), both, activation, L, False, 1.702)[0].chunk(2)
    assert (dgate[[0, 2, 3]] != 0).all() and (dgate[[1, 6]] == 0).all()
    assert (dup[[0, 3]] != 0).all() and (dup[[4, 5]] == 0).all()
    assert torch.isnan(dgate[7]) and torch.isnan(dup[7]) and torch.isnan(dgate[8])


def test_edge_12_an_infinite_gate_gives_finite_output(rng):
    x, gate_up = torch.tensor([[1.0]]), torch.tensor([[[float("inf")], [float("-inf")]]])
    y = moe_experts(
        x, torch.tensor([[0]]), torch.ones(1, 1), gate_up, torch.ones(1, 1, 1), limit=10.0
    )
    assert np.isclose(y.item(), -10.0 * 10 / (1 + np.exp(-10)), rtol=1e-6)


@pytest.mark.parametrize(("D", "I"), [(45, 90), (90, 24), (33, 1), (1, 7)])
def test_edge_13_sizes_that_no_block_divides(rng, D, I):
    """2880 / 64 = 45, 768 / 32 = 24: what is left of the models' sizes after sharding."""
    given = inputs(rng, T=13, D=D, I=I)
    assert error(call(given), by_formula(**given)) <= 2e-5


def test_edge_13_the_sizes_of_gpt_oss(rng):
    given = inputs(rng, T=3, D=2880, I=2880, E=2, K=2)
    given["gate_up"] /= 50
    given["down"] /= 50
    assert error(call(given), by_formula(**given)) <= 2e-5


def test_edge_14_addresses_beyond_two_to_the_32(rng):
    """Expert tensors of 2**33 elements as views of one expert: the last stands beyond 2**32."""
    one = inputs(rng, T=2, D=64, I=32, E=1, K=1)
    experts = 2**21
    wide = {n: one[n].expand(experts, *one[n].shape[1:]) for n in ("gate_up", "down")}
    assert wide["gate_up"].numel() > 2**32 and wide["down"].numel() >= 2**32
    one["ids"] = torch.zeros(2, 1, dtype=torch.int64)
    last = torch.full((2, 1), experts - 1)
    assert torch.equal(call(one, ids=last, **wide), call(one))


def test_edge_16_strides_change_nothing(rng):
    given = inputs(rng)
    want = by_formula(**given)
    wide = torch.full((11, 60), NAN)[:, 7:55:2]
    wide.copy_(given["x"])
    padded = torch.full((5, 27, 13), NAN)[:, :24, :10]
    padded.copy_(given["down"])
    transposed = given["gate_up"].transpose(1, 2).contiguous().transpose(1, 2)
    changes = dict(x=wide, gate_up=transposed, down=padded, ids=given["ids"].T.contiguous().T)
    changes["weights"] = given["weights"].repeat_interleave(2, 1)[:, ::2]
    assert error(call(given, **changes), want) <= 2e-5
    for name in ("x", "weights", "gate_up", "down"):
        changes.get(name, given[name]).requires_grad_()
    y = call(given, **changes)
    y.sum().backward()
    assert changes["gate_up"].grad.shape == (5, 20, 24)


def test_edge_18_equal_calls_give_equal_bits(rng):
    given = inputs(rng, T=64)
    dy, results = randn(rng, 64, 24), []
    for _ in range(5):
        leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in given.items()}
        y = call(leaves)
        y.backward(dy)
        results.append([y.detach(), *(t.grad for t in leaves.values() if t.grad is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_edge_19_a_token_has_the_same_bits_alone_and_among_many(rng, deterministic, activation):
    """In 4096 tokens; widths where torch's silu and gelu round the last elements differently."""
    T = 4096 if activation == "silu" else 300
    given = inputs(rng, T=T, D=35, I=21, E=4, K=2)
    given["x"].requires_grad_()
    dy = randn(rng, T, 35)
    many = call(given, activation=activation)
    (dmany,) = torch.autograd.grad(many, given["x"], dy)
    for t in (0, 1, T // 3, T - 1):
        one = {n: v[t : t + 1].detach().clone() if v.shape[0] == T else v for n, v in given.items()}
        one["x"].requires_grad_()
        y = call(one, activation=activation)
        assert torch.equal(y[0], many[t])
        assert torch.equal(torch.autograd.grad(y, one["x"], dy[t : t + 1])[0][0], dmany[t])


def test_slots_are_added_in_their_order(rng):
    """1e8 + 1 - 1e8 in float32 is 0 in this order and 1 in the order of experts."""
    gate_up = torch.ones(3, 2, 1)
    h = float(functional.silu(torch.tensor(1.0)))
    down = torch.tensor([1e8, -1e8, 1.0]).view(3, 1, 1) / h
    for ids, want in (([0, 2, 1], 0.0), ([0, 1, 2], 1.0), ([2, 0, 1], 0.0)):
        y = moe_experts(torch.ones(1, 1), torch.tensor([ids]), torch.ones(1, 3), gate_up, down)
        assert np.isclose(y.item(), want, atol=1e-5)


def test_shards_of_the_experts_sum_to_the_whole(rng):
    """Contracts 14.2: expert parallelism; ids of other ranks are -1."""
    given = biases(inputs(rng, E=6, dtype=torch.float64), rng)
    total = torch.zeros(11, 24, dtype=torch.float64)
    for rank in range(3):
        part = {n: v[2 * rank : 2 * rank + 2] if v.shape[0] == 6 else v for n, v in given.items()}
        local = given["ids"] - 2 * rank
        part["ids"] = torch.where((local >= 0) & (local < 2), local, -1)
        total += call(part)
    assert error(total, call(given)) <= 1e-14


def test_tokens_in_another_order_give_the_same_rows(rng):
    given = inputs(rng, dtype=torch.float64)
    order = torch.from_numpy(rng.permutation(11))
    moved = {n: v[order] if v.shape[0] == 11 else v for n, v in given.items()}
    assert error(call(moved), call(given)[order]) <= 1e-14


def test_interleaved_rows_are_the_concatenated_ones_in_another_order(rng):
    given = biases(inputs(rng), rng)
    order = torch.arange(20).view(2, 10).T.flatten()
    mixed = dict(gate_up=given["gate_up"][:, order], gate_up_bias=given["gate_up_bias"][:, order])
    assert torch.allclose(call(given, interleaved=True, **mixed), call(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["after", "before"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", [*ACTIVATIONS])
def test_gradients_equal_autograd_of_the_formula(rng, activation, interleaved, position):
    given = biases(inputs(rng, dtype=torch.float64), rng)
    form = dict(activation=activation, interleaved=interleaved, limit=1.5, weight_position=position)
    names = [n for n in given if n != "ids"]
    mine = {n: t.clone().requires_grad_(n in names) for n, t in given.items()}
    exact = {n: t.clone().requires_grad_(n in names) for n, t in given.items()}
    dy = randn(rng, 11, 24, dtype=torch.float64)
    with transom.record() as calls:
        call(mine, **form).backward(dy)
    by_formula(**exact, **form).backward(dy)
    assert [c.op for c in calls] == [
        "moe_experts",
        "moe_experts_backward",
        "moe_experts_backward_experts",
    ]
    for name in names:
        assert error(mine[name].grad, exact[name].grad) <= 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_low_precision(rng, dtype):
    given = biases(inputs(rng, T=60, dtype=dtype), rng)
    names = [n for n in given if n != "ids"]
    mine = {n: t.clone().requires_grad_(n in names) for n, t in given.items()}
    exact = {
        n: (t.double() if n in names else t).requires_grad_(n in names) for n, t in given.items()
    }
    dy = randn(rng, 60, 24, dtype=dtype)
    call(mine).backward(dy)
    by_formula(**exact).backward(dy.double())
    for name in names:
        assert mine[name].grad.dtype == given[name].dtype
        assert error(mine[name].grad, exact[name].grad) <= LIMIT[dtype], name


def test_float32_weights_under_bfloat16_tokens_get_float32_gradients(rng):
    given = inputs(rng, T=200, E=1, K=1, dtype=torch.bfloat16)
    given["ids"].zero_()
    given.update({n: given[n].float().requires_grad_() for n in ("gate_up", "down")})
    exact = {n: t.detach().double() if t.is_floating_point() else t for n, t in given.items()}
    exact["down"].requires_grad_()
    dy = randn(rng, 200, 24, dtype=torch.bfloat16)
    call(given).backward(dy)
    by_formula(**exact).backward(dy.double())
    assert given["down"].grad.dtype == torch.float32
    assert error(given["down"].grad, exact["down"].grad) <= 2e-5


@pytest.mark.parametrize("format", ["int8", "fp8", "mxfp4"])
def test_quantised_weights_are_their_dequantised_selves(rng, format):
    """Also backward: gradients of x, routing weights and biases, none of the weights."""
    given = biases(inputs(rng, D=32, I=32), rng)
    given["gate_up"], given["down"] = (
        transom.quantize(given[n], format) for n in ("gate_up", "down")
    )
    plain = {**given, "gate_up": given["gate_up"].dequantize(), "down": given["down"].dequantize()}
    names = ("x", "weights", "gate_up_bias", "down_bias")
    dy, grads = randn(rng, 11, 32), []
    for form in (given, plain):
        leaves = {n: form[n].clone().requires_grad_() for n in names}
        y = call({**form, **leaves})
        y.backward(dy)
        grads.append([y, *(t.grad for t in leaves.values())])
    for a, b in zip(*grads, strict=True):
        assert error(a, b) <= 2e-5


def test_the_workspace_changes_no_value_and_bounds_every_temporary(rng, monkeypatch):
    given = inputs(rng, T=120, D=64, I=32, E=3, K=2, dtype=torch.bfloat16)
    dy = randn(rng, 120, 64, dtype=torch.bfloat16)
    run = transom.moe_experts.impls["composite"].function
    backward = transom.moe_experts_backward.impls["composite"].function
    weights = transom.moe_experts_backward_experts.impls["composite"].function
    results, largest = [], []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if (
                isinstance(out, Tensor)
                and not out._is_view()
                and func.overloadpacket is not torch.ops.aten.select
            ):
                largest[-1] = max(largest[-1], out.nbytes)
            return out

    for size in ("64", "0.03"):
        monkeypatch.setenv("TRANSOM_WORKSPACE_MB", size)
        largest.append(0)
        with Sizes():
            y = run(**given)
            dx, dw, *_ = backward(dy, **given)
        results.append((y, dx, dw, *weights(dy, **given)))
    for a, b in zip(*results, strict=True):
        assert error(a, b) <= 1e-2
    # what stays: outputs [T,D] in bf16 and one tile of 128 weight rows (at most 128 x 64) in
    # float32
    assert largest[0] > largest[1] and largest[1] <= 128 * 64 * 4


def test_weight_gradients_are_summed_in_float32(rng):
    """4000 equal bf16 rows: a bf16 sum would stop growing at 256 of them."""
    x, dy = torch.ones(4000, 1, dtype=torch.bfloat16), torch.ones(4000, 1, dtype=torch.bfloat16)
    gate_up = torch.ones(1, 2, 1, dtype=torch.bfloat16)
    _, ddown = moe_experts_backward_experts(
        dy,
        x,
        torch.zeros(4000, 1, dtype=torch.int32),
        torch.ones(4000, 1),
        gate_up,
        torch.ones(1, 1, 1, dtype=torch.bfloat16),
        activation="relu",
    )
    assert ddown.item() == 4000


def test_compiles_with_its_gradients_without_a_graph_break(rng):
    given = biases(inputs(rng), rng)
    names = [n for n in given if n != "ids"]
    leaves = [given[n].requires_grad_() for n in names]

    def loss(*values: Tensor) -> Tensor:
        return (
            moe_experts(**dict(zip(names, values, strict=True)), ids=given["ids"], limit=1.0)
            .square()
            .sum()
        )

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(
        torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            dict(activation="swish"),
            "activation is 'swish'; must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', 'swig",
        ),
        (
            dict(weight_position="middle"),
            "weight_position is 'middle'; must be one of 'after', 'before'",
        ),
        (dict(limit=0.0), "limit is 0.0; must be > 0 or None"),
        (dict(ids=torch.full((11, 3), -2)), "ids holds -2; must be in -1..E-1 = -1..4"),
        (dict(ids=torch.zeros(11, 2, dtype=torch.int64)), "weights has K = 3; ids has K = 2"),
        (dict(down=torch.zeros(4, 24, 10)), "down has E = 4; gate_up has E = 5"),
        (
            dict(gate_up=torch.zeros(5, 21, 24)),
            r"gate_up has 21 where \[E, 2\*I, D\] is declared; expected 2\*I = 20",
        ),
        (dict(gate_up_bias=torch.zeros(5, 10)), "gate_up_bias has 10 where"),
    ],
)
def test_bad_arguments(rng, changes, text):
    with pytest.raises(ValueError, match=f"moe_experts: {text}"):
        call(inputs(rng), **changes)
    with pytest.raises(TypeError, match="moe_experts: ids is float32; expected int32, int64"):
        call(inputs(rng), ids=torch.zeros(11, 3))
