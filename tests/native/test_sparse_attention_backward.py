"""The native gradient of sparse_attention: blocks, pieces, threads, what no query sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

OP = "sparse_attention_backward"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype)


def integers(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    B: int = 2,
    S: int = 21,
    H: int = 5,
    D: int = 40,
    N: int = 300,
    L: int = 0,
    M: int = 0,
    window: int = 0,
    v_dim: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The arguments of the gradient for a forward that the composite has run in float64."""
    M = max(M, S) if window else 0
    call: dict[str, Any] = dict(
        q=normal(B, S, H, D, dtype=dtype),
        kv=normal(B, N, D, dtype=dtype),
        indices=integers(-1, N + 2, (B, S, L)) if L else None,
        visible=integers(0, N + 1, (B, S), seed=1),
        local_kv=normal(B, M, D, seed=1, dtype=dtype),
        sink=normal(H, seed=3),
        local_valid=integers(0, 9, (B, M), seed=2) > 0 if window else None,
        window=window,
        scale=D**-0.5,
    )
    return with_forward(call, v_dim or D)


def with_forward(call: dict[str, Any], v_dim: int) -> dict[str, Any]:
    wide = {n: x for n, x in double(call).items() if n not in ("do", "dlse", "o", "lse")}
    if not call["window"]:
        wide["local_kv"] = None
    with transom.use("composite"):
        o, lse = transom.sparse_attention(**wide, v_dim=v_dim, return_lse=True)
    dtype = call["q"].dtype
    do, dlse = normal(*o.shape, seed=7, dtype=dtype), normal(*lse.shape, seed=8)
    return {**call, "o": o.to(dtype), "lse": lse.float(), "do": do, "dlse": dlse}


def double(call: dict[str, Any]) -> dict[str, Any]:
    return {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in call.items()
    }


def gradients(call: dict[str, Any], impl: str = "native") -> tuple[Tensor, ...]:
    with transom.use(**{OP: impl}), transom.record() as calls:
        out = getattr(transom, OP)(**call)
    assert [c.impl for c in calls if c.op == OP] == [impl]
    return out


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(call: dict[str, Any]) -> None:
    for got, want in zip(gradients(call), gradients(double(call), "composite"), strict=True):
        if want.numel():
            limit = 1e-5 * float(want.abs().max()) + torch.finfo(got.dtype).eps * want.abs()
            assert ((got - want).abs() <= limit).all()


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("N", [0, 1, 128, 129, 300])
@pytest.mark.parametrize("listed", [False, True], ids=["all", "list"])
@pytest.mark.parametrize("S", [1, 8, 9, 40])
def test_entries_across_the_edges_of_pieces_and_blocks(threads, N, listed, S) -> None:
    threads(3)
    check(inputs(S=S, N=N, L=N if listed else 0))


@pytest.mark.parametrize("window", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("S, M", [(1, 1), (1, 400), (8, 200), (9, 9), (33, 300)])
def test_windows_across_the_edges_of_pieces_and_blocks(threads, window, S, M) -> None:
    threads(2)
    check(inputs(S=S, N=9, L=4, M=M, window=window))


@pytest.mark.parametrize(
    "H, D", [(1, 1), (3, 7), (16, 65), (17, 257), (33, 70), (300, 9), (4, 576)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_and_widths_across_the_edges_of_tiles(H, D, dtype) -> None:
    check(inputs(S=9, H=H, D=D, N=50, L=33, window=5, dtype=dtype))
    check(inputs(S=9, H=H, D=D, N=50, window=5, v_dim=max(1, D - D // 5), dtype=dtype))


def test_a_v4_layer_agrees_with_float64() -> None:
    check(inputs(B=1, S=9, H=64, D=512, N=300, L=256, M=200, window=128))


@pytest.mark.parametrize("L", [0, 200], ids=["all", "list"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_at_any_number_of_threads(threads, L, dtype) -> None:
    call = inputs(S=70, H=20, D=64, N=400, L=L, window=50, dtype=dtype)
    if L:
        call["indices"] = call["indices"].clamp(max=3)  # many gradients for few rows
        call = with_forward(call, 64)
    threads(1)
    one = gradients(call)
    for n in (2, 3, 7):
        threads(n)
        assert same(gradients(call), one)


@pytest.mark.parametrize("L", [0, 150], ids=["all", "list"])
def test_nan_in_whatever_is_not_seen_reaches_nothing(L) -> None:
    call = inputs(S=20, L=L, window=20, M=90)
    call["visible"].clamp_(max=200)
    call = with_forward(call, 40)
    expected = gradients(call)
    call["kv"], call["local_kv"] = call["kv"].clone(), call["local_kv"].clone()
    call["kv"][:, 200:] = torch.nan
    call["local_kv"][~call["local_valid"]] = torch.inf
    assert same(gradients(call), expected)
    assert (expected[1][:, 200:] == 0).all()


def test_queries_that_see_nothing_and_infinite_sinks() -> None:
    call = inputs(L=20, window=5, M=60)
    call["visible"][:, ::2] = 0
    call["local_valid"][:] = False
    call["sink"] = torch.tensor([-torch.inf, torch.inf, 0.0, 1e4, -1e4])
    call = with_forward(call, 40)
    assert (call["lse"][:, ::2] == -torch.inf).all()
    check(call)
    dq, _, _, dsink = gradients(call)
    assert (dq[:, ::2] == 0).all() and dsink[:2].tolist() == [0, 0] and dsink.isfinite().all()


def test_strided_views_give_the_bits_of_contiguous_tensors() -> None:
    call = inputs(L=60, window=20, M=90)
    expected = gradients(call)
    for name, x in call.items():
        if isinstance(x, Tensor):
            wide = torch.stack([x, x], -1)[..., 0].transpose(0, -1).contiguous()
            call[name] = wide.transpose(0, -1)
    assert same(gradients(call), expected)
