"""The native gradient of block_sparse_attention: chunks of keys, threads, what is not seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

OP = "block_sparse_attention_backward"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype)


def inputs(
    B: int = 2,
    S: int = 21,
    Hq: int = 6,
    Hkv: int = 2,
    D: int = 24,
    Dv: int = 20,
    N: int = 300,
    L: int = 5,
    size: int = 16,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
    causal: bool = True,
) -> dict[str, Any]:
    """The arguments of the gradient for a forward that the composite has run in float64; lists name
    blocks twice, and blocks that do not exist."""
    lists, blocks = -(-S // size) if shared else S, -(-N // size)
    g = torch.Generator().manual_seed(5)
    return with_forward(
        dict(
            q=normal(B, S, Hq, D, dtype=dtype),
            k=normal(B, N, Hkv, D, dtype=dtype),
            v=normal(B, N, Hkv, Dv, seed=1, dtype=dtype),
            block_indices=torch.randint(-1, blocks + 1, (B, lists, Hkv, L), generator=g),
            block_size=size,
            causal=causal,
            sink=normal(Hq, seed=2),
            scale=D**-0.5,
        )
    )


def with_forward(call: dict[str, Any]) -> dict[str, Any]:
    wide = {n: x for n, x in double(call).items() if n not in ("do", "dlse", "o", "lse")}
    with transom.use("composite"):
        o, lse = transom.block_sparse_attention(**wide, return_lse=True)
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
            # The second term is for sums of a few numbers that cancel each other.
            limit = 1e-5 * float(want.abs().max()) + 1e-7
            limit = limit + torch.finfo(got.dtype).eps * want.abs()
            assert ((got - want).abs() <= limit).all()


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 64, 200])
@pytest.mark.parametrize("N", [0, 127, 129, 400])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_across_the_edges_of_chunks(threads, size, N, causal) -> None:
    threads(2)
    check(inputs(S=min(N, 19) or 3, N=N, size=size, causal=causal))


@pytest.mark.parametrize("shared", [False, True], ids=["own lists", "shared lists"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("Hq, Hkv, D, Dv", [(1, 1, 1, 1), (34, 2, 65, 17), (16, 1, 257, 600)])
def test_heads_widths_and_dtypes(shared, dtype, Hq, Hkv, D, Dv) -> None:
    check(inputs(S=37, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, shared=shared, dtype=dtype))


def test_queries_before_the_first_key() -> None:
    check(inputs(S=40, N=9, size=4))


@pytest.mark.parametrize("shared", [False, True], ids=["own lists", "shared lists"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_at_any_number_of_threads(threads, shared, dtype) -> None:
    call = inputs(S=70, N=500, L=12, shared=shared, dtype=dtype)
    threads(1)
    one = gradients(call)
    for n in (2, 3, 7):
        threads(n)
        assert same(gradients(call), one)


def test_nan_in_whatever_is_not_seen_reaches_nothing() -> None:
    call = inputs(S=30, N=200)
    call["block_indices"][call["block_indices"] == 3] = 4
    call = with_forward(call)
    expected = gradients(call)
    for name in ("k", "v"):
        call[name] = call[name].clone()
        call[name][:, 48:64] = torch.nan
    got = gradients(call)
    assert same(got, expected)
    assert (got[1][:, 48:64] == 0).all() and (got[2][:, 48:64] == 0).all()


def test_queries_that_see_nothing_and_infinite_sinks() -> None:
    call = inputs(Hq=10)
    call["block_indices"][:, ::2] = -1
    call["sink"] = torch.tensor([-torch.inf, torch.inf, 0.0, 1e4, -1e4] * 2)
    call = with_forward(call)
    assert (call["lse"][:, ::2] == -torch.inf).all()
    check(call)
    dq, _, _, dsink = gradients(call)
    assert (dq[:, ::2] == 0).all() and dsink[:2].tolist() == [0, 0] and dsink.isfinite().all()


def test_strided_views_give_the_bits_of_contiguous_tensors() -> None:
    call = inputs()
    expected = gradients(call)
    for name, x in call.items():
        if isinstance(x, Tensor):
            wide = torch.stack([x, x], -1)[..., 0].transpose(0, -1).contiguous()
            call[name] = wide.transpose(0, -1)
    assert same(gradients(call), expected)
