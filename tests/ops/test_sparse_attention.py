"""sparse_attention: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.attention.sparse_attention import sparse_attention_backward

B, S, H, D, N, L, M = 2, 6, 3, 8, 9, 5, 8


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def integers(low: int, high: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def inputs(dtype: torch.dtype = torch.float64, **absent: None) -> dict[str, Any]:
    """A call that uses everything: lists with holes, visibility, a window with padding, a sink."""
    call = dict(
        q=normal(B, S, H, D, dtype=dtype),
        kv=normal(B, N, D, dtype=dtype),
        indices=integers(-1, N + 1, (B, S, L)),
        visible=integers(0, N + 1, (B, S), seed=1),
        local_kv=normal(B, M, D, seed=1, dtype=dtype),
        sink=normal(H, dtype=dtype),
        local_valid=integers(0, 5, (B, M), seed=2) > 0,
        window=3,
    )
    call.update(absent)
    if call["local_kv"] is None:
        call.update(window=0, local_valid=None)
    return call


def oracle(
    q: Tensor,
    kv: Tensor,
    indices: Tensor | None = None,
    *,
    visible: Tensor | None = None,
    local_kv: Tensor | None = None,
    window: int = 0,
    sink: Tensor | None = None,
    scale: float | None = None,
    v_dim: int | None = None,
    local_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention over [kv ; local_kv], each key weighted by how often a query sees it."""
    (b, s, _, d), n = q.shape, kv.shape[1]
    times = q.new_ones(b, s, n)
    if indices is not None:
        times = (indices[..., None] == torch.arange(n)).sum(2).to(q.dtype)
    if visible is not None:
        times = times * (torch.arange(n) < visible[..., None])
    keys = kv
    if local_kv is not None:
        m = local_kv.shape[1]
        distance = (m - s + torch.arange(s))[:, None] - torch.arange(m)
        near = ((distance >= 0) & (distance < window)).to(q.dtype).expand(b, s, m)
        if local_valid is not None:
            near = near * local_valid[:, None]
        keys, times = torch.cat([kv, local_kv], 1), torch.cat([times, near], 2)
    logits = torch.einsum("bshd,bnd->bshn", q, keys) * (d**-0.5 if scale is None else scale)
    # A query without keys: compute with every key, then overwrite, so that no NaN enters autograd.
    empty = (times.sum(-1) == 0)[..., None]
    logits = logits + (times + empty).log()[:, :, None]
    lse = logits.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.expand_as(lse))
    p = (logits - total[..., None]).exp()
    o = torch.einsum("bshn,bnd->bshd", p, keys[..., : d if v_dim is None else v_dim])
    return o.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)


def leaves(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The call in another dtype, its float tensors asking for gradients."""
    return {
        n: x.detach().to(dtype).requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for n, x in call.items()
    }


def results(function: Any, call: dict[str, Any], dtype: torch.dtype, **more: Any) -> list[Tensor]:
    """o, lse and the gradients of every float input for fixed gradients of o and lse."""
    call = leaves(call, dtype)
    o, lse = function(**call, **more)
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
    return transom.sparse_attention(**call, return_lse=True)  # type: ignore[return-value]


@pytest.fixture(params=["64", "0.002"], ids=["one block", "many blocks"])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Temporaries of 64 MiB, in which these calls fit whole, or of 2 KiB: one query, 16 keys."""
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", request.param)
    return str(request.param)


@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)],
    ids=["f64", "f32", "f16", "bf16"],
)
@pytest.mark.parametrize("v_dim", [None, 5])
def test_outputs_and_gradients_are_those_of_dense_attention(
    dtype: torch.dtype, bound: float, v_dim: int | None, workspace: str
) -> None:
    call = inputs(dtype)
    with transom.record() as ran:
        got = results(attend, call, dtype, v_dim=v_dim)
    assert [c.op for c in ran] == ["sparse_attention", "sparse_attention_backward"]
    assert {c.impl for c in ran} == {"composite"}
    expected = results(oracle, call, torch.float64, v_dim=v_dim)
    assert max(map(error, got, expected)) <= bound
    assert [g.dtype for g in got[2:]] == [dtype] * 4


@pytest.mark.parametrize(
    "absent",
    [
        set(c)
        for n in range(1, 5)
        for c in itertools.combinations(["indices", "visible", "local_kv", "sink"], n)
    ],
    ids=lambda names: "without " + ",".join(sorted(names)),
)
def test_every_combination_of_optional_inputs(absent: set[str], workspace: str) -> None:
    call = inputs(**dict.fromkeys(absent))
    expected = results(oracle, call, torch.float64)
    assert max(map(error, results(attend, call, torch.float64), expected)) <= 1e-12


def test_the_reference_agrees_with_dense_attention() -> None:
    call = inputs()
    expected = results(oracle, call, torch.float64)
    with transom.use("reference"):
        assert max(map(error, results(attend, call, torch.float64), expected)) <= 1e-12


def test_gradients_are_finite_differences_of_the_reference() -> None:
    call = inputs()
    do, dlse = normal(B, S, H, D, seed=7), normal(B, S, H, seed=8)

    def loss(**moved: Tensor) -> Tensor:
        with transom.use("reference"):
            o, lse = attend(**{**call, **moved})
        return (o * do).sum() + torch.where(lse.isfinite(), lse * dlse, 0).sum()

    got = results(attend, call, torch.float64)[2:]
    for name, gradient in zip(("q", "kv", "local_kv", "sink"), got, strict=True):
        step = 1e-6 * normal(*call[name].shape, seed=9)
        slope = (loss(**{name: call[name] + step}) - loss(**{name: call[name] - step})) / 2
        assert abs(slope - (gradient * step).sum()) <= 1e-6 * slope.abs() + 1e-13


# Edge cases of contracts 12.2


@pytest.mark.parametrize("length", [1, 127, 128, 129, 259])
def test_edge_20_44_lengths_around_a_window_of_128(length: int) -> None:
    x = normal(1, length, 4)
    call = dict(q=normal(1, length, 1, 4), kv=x[:, :0], local_kv=x, window=128)
    o, _ = attend(**call)
    for t in {0, length - 1, min(length - 1, 127)}:
        near = x[0, max(0, t - 127) : t + 1]
        p = torch.softmax(near @ call["q"][0, t, 0] * 0.5, 0)
        torch.testing.assert_close(o[0, t, 0], p @ near)


def test_edge_44_a_window_of_one_sees_the_token_itself() -> None:
    x = normal(1, M, D)
    o, _ = attend(q=normal(1, S, H, D), kv=x[:, :0], local_kv=x, window=1)
    torch.testing.assert_close(o, x[:, M - S :, None].expand(1, S, H, D))


@pytest.mark.parametrize("selected", [True, False], ids=["list", "every entry"])
def test_edge_23_no_visible_entry_gives_zeros_and_a_sink_changes_nothing(selected: bool) -> None:
    call = inputs(local_kv=None, indices=inputs()["indices"] if selected else None)
    call["visible"][:] = 0
    o, lse, *gradients = results(attend, call, torch.float32)
    assert torch.equal(o, torch.zeros(B, S, H, D))
    assert (lse == -torch.inf).all()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_edge_23_visible_may_pass_the_number_of_entries() -> None:
    call = inputs(indices=None)
    call["visible"][:] = N
    expected = attend(**call)
    call["visible"] = call["visible"].int() + 5
    for a, b in zip(attend(**call), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("selected", [True, False], ids=["list", "every entry"])
def test_edge_27_what_stands_in_unseen_rows_reaches_no_output(
    selected: bool, poison: float, workspace: str
) -> None:
    call = inputs(torch.float32, **({} if selected else {"indices": None}))
    # Query s sees entries below s and 3 tokens: each row is seen by some queries and not by others.
    call["visible"] = torch.arange(S).expand(B, S).contiguous()
    call["local_valid"][:, 6] = False
    clean = results(attend, call, torch.float32)
    for name, row in (("kv", 3), ("kv", 0), ("local_kv", 4), ("local_kv", 6), ("local_kv", 0)):
        bad = {**call, name: call[name].clone()}
        bad[name][:, row, 2] = poison
        if name == "kv":
            seen = call["visible"] > row
            if selected:
                seen = seen & (call["indices"] == row).any(-1)
        else:
            distance = M - S + torch.arange(S) - row
            seen = ((distance >= 0) & (distance < 3)) & call["local_valid"][:, row, None]
        got = results(attend, bad, torch.float32)
        for a, b in zip(got[:3], clean[:3], strict=True):  # o, lse, dq
            assert torch.equal(a[~seen], b[~seen])
        if not seen.any():
            assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))
        elif poison != poison:
            assert got[0][seen].isnan().all()  # and a row that is seen is not hidden


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_edge_28_any_index_out_of_range_is_none(dtype: torch.dtype, workspace: str) -> None:
    call = inputs()
    ends = torch.iinfo(dtype)
    call["indices"] = call["indices"].clamp(-1, N - 1).to(dtype)
    expected = results(attend, call, torch.float64)
    none = call["indices"] == -1
    assert none.any()
    for value in (ends.min, ends.max, ends.max - 1, N, -N):
        call["indices"] = call["indices"].masked_fill(none, value)
        got = results(attend, call, torch.float64)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_edge_27_28_nan_behind_an_invalid_index() -> None:
    # Clamped, -1 loads row 0 and N loads row N-1: both hold NaN and neither is selected.
    call = inputs(local_kv=None, visible=None)
    call["indices"] = torch.tensor([-1, 3, N, 4, -1]).expand(B, S, L)
    expected = results(attend, call, torch.float64)
    call["kv"][:, [0, N - 1]] = torch.nan
    got = results(attend, call, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_edge_29_30_parts_merge_by_lse_also_where_one_or_both_are_empty() -> None:
    call = inputs(sink=None)
    o, lse = attend(**call)
    no_entries = attend(**{**call, "kv": call["kv"][:, :0]})
    no_window = attend(**{**call, "local_kv": None, "window": 0, "local_valid": None})
    total = torch.logaddexp(no_entries[1], no_window[1])
    torch.testing.assert_close(total, lse)
    assert (no_window[1] == -torch.inf).any()
    shift = total.masked_fill(total == -torch.inf, 0)
    merged = sum(
        (part_lse - shift).exp()[..., None] * part for part, part_lse in (no_entries, no_window)
    )
    torch.testing.assert_close(merged, o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edge_31_infinite_sinks(dtype: torch.dtype) -> None:
    call = inputs(dtype)
    call["sink"] = torch.tensor([torch.inf, -torch.inf, 0.5])
    o, lse, dq, *_, dsink = results(attend, call, dtype)
    plain = results(attend, {**call, "sink": None}, dtype)
    assert torch.equal(o[:, :, 0], torch.zeros_like(o[:, :, 0]))
    assert torch.equal(o[:, :, 1], plain[0][:, :, 1])
    assert torch.equal(lse, plain[1])
    assert dq.isfinite().all()
    assert dsink[:2].tolist() == [0, 0] and dsink[2] != 0


def test_edge_31_a_sink_far_above_or_below_the_logits() -> None:
    call = inputs(torch.float32)
    for sink, expected in ((1e4, 0.0), (-1e4, None)):
        call["sink"] = torch.full((H,), sink)
        o, *gradients = results(attend, call, torch.float32)
        want = torch.zeros_like(o) if expected == 0.0 else attend(**{**call, "sink": None})[0]
        assert torch.equal(o, want)
        assert all(g.isfinite().all() for g in gradients[1:])


def test_sink_may_be_float32_beside_bfloat16() -> None:
    call = inputs(torch.bfloat16)
    call["sink"] = call["sink"].float().requires_grad_()
    attend(**call)[0].sum().backward()
    assert call["sink"].grad.dtype == torch.float32


def test_edge_32_more_queries_than_a_launch_grid_holds() -> None:
    queries = 70_000
    x = normal(1, queries, 2, dtype=torch.float32)
    indices = (torch.arange(queries) % 7)[None, :, None].int()
    kv = normal(1, 7, 2, dtype=torch.float32)
    o, _ = attend(q=x[:, :, None], kv=kv, indices=indices)
    torch.testing.assert_close(o[:, :, 0], kv[0, indices[0, :, 0].long()][None])


def test_edge_32_a_batch_of_321_with_empty_ones_among_them() -> None:
    call = dict(q=normal(321, 1, 2, 4), kv=normal(321, 5, 4), visible=integers(0, 6, (321, 1)))
    o, lse = attend(**call)
    expected = oracle(**call)
    torch.testing.assert_close(o, expected[0])
    assert torch.equal(lse == -torch.inf, (call["visible"] == 0)[..., None].expand_as(lse))


def test_edge_35_entries_of_a_million_tokens_are_taken_in_tiles() -> None:
    kv = normal(1, 262_144, 2, dtype=torch.float32)
    q = normal(1, 2, 2, 2, dtype=torch.float32)
    torch.testing.assert_close(attend(q=q, kv=kv), oracle(q, kv), rtol=1e-5, atol=1e-5)


def test_edge_45_each_row_of_several_queries_sees_its_own_context() -> None:
    call = inputs(indices=None)
    call["visible"] = (N - S + torch.arange(S) + 1).expand(B, S)
    o, lse = attend(**call)
    for s in range(S):
        row = {n: call[n][:, s : s + 1] for n in ("q", "visible")}
        row["local_kv"] = call["local_kv"][:, : M - S + s + 1]
        row["local_valid"] = call["local_valid"][:, : M - S + s + 1]
        one, one_lse = attend(**{**call, **row})
        torch.testing.assert_close(one, o[:, s : s + 1])
        torch.testing.assert_close(one_lse, lse[:, s : s + 1])


def test_edge_47_duplicates_count_each_and_future_indices_are_masked() -> None:
    q, kv = normal(1, 1, H, D), normal(1, N, D)
    indices = torch.tensor([[[2, 2, 7, 2]]])
    o, lse = attend(q=q, kv=kv, indices=indices, visible=torch.tensor([[5]]))
    logit = torch.einsum("bshd,d->bsh", q, kv[0, 2]) * D**-0.5
    torch.testing.assert_close(lse, logit + torch.tensor(3.0).double().log())
    torch.testing.assert_close(o, kv[:, None, 2:3].expand_as(o))


def test_edge_48_a_list_of_everything_is_dense_attention() -> None:
    # V3.2 with at most 2048 tokens; keys of 8 of which 6 are the value, as 576 and 512 there.
    call = inputs(local_kv=None, sink=None)
    causal = torch.arange(N)[None] < (torch.arange(S) + N - S + 1)[:, None]
    call["visible"] = causal.sum(-1).expand(B, S)
    call["indices"] = torch.stack([torch.randperm(N) for _ in range(B * S)]).view(B, S, N)
    o, _ = attend(**call, v_dim=6)
    q, k = call["q"].transpose(1, 2), call["kv"][:, None].expand(B, H, N, D)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, k[..., :6], attn_mask=causal)
    torch.testing.assert_close(o, dense.transpose(1, 2))
    every, _ = attend(**{**call, "indices": None}, v_dim=6)
    torch.testing.assert_close(o, every)


def test_edge_49_entries_and_window_over_the_same_tokens_count_twice() -> None:
    x = normal(1, 4, D)
    call = dict(q=normal(1, 4, H, D), visible=torch.arange(1, 5)[None])
    once, lse = attend(**call, kv=x)
    twice, lse_twice = attend(**call, kv=x, local_kv=x, window=4)
    torch.testing.assert_close(twice, once)
    torch.testing.assert_close(lse_twice, lse + torch.tensor(2.0).double().log())


# Equivalences of contracts 14.2


def prefill(length: int) -> dict[str, Any]:
    """A layer as V4 has it: entries of 2 tokens each, window 3."""
    x = normal(B, length, D)
    entries = x[:, : length // 2 * 2].unflatten(1, (-1, 2)).mean(2)
    visible = ((torch.arange(length) + 1) // 2).expand(B, length)
    return dict(q=normal(B, length, H, D), kv=entries, visible=visible, local_kv=x, window=3)


@pytest.mark.parametrize("first", range(1, 9))
def test_chunked_prefill_and_decode_equal_the_whole(first: int) -> None:
    call = prefill(9)
    whole, _ = attend(**call)
    parts = []
    for start, stop in ((0, first), (first, 9)):
        part = {n: call[n][:, start:stop] for n in ("q", "visible")}
        # Entries that do not exist yet are out of sight; the cache keeps window - 1 older tokens.
        local = call["local_kv"][:, max(0, start - 2) : stop]
        parts.append(attend(**{**call, **part, "local_kv": local})[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_without_entries_and_sink_it_is_window_attention() -> None:
    x, q = normal(B, S, D), normal(B, S, H, D)
    o, _ = attend(
        q=q, kv=x[:, :0], local_kv=x, window=3, sink=torch.full((H,), -torch.inf).double()
    )
    distance = torch.arange(S)[:, None] - torch.arange(S)
    k = x[:, None].expand(B, H, S, D)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, k, attn_mask=(distance >= 0) & (distance < 3)
    )
    torch.testing.assert_close(o, dense.transpose(1, 2))


def test_a_right_padded_row_decodes_as_if_alone() -> None:
    # Slots of the padded row: 4 tokens, 3 of padding, then 2 decoded ones.
    x, q = normal(1, 9, D), normal(1, 1, H, D)
    valid = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 1, 1]]).bool()
    x = x.masked_fill(~valid[..., None], torch.nan)
    o, lse = attend(q=q, kv=x[:, :0], local_kv=x, window=9, local_valid=valid)
    alone, alone_lse = attend(q=q, kv=x[:, :0], local_kv=x[valid][None], window=9)
    torch.testing.assert_close(o, alone)
    torch.testing.assert_close(lse, alone_lse)


def test_a_left_padded_row_prefills_as_if_alone() -> None:
    call = prefill(7)
    pad = {"q": 0.3, "visible": 0, "local_kv": torch.nan}
    padded = {
        n: torch.cat([torch.full_like(call[n][:, :2], value), call[n]], 1)
        for n, value in pad.items()
    }
    valid = (torch.arange(9) >= 2).expand(B, 9)
    o, lse = attend(**{**call, **padded}, local_valid=valid)
    expected, expected_lse = attend(**call)
    torch.testing.assert_close(o[:, 2:], expected)
    torch.testing.assert_close(lse[:, 2:], expected_lse)
    assert torch.equal(o[:, :2], torch.zeros_like(o[:, :2]))


# Manners


def test_strided_inputs_give_the_bits_of_contiguous_ones() -> None:
    call = inputs(torch.float32)
    expected = attend(**call)
    for name, x in call.items():
        if isinstance(x, Tensor):
            wide = torch.stack([x, x], -1)[..., 0].transpose(0, -1).contiguous().transpose(0, -1)
            call[name] = wide
    for a, b in zip(attend(**call), expected, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("empty", ["B", "S", "N", "L"])
def test_empty_dims(empty: str) -> None:
    call = inputs(torch.float32)
    cut = {
        "B": {n: 0 for n in ("q", "kv", "indices", "visible", "local_kv", "local_valid")},
        "S": {n: 1 for n in ("q", "indices", "visible")},
        "N": {"kv": 1},
        "L": {"indices": 2},
    }[empty]
    call.update({n: call[n].narrow(dim, 0, 0) for n, dim in cut.items()})
    got = results(attend, call, torch.float32)
    for a, b in zip(got, results(oracle, call, torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_the_same_inputs_give_the_same_bits(workspace: str) -> None:
    call = inputs(torch.float32)
    call["indices"] = call["indices"].clamp(0, 1)  # all gradients of kv go to two rows
    first = results(attend, call, torch.float32)
    for _ in range(5):
        again = results(attend, call, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_only_the_gradients_that_are_wanted_appear() -> None:
    call = inputs(torch.float32)
    call["kv"].requires_grad_()
    attend(**call)[0].sum().backward()
    assert call["kv"].grad is not None and call["q"].grad is None


def test_backward_is_an_operator_of_its_own() -> None:
    call = inputs()
    o, lse = attend(**call)
    names = ("q", "kv", "indices", "visible", "local_kv", "sink", "local_valid")
    do = normal(B, S, H, D, seed=7)
    gradients = sparse_attention_backward(
        do, torch.zeros_like(lse), *(call[n] for n in names), o, lse, window=3, scale=D**-0.5
    )
    moved = leaves(call, torch.float64)
    (attend(**moved)[0] * do).sum().backward()
    for name, gradient in zip(("q", "kv", "local_kv", "sink"), gradients, strict=True):
        torch.testing.assert_close(moved[name].grad, gradient)


# Bad input


@pytest.mark.parametrize(
    "change, text",
    [
        ({"window": 0}, "window is 0 and local_kv is given; must be >= 1"),
        (
            {"local_kv": None, "local_valid": None},
            "window is 3 and local_kv is not given; pass local_kv, or window=0",
        ),
        ({"local_kv": None, "window": 0}, "local_valid is given and local_kv is not"),
        (
            {"local_kv": normal(B, 4, D), "local_valid": None},
            "local_kv has M = 4 tokens; must hold those of all S = 6 queries",
        ),
        ({"v_dim": D + 1}, "v_dim is 9; must be in 0..D = 8"),
        ({"kv": normal(B, N, D + 1)}, "kv has D = 9; q has D = 8"),
        ({"kv": normal(N, D)}, r"kv has shape \[9, 8\]; expected \[B, N, D\]"),
        ({"visible": integers(0, 2, (B, S + 1))}, "visible has S = 7; q has S = 6"),
        ({"sink": normal(H + 1)}, "sink has H = 4; q has H = 3"),
    ],
)
def test_bad_shapes_and_arguments(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=rf"^sparse_attention: {text}"):
        attend(**{**inputs(), **change})


@pytest.mark.parametrize(
    "change, text",
    [
        ({"kv": normal(B, N, D).float()}, "kv is float32; expected float64"),
        ({"indices": normal(B, S, L)}, "indices is float64; expected int32, int64"),
        ({"local_valid": torch.ones(B, M)}, "local_valid is float32; expected bool"),
    ],
)
def test_bad_dtypes(change: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=rf"^sparse_attention: {text}"):
        attend(**{**inputs(), **change})
