"""Native block_sparse_attention: pieces of lists, shared tiles, threads, prefill and decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype)


def inputs(
    B: int = 2,
    S: int = 40,
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
    """A call with lists that name blocks twice, and blocks that do not exist."""
    lists, blocks = -(-S // size) if shared else S, -(-N // size)
    g = torch.Generator().manual_seed(5)
    return dict(
        q=normal(B, S, Hq, D, dtype=dtype),
        k=normal(B, N, Hkv, D, dtype=dtype),
        v=normal(B, N, Hkv, Dv, seed=1, dtype=dtype),
        block_indices=torch.randint(-1, blocks + 1, (B, lists, Hkv, L), generator=g),
        block_size=size,
        causal=causal,
        sink=normal(Hq, seed=2),
    )


def attend(impl: str = "native", **call: Any) -> tuple[Tensor, Tensor]:
    with transom.use(block_sparse_attention=impl), transom.record() as calls:
        out = transom.block_sparse_attention(**call, return_lse=True)
    assert [c.impl for c in calls] == [impl]
    return out


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(call: dict[str, Any]) -> None:
    o, lse = attend(**call)
    wide = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in call.items()
    }
    want, want_lse = attend("composite", **wide)
    limit = 2e-5 + torch.finfo(o.dtype).eps * want.abs()
    assert ((o - want).abs() <= limit).all()
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=4e-6)


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 7, 64, 128, 200, 1000])
@pytest.mark.parametrize("N", [0, 1, 127, 128, 129, 400])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_across_the_edges_of_pieces(size, N, causal) -> None:
    check(inputs(S=min(N, 19) or 3, N=N, size=size, causal=causal))


def test_blocks_of_any_length_end_with_the_keys() -> None:
    call = inputs(size=300, L=1)
    expected = attend(**call)
    for size in (1 << 16, (1 << 16) + 1, 1 << 20):
        assert same(attend(**{**call, "block_size": size}), expected)
    for size in ((1 << 20) + 1, 1 << 40, 2**63 - 1):
        with pytest.raises(ValueError, match=f"block_size is {size}; must be at most 1048576"):
            attend(**{**call, "block_size": size})


@pytest.mark.parametrize("shared", [False, True], ids=["own lists", "shared lists"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("Hq, Hkv, D, Dv", [(1, 1, 1, 1), (34, 2, 65, 17), (16, 1, 257, 128)])
def test_heads_widths_and_dtypes(shared, dtype, Hq, Hkv, D, Dv) -> None:
    check(inputs(S=37, Hq=Hq, Hkv=Hkv, D=D, Dv=Dv, shared=shared, dtype=dtype))


@pytest.mark.parametrize("shared", [False, True], ids=["own lists", "shared lists"])
def test_the_same_bits_at_any_number_of_threads(threads, shared) -> None:
    call = inputs(S=70, N=500, L=12, shared=shared)
    threads(1)
    one = attend(**call)
    for n in (2, 3, 7):
        threads(n)
        assert same(attend(**call), one)


@pytest.mark.parametrize("L", [4, 20])
def test_a_query_has_the_same_bits_in_prefill_and_alone(L) -> None:
    call = inputs(S=50, N=333, L=L)
    whole = attend(**call)
    for s in (0, 17, 49):
        stop = 333 - 50 + s + 1
        part = {n: call[n][:, s : s + 1] for n in ("q", "block_indices")}
        alone = attend(**{**call, **part, "k": call["k"][:, :stop], "v": call["v"][:, :stop]})
        assert same(alone, tuple(x[:, s : s + 1] for x in whole))


def test_nan_in_whatever_is_not_seen_reaches_nothing() -> None:
    call = inputs(S=30, N=200)
    call["block_indices"][call["block_indices"] == 3] = 4
    expected = attend(**call)
    for name in ("k", "v"):
        call[name] = call[name].clone()
        call[name][:, 48:64] = torch.nan
    assert same(attend(**call), expected)
    call["block_indices"][:] = -1
    o, lse = attend(**call)
    assert (o == 0).all() and (lse == -torch.inf).all()


def test_strided_views_give_the_bits_of_contiguous_tensors() -> None:
    call = inputs()
    expected = attend(**call)
    for name, x in call.items():
        if isinstance(x, Tensor):
            wide = torch.stack([x, x], -1)[..., 0].transpose(0, -1).contiguous()
            call[name] = wide.transpose(0, -1)
    assert same(attend(**call), expected)
