"""Native lightning_indexer_kl and its gradient: pieces of lists, threads, what is not seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LOSS, GRADIENT = "lightning_indexer_kl", "lightning_indexer_kl_backward"


def inputs(
    B: int = 2,
    S: int = 21,
    H: int = 5,
    D: int = 24,
    N: int = 300,
    L: int = 140,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Lists that name keys twice and keys that do not exist; some targets are 0."""
    g = torch.Generator().manual_seed(B + S + H + D + N + L)
    target = torch.rand(B, S, L, generator=g)
    target = target * (target > 0.2)
    return dict(
        q=torch.randn(B, S, H, D, generator=g).to(dtype) * D**-0.5,
        k=torch.randn(B, N, D, generator=g).to(dtype),
        weights=torch.randn(B, S, H, generator=g),
        target=target / target.sum(-1, keepdim=True).clamp(min=1e-3),
        indices=torch.randint(-1, N + 2, (B, S, L), generator=g),
    )


def run(op: str, call: dict[str, Any], impl: str = "native") -> tuple[Tensor, ...]:
    with transom.use(**{op: impl}), transom.record() as calls:
        out = getattr(transom, op)(**call)
    assert [c.impl for c in calls if c.op == op] == [impl]
    return out if isinstance(out, tuple) else (out,)


def both(call: dict[str, Any], impl: str = "native") -> tuple[Tensor, ...]:
    dloss = torch.linspace(-1, 2, call["q"].shape[0] * call["q"].shape[1])
    dloss = dloss.view(call["q"].shape[:2]).to(torch.promote_types(call["q"].dtype, torch.float32))
    return run(LOSS, call, impl) + run(GRADIENT, {**call, "dloss": dloss}, impl)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(call: dict[str, Any]) -> None:
    wide = {n: x.double() if x.is_floating_point() else x for n, x in call.items()}
    for got, want in zip(both(call), both(wide, "composite"), strict=True):
        if want.numel():
            kind = torch.finfo(got.dtype)
            limit = 1e-5 * float(want.abs().max()) + kind.eps * (want.abs() + kind.tiny)
            assert ((got - want).abs() <= limit).all()


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("L", [0, 1, 127, 128, 129, 300])
@pytest.mark.parametrize("S", [1, 16, 17, 40])
def test_lists_across_the_edges_of_pieces_and_queries_in_hand(threads, L, S) -> None:
    threads(2)
    check(inputs(S=S, L=L))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H, D, N", [(1, 1, 3), (33, 65, 50), (64, 128, 400), (300, 9, 7)])
def test_heads_widths_and_dtypes(dtype, H, D, N) -> None:
    check(inputs(B=1, S=9, H=H, D=D, N=N, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_at_any_number_of_threads(threads, dtype) -> None:
    call = inputs(S=50, N=9, dtype=dtype)
    threads(1)
    one = both(call)
    for n in (2, 3, 7):
        threads(n)
        assert same(both(call), one)


def test_keys_that_no_query_lists_have_no_influence() -> None:
    call = inputs(S=20, N=300)
    call["indices"] = call["indices"].clamp(max=200)
    expected = both(call)
    call["k"] = call["k"].clone()
    call["k"][:, 201:] = torch.nan
    assert same(both(call), expected) and (expected[2][:, 201:] == 0).all()


def test_queries_that_list_nothing_and_small_targets() -> None:
    call = inputs()
    call["indices"][:, ::2] = -1
    call["target"][:, 1] = torch.logspace(-44, 0, 140)
    check(call)
    loss, dq, _, dweights, dtarget = both(call)
    assert all((x[:, ::2] == 0).all() for x in (loss, dq, dweights, dtarget))


def test_strided_views_give_the_bits_of_contiguous_tensors() -> None:
    call = inputs()
    expected = both(call)
    for name, x in call.items():
        wide = torch.stack([x, x], -1)[..., 0].transpose(0, -1).contiguous()
        call[name] = wide.transpose(0, -1)
    assert same(both(call), expected)
