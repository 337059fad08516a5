"""block_sparse_attention: what the generic kit cannot know. Numbers: contracts section 12."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.attention import _block_groups as block_groups
from transom.kernels.attention._block_groups import queries_at_once
from transom.kernels.attention.block_sparse_attention import block_sparse_attention_backward

B, S, HQ, HKV, D, DV, N, L = 2, 7, 4, 2, 8, 6, 11, 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def integers(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    lists: int = S, block_size: int = 4, causal: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    blocks = -(-N // block_size)
    return dict(
        q=normal(B, S, HQ, D, dtype=dtype),
        k=normal(B, N, HKV, D, dtype=dtype),
        v=normal(B, N, HKV, DV, dtype=dtype),
        block_indices=integers(-1, blocks + 1, (B, lists, HKV, L)),
        sink=normal(HQ, dtype=dtype),
        block_size=block_size,
        causal=causal,
    )


def times_seen(
    block_indices: Tensor, queries: int, heads: int, tokens: int, block_size: int, causal: bool
) -> Tensor:
    """[B,S,Hq,N]: how often each query sees each token."""
    span = 1 if block_indices.shape[1] == queries else block_size
    named = block_indices.repeat_interleave(span, 1)[:, :queries]
    named = named.repeat_interleave(heads // named.shape[2], 2)
    times = (named[..., None] == torch.arange(tokens) // block_size).sum(3)
    if causal:
        times = times.permute(0, 2, 1, 3).tril(tokens - queries).permute(0, 2, 1, 3)
    return times


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    sink: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention with every key weighted by how often a query sees it."""
    (_, s, h, d), n = q.shape, k.shape[1]
    times = times_seen(block_indices, s, h, n, block_size, causal)
    k, v = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v))
    # A query without keys: compute with every key, then overwrite, so that no NaN enters autograd.
    empty = (times.sum(-1) == 0)[..., None]
    logits = torch.einsum("bshd,bnhd->bshn", q, k) * (d**-0.5 if scale is None else scale)
    logits = logits + (times + empty).to(q.dtype).log()
    lse = logits.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.expand_as(lse))
    o = torch.einsum("bshn,bnhd->bshd", (logits - total[..., None]).exp(), v)
    return o.masked_fill(empty, 0), lse.masked_fill(empty[..., 0], -torch.inf)


def leaves(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call in another dtype, its float tensors asking for gradients."""
    return {
        n: x.detach().to(dtype).requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for n, x in call.items()
    }


def results(function: Any, call: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """o, lse and the gradients of every float input for fixed gradients of o and lse."""
    call = leaves(call, dtype)
    o, lse = function(**call)
    do, dlse = normal(*o.shape, seed=7).to(o.dtype), normal(*lse.shape, seed=8).to(lse.dtype)
    wanted = [x for x in call.values() if isinstance(x, Tensor) and x.requires_grad]
    # An lse of -inf has no gradient.
    loss = (o * do).sum() + (lse * dlse)[lse.isfinite()].sum()
    return [o, lse, *torch.autograd.grad(loss, wanted)]


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    finite = expected.isfinite()
    assert torch.equal(got.double()[~finite], expected[~finite])
    if not finite.any():
        return 0.0
    scale = expected[finite].abs().max().clamp(min=1e-30)
    return float((got.double() - expected)[finite].abs().max() / scale)


def attend(**call: Any) -> tuple[Tensor, Tensor]:
    return transom.block_sparse_attention(**call, return_lse=True)  # type: ignore[return-value]


@pytest.fixture(params=["64", "0.002", "0.02"], ids=["one block", "one query", "some queries"])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Temporaries of 64 MiB, in which these calls fit whole, or so little that all is cut."""
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", request.param)
    return str(request.param)


@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)],
    ids=["f64", "f32", "f16", "bf16"],
)
@pytest.mark.parametrize("lists", [7, 2])
def test_outputs_and_gradients_are_those_of_dense_attention(
    dtype: torch.dtype, bound: float, lists: int, workspace: str
) -> None:
    call = inputs(lists, dtype=dtype)
    with transom.record() as ran:
        got = results(attend, call, dtype)
    assert [c.op for c in ran] == ["block_sparse_attention", "block_sparse_attention_backward"]
    assert {c.impl for c in ran} == {"composite"}
    expected = results(oracle, call, torch.float64)
    assert max(map(error, got, expected)) <= bound
    assert [g.dtype for g in got[2:]] == [dtype] * 4


@pytest.mark.parametrize(
    "lists, block_size", [(7, 1), (7, 4), (2, 4), (3, 3), (4, 2), (7, 40), (1, 40)]
)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no sink"])
def test_every_layout(
    lists: int, block_size: int, causal: bool, sink: bool, workspace: str
) -> None:
    call = inputs(lists, block_size, causal)
    if not sink:
        call["sink"] = None
    expected = results(oracle, call, torch.float64)
    assert max(map(error, results(attend, call, torch.float64), expected)) <= 1e-12


@pytest.mark.parametrize("lists", [7, 2])
def test_the_reference_agrees_with_dense_attention(lists: int) -> None:
    call = inputs(lists)
    expected = results(oracle, call, torch.float64)
    with transom.use("reference"):
        assert max(map(error, results(attend, call, torch.float64), expected)) <= 1e-12


def test_gradients_are_finite_differences_of_the_reference() -> None:
    call = inputs(2)
    do, dlse = normal(B, S, HQ, DV, seed=7), normal(B, S, HQ, seed=8)

    def loss(**moved: Tensor) -> Tensor:
        with transom.use("reference"):
            o, lse = attend(**{**call, **moved})
        return (o * do).sum() + torch.where(lse.isfinite(), lse * dlse, 0).sum()

    got = results(attend, call, torch.float64)[2:]
    for name, gradient in zip(("q", "k", "v", "sink"), got, strict=True):
        step = 1e-6 * normal(*call[name].shape, seed=9)
        slope = (loss(**{name: call[name] + step}) - loss(**{name: call[name] - step})) / 2
        assert abs(slope - (gradient * step).sum()) <= 1e-6 * slope.abs() + 1e-13


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 1)])
def test_groups_of_heads_from_one_key_head_each_to_one_for_all(heads: int, kv_heads: int) -> None:
    call = dict(
        q=normal(B, S, heads, D),
        k=normal(B, N, kv_heads, D),
        v=normal(B, N, kv_heads, DV),
        block_indices=integers(-1, 4, (B, S, kv_heads, L)),
        block_size=4,
        causal=True,
    )
    expected = results(oracle, call, torch.float64)
    assert max(map(error, results(attend, call, torch.float64), expected)) <= 1e-12


@pytest.mark.parametrize("queries", [1, 6, 11])
def test_all_blocks_listed_is_causal_dense_attention(queries: int) -> None:
    q, k, v = normal(B, queries, HQ, D), normal(B, N, HQ, D), normal(B, N, HQ, DV)
    ids = torch.arange(3).expand(B, queries, HQ, 3)
    o, _ = attend(q=q, k=k, v=v, block_indices=ids, block_size=4, causal=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    causal = torch.ones(queries, N).tril(N - queries).bool()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal)
    torch.testing.assert_close(o, dense.transpose(1, 2))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_blocks_that_many_queries_name_are_met_by_all_at_once(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two ways to go through the pairs of queries and blocks agree; cuts change little."""
    call = inputs(causal=causal)
    named = call["block_indices"]
    queries = queries_at_once(call["q"], call["v"], named, 4)
    assert queries == S
    expected = results(attend, call, torch.float64)
    for at_once in (3, 0):
        monkeypatch.setattr(block_groups, "queries_at_once", lambda *_, n=at_once: n)
        for a, b in zip(results(attend, call, torch.float64), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_blocks_that_few_queries_name_are_gathered() -> None:
    call = inputs(block_size=1)
    assert queries_at_once(call["q"], call["v"], call["block_indices"], 1) == 0
    assert queries_at_once(call["q"], call["v"], call["block_indices"][:, :2], 4) == 0


def test_lists_shared_by_queries_equal_lists_repeated() -> None:
    for lists, block_size in ((4, 2), (3, 3), (2, 4), (1, 40)):
        call = inputs(lists, block_size)
        shared = results(attend, call, torch.float64)
        # Query s uses list s // block_size.
        own = [s // block_size for s in range(S)]
        call["block_indices"] = call["block_indices"][:, own]
        for a, b in zip(shared, results(attend, call, torch.float64), strict=True):
            torch.testing.assert_close(a, b)


def test_decode_equals_prefill() -> None:
    call = inputs()
    o, lse = attend(**call)
    for s in range(S):
        end = N - S + s + 1
        row = {n: call[n][:, s : s + 1] for n in ("q", "block_indices")}
        one, one_lse = attend(**{**call, **row, "k": call["k"][:, :end], "v": call["v"][:, :end]})
        torch.testing.assert_close(one, o[:, s : s + 1])
        torch.testing.assert_close(one_lse, lse[:, s : s + 1])


# Edge cases of contracts 12.2


def test_edge_23_queries_without_a_token_give_zeros() -> None:
    # Blocks of the future, and of queries that stand before the first token (N < S).
    call = inputs(dtype=torch.float32)
    call["block_indices"] = torch.full((B, S, HKV, L), 2)
    call["k"], call["v"] = call["k"][:, :5], call["v"][:, :5]
    call["block_indices"][:, :3] = 0
    o, lse, dq, dk, dv, _ = results(attend, call, torch.float32)
    assert torch.equal(o[:, :2], torch.zeros_like(o[:, :2])) and o[:, 2].abs().min() > 0
    assert torch.equal(o[:, 3:], torch.zeros_like(o[:, 3:]))
    assert (lse == -torch.inf)[0, :, 0].tolist() == [True, True, False, True, True, True, True]
    assert all(g.isfinite().all() for g in (dq, dk, dv))
    assert dk[:, 1:].abs().max() == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("lists", [7, 2], ids=["own lists", "shared lists"])
def test_edge_27_what_stands_in_unseen_tokens_reaches_no_output(
    lists: int, poison: float, workspace: str
) -> None:
    call = inputs(lists, dtype=torch.float32)
    clean = results(attend, call, torch.float32)
    seen_at_all = times_seen(call["block_indices"], S, HQ, N, 4, True)
    for name, token in (("k", 6), ("v", 6), ("k", 0), ("v", 9), ("k", 10), ("v", 10)):
        bad = {**call, name: call[name].clone()}
        bad[name][:, token, :, 2] = poison
        seen = seen_at_all[..., token] > 0
        got = results(attend, bad, torch.float32)
        for a, b in zip(got[:3], clean[:3], strict=True):  # o, lse, dq
            assert torch.equal(a[~seen], b[~seen])
        if poison != poison:
            assert got[0][seen].isnan().any(-1).all()  # and what is seen is not hidden


@pytest.mark.parametrize("lists", [7, 2], ids=["own lists", "shared lists"])
def test_edge_27_values_of_infinity_that_are_seen_are_not_hidden(lists: int) -> None:
    call = inputs(lists, dtype=torch.float32)
    call["block_indices"][:] = torch.tensor([0, 1, 2])
    call["v"][:, 6, :, 0] = torch.inf
    o, _ = attend(**call)
    assert not o[:, 2:, :, 0].isfinite().any() and o[:, :2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_edge_28_any_id_out_of_range_is_none(dtype: torch.dtype, workspace: str) -> None:
    call = inputs()
    ends = torch.iinfo(dtype)
    call["block_indices"] = call["block_indices"].clamp(-1, 2).to(dtype)
    expected = results(attend, call, torch.float64)
    none = call["block_indices"] == -1
    assert none.any()
    # max // 2 + 1: an id whose product with the block size wraps round to 0.
    for value in (ends.min, ends.max, ends.max // 2 + 1, 3, -3):
        call["block_indices"] = call["block_indices"].masked_fill(none, value)
        got = results(attend, call, torch.float64)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_edge_30_branches_merge_by_lse() -> None:
    call = inputs()
    call["sink"] = None
    parts = [
        attend(**{**call, "block_indices": call["block_indices"][..., i : i + 1]}) for i in range(L)
    ]
    o, lse = attend(**call)
    total = torch.stack([part[1] for part in parts]).logsumexp(0)
    torch.testing.assert_close(total, lse)
    shift = total.masked_fill(total == -torch.inf, 0)
    merged = sum((part_lse - shift).exp()[..., None] * part for part, part_lse in parts)
    torch.testing.assert_close(merged, o)


def test_edge_31_infinite_sinks() -> None:
    call = inputs(dtype=torch.float32)
    call["sink"] = torch.tensor([torch.inf, -torch.inf, 1e4, 0.0])
    o, lse, *gradients = results(attend, call, torch.float32)
    plain = attend(**{**call, "sink": None})
    assert o[:, :, [0, 2]].abs().max() == 0
    assert torch.equal(o[:, :, 1], plain[0][:, :, 1])
    assert torch.equal(lse, plain[1])
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[-1][:3].tolist() == [0, 0, 0]


def test_edge_32_more_queries_than_a_launch_grid_holds() -> None:
    queries = 70_000
    call = dict(
        q=normal(1, queries, 1, 2, dtype=torch.float32),
        k=normal(1, 8, 1, 2, dtype=torch.float32),
        v=normal(1, 8, 1, 2, dtype=torch.float32),
        block_indices=(torch.arange(queries) % 4).int()[None, :, None, None],
        block_size=2,
        causal=False,
    )
    torch.testing.assert_close(attend(**call), oracle(**call))


def test_edge_47_a_block_named_twice_counts_twice() -> None:
    call = inputs(causal=False)
    call["sink"] = None
    call["block_indices"][:] = 1
    three, lse = attend(**call)
    call["block_indices"] = call["block_indices"][..., :1]
    one, lse_one = attend(**call)
    torch.testing.assert_close(three, one)
    torch.testing.assert_close(lse, lse_one + torch.tensor(3.0).double().log())


# Manners


@pytest.mark.parametrize("empty", ["B", "S", "N", "L"])
def test_empty_dims(empty: str) -> None:
    call = inputs(dtype=torch.float32)
    cut = {
        "B": {n: 0 for n in ("q", "k", "v", "block_indices")},
        "S": {"q": 1, "block_indices": 1},
        "N": {"k": 1, "v": 1},
        "L": {"block_indices": 3},
    }[empty]
    call.update({n: call[n].narrow(dim, 0, 0) for n, dim in cut.items()})
    o, lse, *gradients = results(attend, call, torch.float32)
    assert o.shape == (*call["q"].shape[:3], DV)
    assert o.abs().sum() == 0 and (lse == -torch.inf).all()
    assert all(g.abs().sum() == 0 for g in gradients)


def test_the_same_inputs_give_the_same_bits(workspace: str) -> None:
    call = inputs(dtype=torch.float32)
    call["block_indices"] = call["block_indices"].clamp(max=0)  # all gradients go to four tokens
    first = results(attend, call, torch.float32)
    for _ in range(5):
        again = results(attend, call, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_strided_inputs_give_the_bits_of_contiguous_ones() -> None:
    call = inputs(dtype=torch.float32)
    expected = attend(**call)
    both = torch.cat((call["v"], call["k"], call["v"]), -1)
    layouts = dict(
        heads_first={n: call[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "kv"},
        one_tensor=dict(k=both[..., DV : DV + D], v=both[..., -DV:]),
        one_value={"v": call["v"][:1, :1].expand(B, N, HKV, DV)},
        one_head={n: call[n][:, :, :1].expand(-1, -1, HKV, -1) for n in "kv"},
    )
    for moved in layouts.values():
        whole = {n: x.contiguous() for n, x in moved.items()}
        for a, b in zip(attend(**{**call, **moved}), attend(**{**call, **whole}), strict=True):
            assert torch.equal(a, b)
    for name in ("q", "k", "v", "block_indices"):
        call[name] = call[name].transpose(0, 3).contiguous().transpose(0, 3)
    for a, b in zip(attend(**call), expected, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


def test_backward_is_an_operator_of_its_own() -> None:
    call = inputs()
    o, lse = attend(**call)
    names = ("q", "k", "v", "block_indices", "sink")
    do = normal(B, S, HQ, DV, seed=7)
    gradients = block_sparse_attention_backward(
        do,
        torch.zeros_like(lse),
        *(call[n] for n in names),
        o,
        lse,
        block_size=4,
        causal=True,
        scale=D**-0.5,
    )
    moved = leaves(call, torch.float64)
    (attend(**moved)[0] * do).sum().backward()
    for name, gradient in zip(("q", "k", "v", "sink"), gradients, strict=True):
        torch.testing.assert_close(moved[name].grad, gradient)


# Bad input


@pytest.mark.parametrize(
    "change, text",
    [
        ({"block_size": 0}, "block_size is 0; must be >= 1"),
        (
            {"q": normal(B, S, 3, D), "sink": None},
            "q has Hq = 3 heads; must be a multiple of the Hkv = 2 heads of k",
        ),
        (
            {"block_indices": integers(0, 2, (B, 5, HKV, L))},
            r"block_indices has Sq = 5 lists; expected S = 7 or ceil\(S/block_size\) = 2$",
        ),
        # Two queries a list cover the queries as well, but the contract knows only blocks.
        ({"block_indices": integers(0, 2, (B, 4, HKV, L))}, "block_indices has Sq = 4 lists"),
        ({"block_indices": integers(0, 2, (B, 0, HKV, L))}, "block_indices has Sq = 0 lists"),
        ({"block_indices": integers(0, 2, (B, S, HQ, L))}, "block_indices has Hkv = 4; k has Hkv"),
        ({"v": normal(B, N + 1, HKV, DV)}, "v has N = 12; k has N = 11"),
        ({"sink": normal(HKV)}, "sink has Hq = 2; q has Hq = 4"),
    ],
)
def test_bad_shapes_and_arguments(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=rf"^block_sparse_attention: {text}"):
        attend(**{**inputs(), **change})


@pytest.mark.parametrize(
    "change, text",
    [
        ({"k": normal(B, N, HKV, D).float()}, "k is float32; expected float64"),
        ({"block_indices": normal(B, S, HKV, L)}, "block_indices is float64; expected int32"),
    ],
)
def test_bad_dtypes(change: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=rf"^block_sparse_attention: {text}"):
        attend(**{**inputs(), **change})
