"""Native sparse_attention: pieces, splits, threads and sizes, which the kit cannot know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g).to(dtype)


def integers(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    B: int = 2,
    S: int = 40,
    H: int = 5,
    D: int = 40,
    N: int = 300,
    L: int = 0,
    M: int = 0,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    sink: bool = True,
) -> dict[str, Any]:
    """A call with visibility, a list if L, and a window with padding if there is one."""
    call: dict[str, Any] = dict(
        q=normal(B, S, H, D, dtype=dtype),
        kv=normal(B, N, D, dtype=dtype),
        visible=integers(0, N + 1, (B, S), seed=1),
    )
    if L:
        call["indices"] = integers(-1, N + 2, (B, S, L))
    if window:
        call.update(window=window, local_kv=normal(B, max(M, S), D, seed=1, dtype=dtype))
        call["local_valid"] = integers(0, 9, (B, max(M, S)), seed=2) > 0
    if sink:
        call["sink"] = normal(H, seed=3)
    return call


def attend(impl: str = "native", **call: Any) -> tuple[Tensor, Tensor]:
    with transom.use(sparse_attention=impl), transom.record() as calls:
        out = transom.sparse_attention(**call, return_lse=True)
    assert [c.impl for c in calls] == [impl]
    return out


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(call: dict[str, Any], tolerance: float = 4e-6) -> None:
    """Agrees with the composite in float64, except for rounding."""
    o, lse = attend(**call)
    wide = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in call.items()
    }
    want, want_lse = attend("composite", **wide)
    assert o.dtype == call["q"].dtype and lse.dtype == torch.float32
    largest = float(want.abs().max()) if want.numel() else 0.0
    limit = tolerance * (1 + largest) + torch.finfo(o.dtype).eps * want.abs()
    assert ((o - want).abs() <= limit).all()
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=tolerance)


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("N", [0, 1, 127, 128, 129, 256, 257])
@pytest.mark.parametrize("listed", [False, True], ids=["all", "list"])
@pytest.mark.parametrize("count", [1, 3, 37])
def test_entries_across_the_edges_of_pieces(threads, N, listed, count) -> None:
    for n in (1, 3):
        threads(n)
        check(inputs(S=count, N=N, L=N if listed else 0))


@pytest.mark.parametrize("window", [1, 7, 127, 128, 129, 300])
@pytest.mark.parametrize("S, M", [(1, 1), (1, 400), (15, 200), (16, 16), (17, 400), (150, 150)])
def test_windows_across_the_edges_of_pieces_and_blocks(threads, window, S, M) -> None:
    for n in (1, 4):
        threads(n)
        check(inputs(S=S, N=9, L=4, M=M, window=window))


@pytest.mark.parametrize(
    "H, D", [(1, 1), (3, 7), (15, 64), (16, 65), (17, 255), (33, 257), (4, 576)]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_heads_and_widths_across_the_edges_of_tiles(H, D, dtype) -> None:
    call = inputs(S=9, H=H, D=D, N=50, L=33, window=5, dtype=dtype)
    check(call)
    check({**call, "v_dim": D - D // 5})
    check({**call, "v_dim": D // 3, "scale": -0.3})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_v4_layer_agrees_with_float64(dtype) -> None:
    call = inputs(B=1, S=4, H=64, D=512, N=700, L=512, M=200, window=128, dtype=dtype)
    check(call)
    check({**call, "indices": None})


def parts_of(call: dict[str, Any], s: int) -> dict[str, Any]:
    """The call of query s alone; of the window's tokens only those that it sees."""
    M, window = call["local_kv"].shape[1], call["window"]
    stop = M - call["q"].shape[1] + s + 1
    near = slice(max(0, stop - window), stop)
    return {
        **call,
        **{n: call[n][:, s : s + 1] for n in ("q", "visible", "indices") if n in call},
        **{n: call[n][:, near] for n in ("local_kv", "local_valid")},
    }


@pytest.mark.parametrize("L", [0, 290], ids=["all", "list"])
@pytest.mark.parametrize("window", [50, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_has_the_same_bits_in_prefill_and_alone(threads, L, window, dtype) -> None:
    call = inputs(S=50, H=20, N=300, L=L, M=333, window=window, dtype=dtype)
    whole = attend(**call)
    for n in (1, 2, 7):
        threads(n)
        for s in (0, 1, 15, 16, 31, 49):
            alone = attend(**parts_of(call, s))
            assert same(alone, tuple(x[:, s : s + 1] for x in whole))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threads_that_share_the_heads_of_a_window_change_no_bits(threads, count, dtype) -> None:
    call = inputs(B=1, S=count, H=70, D=512, N=0, M=200, window=100, dtype=dtype)
    threads(1)
    alone = attend(**call)
    for n in (2, 3, 5, 7):
        threads(n)
        assert same(attend(**call), alone)
        check(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_larger_than_the_caches_has_the_same_bits(dtype) -> None:
    item = dtype.itemsize
    call = inputs(B=1, S=48 * 2**20 // (256 * 512 * item), H=256, D=512, N=3, dtype=dtype)
    call["visible"][0, :3] = torch.tensor([0, 2, 3])  # the first query sees nothing
    attend(**call)
    large = attend(**call)  # into the memory of the first: such an output is stored past the caches
    few = {n: x[:, :3] if n in ("q", "visible") else x for n, x in call.items()}
    assert same(tuple(x[:, :3] for x in large), attend(**few))


def test_entries_that_do_not_exist_yet_change_no_bit() -> None:
    call = inputs(B=1, S=1, H=8, N=300, window=9, M=20)
    call["visible"] = torch.tensor([[140]])
    short = {**call, "kv": call["kv"][:, :140], "visible": None}
    assert same(attend(**call), attend(**short))
    listed = {**call, "indices": torch.arange(300).view(1, 1, -1)}
    assert same(attend(**call), attend(**listed))


@pytest.mark.parametrize("S", [1, 2, 30])
@pytest.mark.parametrize("L", [0, 500], ids=["all", "list"])
def test_the_same_bits_at_any_number_of_threads(threads, S, L) -> None:
    call = inputs(B=3, S=S, H=40, D=64, N=2000, L=L, window=128, M=200)
    threads(1)
    one = attend(**call)
    for n in (2, 3, 7):
        threads(n)
        assert same(attend(**call), one)


@pytest.mark.parametrize("S", [1, 40])
@pytest.mark.parametrize("L", [0, 150], ids=["all", "list"])
def test_nan_in_whatever_is_not_seen_reaches_nothing(threads, S, L) -> None:
    call = inputs(S=S, L=L, window=20, M=90)
    if L:
        call["indices"][call["indices"] == 7] = -1
    call["visible"].clamp_(max=200)
    expected = attend(**call)
    spoilt = {n: call[n].clone() for n in ("kv", "local_kv")}
    if L:
        spoilt["kv"][:, 7] = torch.nan
    spoilt["kv"][:, 200:] = torch.inf
    spoilt["local_kv"][~call["local_valid"]] = torch.nan
    spoilt["local_kv"][:, : 90 - S - 20 + 1] = torch.nan
    for n in (1, 4):
        threads(n)
        assert same(attend(**{**call, **spoilt}), expected)


@pytest.mark.parametrize("S", [1, 33])
def test_a_query_that_sees_nothing(threads, S) -> None:
    call = inputs(S=S, L=20, window=5, M=60)
    call["visible"][:] = 0
    call["local_valid"][:] = False
    for name, x in call.items():
        if name in ("kv", "local_kv"):
            x.fill_(torch.nan)
    for n in (1, 3):
        threads(n)
        o, lse = attend(**call)
        assert (o == 0).all() and (lse == -torch.inf).all()


def test_infinite_and_distant_sinks() -> None:
    call = inputs(H=5, L=20, window=5)
    plain = attend(**{**call, "sink": None})
    o, lse = attend(**{**call, "sink": torch.tensor([-torch.inf, -1e4, torch.inf, 1e4, 0.0])})
    assert torch.equal(lse, plain[1])
    assert torch.equal(o[:, :, :2], plain[0][:, :, :2])
    assert (o[:, :, 2:4] == 0).all() and o.isfinite().all()


def test_nan_and_infinity_in_what_is_seen_show() -> None:
    call = inputs(B=1, S=3, N=5, sink=False)
    call["visible"] = torch.tensor([[1, 2, 3]])
    call["kv"][0, 1] = torch.nan
    o, lse = attend(**call)
    assert o[:, 0].isfinite().all() and lse[:, 0].isfinite().all()
    assert o[:, 1:].isnan().all() and lse[:, 1:].isnan().all()


def test_logits_of_any_size() -> None:
    for size in (1e-30, 1.0, 1e3, 1e15):
        call = inputs(S=20, N=200, window=9, sink=False)
        call["q"] *= size
        o, lse = attend(**call)
        want, want_lse = attend("composite", **call)
        assert o.isfinite().all()
        torch.testing.assert_close(lse, want_lse, rtol=2e-6, atol=1e-5)
        if size <= 1:
            torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("S", [1, 37])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_views_give_the_bits_of_contiguous_tensors(threads, S, dtype) -> None:
    threads(3)
    call = inputs(S=S, L=60, window=20, M=90, dtype=dtype)
    expected = attend(**call)
    for name, x in call.items():
        if isinstance(x, Tensor):
            call[name] = (
                torch.stack([x, x], -1)[..., 0].transpose(0, -1).contiguous().transpose(0, -1)
            )
    assert same(attend(**call), expected)
    rows = {n: torch.cat([call[n], call[n]], -1)[..., : call[n].shape[-1]] for n in ("q", "kv")}
    assert same(attend(**{**call, **rows}), expected)


def test_rows_beyond_2_to_the_31_elements_are_addressed(threads) -> None:
    far = 2**31 + 64
    try:
        storage = torch.empty(far + 64, dtype=torch.bfloat16)  # touched in two places only
    except RuntimeError:
        pytest.skip("the system promises no 4 GB of address space")
    kv = storage.as_strided((1, 2, 64), (0, far, 1))
    kv.copy_(normal(1, 2, 64))
    call = dict(q=normal(1, 1, 8, 64, dtype=torch.bfloat16), kv=kv)
    assert same(attend(**call), attend(**{**call, "kv": kv.contiguous()}))


def test_float64_is_declined_with_a_sentence() -> None:
    call = inputs()
    wide = {n: x.double() if x.is_floating_point() else x for n, x in call.items()}
    names = ("q", "kv", "visible", "sink")
    (shown,) = transom.explain(
        "sparse_attention", **{n: wide[n] for n in names}, scale=1.0, v_dim=40
    ).rejected["native"]
    assert shown == "q is float64; supported: float32, bfloat16, float16"
