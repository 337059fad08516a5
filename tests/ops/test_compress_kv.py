"""What the conformance kit cannot know about compress_kv: states, chunks, and masked slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import transom
from transom import compress_kv
from transom.kernels.attention import compress_kv as file
from transom.kernels.attention.compress_kv import CompressState, compress_kv_backward

FORMS = [pytest.param(4, True, id="csa4"), pytest.param(8, False, id="hca8")]
INF = float("inf")


def inputs(
    rng: np.random.Generator, tokens: int, m: int, overlap: bool, *, batch: int = 2, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """kv, gate, position_bias, float32."""
    channels = width * (1 + overlap)
    shapes = (batch, tokens, channels), (batch, tokens, channels), (m, channels)
    kv, gate, bias = (torch.from_numpy(rng.standard_normal(s)).float() for s in shapes)
    return kv, gate, bias


def by_definition(kv: Tensor, gate: Tensor, bias: Tensor, overlap: bool) -> Tensor:
    """Entries of a whole sequence from its start, block by block, by torch's softmax."""
    m, tokens = bias.shape[0], kv.shape[1]
    d = kv.shape[2] // (1 + overlap)
    gate = gate + bias[torch.arange(tokens) % m]
    entries = []
    for i in range(tokens // m):
        now = slice(i * m, (i + 1) * m)
        v, g = kv[:, now, -d:], gate[:, now, -d:]
        if overlap and i:
            past = slice((i - 1) * m, i * m)
            v, g = torch.cat([kv[:, past, :d], v], 1), torch.cat([gate[:, past, :d], g], 1)
        entries.append((g.softmax(1) * v).sum(1))
    return torch.stack(entries, 1) if entries else kv.new_zeros(kv.shape[0], 0, d)


def feed(
    kv: Tensor, gate: Tensor, bias: Tensor, overlap: bool, chunks: list[int]
) -> tuple[Tensor, CompressState | None]:
    """The entries of all chunks together, and the last state."""
    state, entries, start = None, [], 0
    for n in chunks:
        part = slice(start, start + n)
        new, state = compress_kv(kv[:, part], gate[:, part], bias, overlap=overlap, state=state)
        entries.append(new)
        start += n
    return torch.cat(entries, 1), state


def same_state(a: CompressState, b: CompressState) -> bool:
    return a.position == b.position and torch.equal(a.kv, b.kv) and torch.equal(a.gate, b.gate)


def test_the_composite_runs(rng: np.random.Generator) -> None:
    with transom.record() as calls:
        compress_kv(*inputs(rng, 9, 4, True), overlap=True)
    assert [(c.op, c.impl) for c in calls] == [("compress_kv", "composite")]


@pytest.mark.parametrize(("m", "overlap"), FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_entries_against_float64(
    rng: np.random.Generator, m: int, overlap: bool, dtype: torch.dtype, bound: float
) -> None:
    args = [x.to(dtype) for x in inputs(rng, 4 * m + 3, m, overlap)]
    entries, state = compress_kv(*args, overlap=overlap)
    want = by_definition(*[x.double() for x in args], overlap)
    assert entries.dtype == dtype
    assert state.kv.dtype == state.gate.dtype == torch.float32
    assert (entries - want).abs().max() <= bound * want.abs().max()


def test_bfloat16_is_rounded_once() -> None:
    # float32 gates beside bfloat16 values, as the contract's float32 projections give
    rng = np.random.default_rng(3)
    kv, gate, bias = inputs(rng, 12, 4, True)
    entries, _ = compress_kv(kv.bfloat16(), gate, bias, overlap=True)
    want = by_definition(kv.bfloat16().double(), gate.double(), bias.double(), True)
    assert (entries - want).abs().max() <= 2.0**-8 * want.abs().max()


@pytest.mark.parametrize(("m", "overlap"), FORMS)
def test_edge_21_prefill_then_decode_equals_prefill_for_every_remainder(
    rng: np.random.Generator, m: int, overlap: bool
) -> None:
    total = 3 * m + 2
    kv, gate, bias = inputs(rng, total, m, overlap)
    whole, at_end = feed(kv, gate, bias, overlap, [total])
    for length in range(total + 1):
        entries, state = feed(kv, gate, bias, overlap, [length] + [1] * (total - length))
        assert same_state(state, at_end), length
        assert torch.equal(entries, whole), length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_state_loses_nothing_of_any_dtype(rng: np.random.Generator, dtype: torch.dtype) -> None:
    kv, gate, bias = (x.to(dtype) for x in inputs(rng, 14, 4, True))
    whole, at_end = feed(kv, gate, bias, True, [14])
    entries, state = feed(kv, gate, bias, True, [1] * 14)
    assert same_state(state, at_end)
    assert torch.equal(entries, whole)


@pytest.mark.parametrize(("m", "overlap"), [*FORMS, pytest.param(128, False, id="hca128")])
def test_chunks_of_any_size_equal_the_whole(
    rng: np.random.Generator, m: int, overlap: bool
) -> None:
    total = 5 * m + 1
    kv, gate, bias = inputs(rng, total, m, overlap, width=4)
    whole, at_end = feed(kv, gate, bias, overlap, [total])
    cuts = np.sort(rng.integers(0, total + 1, (4, 3)), 1)
    for a, b, c in cuts.tolist():  # equal cuts give chunks without a token
        entries, state = feed(kv, gate, bias, overlap, [a, b - a, c - b, total - c])
        assert same_state(state, at_end)
        assert torch.allclose(entries, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("m", "overlap"), FORMS)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_edge_20_lengths_around_one_block(
    rng: np.random.Generator, m: int, overlap: bool, extra: int
) -> None:
    kv, gate, bias = inputs(rng, m + extra, m, overlap)
    entries, state = compress_kv(kv, gate, bias, overlap=overlap)
    assert entries.shape == (2, 0 if extra < 0 else 1, 8)
    assert torch.allclose(entries, by_definition(kv, gate, bias, overlap), atol=1e-6)
    before = overlap * m * (extra >= 0)
    filled = (state.gate != -INF)[0, :, 0].sum()
    assert filled == before + (m + extra) % m


@pytest.mark.parametrize("tokens", [127, 128, 129])
def test_edge_20_the_first_hca_entry(rng: np.random.Generator, tokens: int) -> None:
    kv, gate, bias = inputs(rng, tokens, 128, False, width=4)
    entries, _ = compress_kv(kv, gate, bias, overlap=False)
    assert entries.shape[1] == tokens // 128


def test_edge_22_batches_are_independent(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 14, 4, True)
    both, _ = compress_kv(kv, gate, bias, overlap=True)
    for b in range(2):
        alone, _ = compress_kv(kv[b : b + 1], gate[b : b + 1], bias, overlap=True)
        assert torch.equal(alone[0], both[b])


def test_the_halves_are_not_swapped() -> None:
    # 8.2 names a trap: entry 1 takes the block before from the FIRST half, its own from the second
    kv = torch.zeros(1, 4, 2)
    kv[0, :2, 0], kv[0, :2, 1] = 10.0, 20.0
    kv[0, 2:, 0], kv[0, 2:, 1] = 30.0, 40.0
    entries, _ = compress_kv(kv, torch.zeros(1, 4, 2), torch.zeros(2, 2), overlap=True)
    assert entries.flatten().tolist() == [20.0, (10.0 + 40.0) / 2]


def test_position_bias_is_added_once_however_the_tokens_arrive(rng: np.random.Generator) -> None:
    kv, gate, _ = inputs(rng, 8, 4, True)
    bias = torch.randn(4, 16) * 5
    split = feed(kv, gate, bias, True, [3, 1, 2, 2])[0]
    assert torch.allclose(split, by_definition(kv, gate, bias, True), atol=1e-5)


def test_edge_43_a_channel_whose_gates_are_all_minus_infinity_is_zero(
    rng: np.random.Generator,
) -> None:
    kv, gate, bias = inputs(rng, 8, 4, False)
    gate[:, :4, 2] = -INF
    kv[:, :4, 2] = float("nan")
    kv.requires_grad_(), gate.requires_grad_()
    entries, _ = compress_kv(kv, gate, bias, overlap=False)
    assert entries[:, 0, 2].eq(0).all()
    assert entries.isfinite().all()
    dkv, dgate = torch.autograd.grad(entries.sum(), (kv, gate))
    assert dkv[:, :4, 2].eq(0).all()
    assert dgate[:, :4, 2].eq(0).all()
    assert dkv.isfinite().all()
    assert dgate.isfinite().all()


def test_a_masked_slot_has_no_influence_even_with_nan_in_it(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 4, 4, False)
    gate[:, 1] = -INF
    want, _ = compress_kv(kv, gate, bias, overlap=False)
    kv[:, 1] = float("nan")
    assert torch.equal(compress_kv(kv, gate, bias, overlap=False)[0], want)


def test_what_stands_in_unfilled_rows_of_a_state_is_not_read(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 9, 4, True)
    _, state = compress_kv(kv[:, :6], gate[:, :6], bias, overlap=True)
    spoiled = CompressState(state.kv.clone(), state.gate.clone(), 6)
    spoiled.kv[:, 6:], spoiled.gate[:, 6:] = float("nan"), float("nan")
    want = compress_kv(kv[:, 6:], gate[:, 6:], bias, overlap=True, state=state)
    got = compress_kv(kv[:, 6:], gate[:, 6:], bias, overlap=True, state=spoiled)
    assert torch.equal(got[0], want[0])
    assert same_state(got[1], want[1])


def test_edge_40_beam_reorder_permutes_the_state(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 11, 4, True, batch=3)
    _, state = compress_kv(kv[:, :7], gate[:, :7], bias, overlap=True)
    order = torch.tensor([2, 0, 0, 1])
    rest = slice(7, 11)
    got, after = compress_kv(
        kv[order, rest], gate[order, rest], bias, overlap=True, state=state.reorder(order)
    )
    want, at_end = compress_kv(kv[order], gate[order], bias, overlap=True)
    assert torch.equal(got, want[:, 1:])
    assert same_state(after, at_end)


def test_edge_40_an_old_state_takes_an_emitted_entry_back(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 9, 4, True)
    _, state = compress_kv(kv[:, :3], gate[:, :3], bias, overlap=True)
    kept = CompressState(state.kv.clone(), state.gate.clone(), state.position)
    guess, _ = compress_kv(kv[:, 4:6], gate[:, 4:6], bias, overlap=True, state=state)
    assert guess.shape[1] == 1  # crossed the boundary at 4, to be taken back
    assert same_state(state, kept)
    right, _ = compress_kv(kv[:, 3:9], gate[:, 3:9], bias, overlap=True, state=state)
    assert torch.equal(right, compress_kv(kv, gate, bias, overlap=True)[0])


def test_bytes_of_a_state() -> None:
    _, state = compress_kv(
        torch.ones(3, 5, 16), torch.ones(3, 5, 16), torch.ones(4, 16), overlap=True
    )
    assert state.nbytes == 2 * 3 * 8 * 16 * 4
    assert state.position == 5


def test_no_tokens_leave_the_state_as_it_was(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 6, 4, True)
    _, state = compress_kv(kv, gate, bias, overlap=True)
    entries, after = compress_kv(kv[:, :0], gate[:, :0], bias, overlap=True, state=state)
    assert entries.shape == (2, 0, 8)
    assert same_state(after, state)
    start, fresh = compress_kv(kv[:, :0], gate[:, :0], bias, overlap=True)
    assert start.shape == (2, 0, 8)
    assert fresh.gate.eq(-INF).all()


def test_a_ratio_of_one_takes_the_tokens_themselves(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 5, 1, False)
    entries, _ = compress_kv(kv, gate, bias, overlap=False)
    assert torch.equal(entries, kv)


@pytest.mark.parametrize(("m", "overlap"), FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_gradients_against_float64_autograd(
    rng: np.random.Generator, m: int, overlap: bool, dtype: torch.dtype, bound: float
) -> None:
    args = [x.to(dtype) for x in inputs(rng, 3 * m + 2, m, overlap)]
    mine = [x.clone().requires_grad_() for x in args]
    exact = [x.double().requires_grad_() for x in args]
    entries, _ = compress_kv(*mine, overlap=overlap)
    want = by_definition(*exact, overlap)
    dentries = torch.from_numpy(rng.standard_normal(want.shape)).to(dtype)
    got = torch.autograd.grad(entries, mine, dentries)
    for g, x in zip(got, torch.autograd.grad(want, exact, dentries.double()), strict=True):
        assert g.dtype == dtype
        assert (g - x).abs().max() <= bound * x.abs().max()


@pytest.mark.parametrize(("m", "overlap"), [(2, True), (3, False)])
def test_gradients_against_finite_differences_with_a_state(
    rng: np.random.Generator, m: int, overlap: bool
) -> None:
    kv, gate, bias = (x.double() for x in inputs(rng, 9, m, overlap, batch=1, width=2))
    _, state = compress_kv(kv[:, :4], gate[:, :4], bias, overlap=overlap)

    def call(*x: Tensor) -> tuple[Tensor, ...]:
        # the gates of unfilled rows are -inf, which has no difference quotient
        held = torch.where(state.gate == -INF, -INF, x[4])
        entries, after = compress_kv(
            *x[:3], overlap=overlap, state=CompressState(x[3], held, state.position)
        )
        return entries, after.kv, after.gate.nan_to_num(neginf=0)

    start = state.gate.nan_to_num(neginf=0)
    args = [x.clone().requires_grad_() for x in (kv[:, 4:], gate[:, 4:], bias, state.kv, start)]
    assert torch.autograd.gradcheck(call, args)


@pytest.mark.parametrize(("m", "overlap"), FORMS)
def test_gradients_flow_through_the_state(rng: np.random.Generator, m: int, overlap: bool) -> None:
    args = [x.double().requires_grad_() for x in inputs(rng, 3 * m + 1, m, overlap)]
    whole, _ = feed(*args, overlap, [3 * m + 1])
    parts, _ = feed(*args, overlap, [m - 1, 2, m, m])
    dentries = torch.from_numpy(rng.standard_normal(whole.shape))
    want = torch.autograd.grad(whole, args, dentries)
    for g, x in zip(torch.autograd.grad(parts, args, dentries), want, strict=True):
        assert torch.allclose(g, x, atol=1e-12)


def test_a_token_of_an_open_block_gets_no_gradient_from_entries(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 7, 4, False)
    kv.requires_grad_()
    entries, _ = compress_kv(kv, gate, bias, overlap=False)
    (dkv,) = torch.autograd.grad(entries.sum(), kv)
    assert dkv[:, 4:].eq(0).all()
    assert dkv[:, :4].ne(0).all()


@pytest.mark.parametrize(("m", "overlap"), FORMS)
def test_tiles_of_entries_change_nothing(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, m: int, overlap: bool
) -> None:
    kv, gate, bias = inputs(rng, 5 * m + 3, m, overlap)
    entries, state = compress_kv(kv, gate, bias, overlap=overlap)
    grads = torch.ones_like(entries), torch.ones_like(state.kv), torch.ones_like(state.gate)
    back = compress_kv_backward(kv, gate, bias, *grads, overlap=overlap)
    again = compress_kv_backward(kv, gate, bias, *grads, overlap=overlap)
    monkeypatch.setattr(file.config, "workspace_bytes", lambda: 1)
    assert torch.equal(compress_kv(kv, gate, bias, overlap=overlap)[0], entries)
    tiled = compress_kv_backward(kv, gate, bias, *grads, overlap=overlap)
    for a, b, c in zip(back, again, tiled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_bad_inputs(rng: np.random.Generator) -> None:
    kv, gate, bias = inputs(rng, 6, 4, True)
    odd = [x[..., :15] for x in (kv, gate, bias)]
    with pytest.raises(ValueError, match=r"compress_kv: kv has width 15 with overlap = True; must"):
        compress_kv(*odd, overlap=True)
    with pytest.raises(ValueError, match=r"compress_kv: position_bias has m = 0 rows; must be at"):
        compress_kv(kv, gate, bias[:0], overlap=True)
    with pytest.raises(ValueError, match=r"compress_kv: gate has S = 5; kv has S = 6"):
        compress_kv(kv, gate[:, :5], bias, overlap=True)
    with pytest.raises(ValueError, match=r"compress_kv: position_bias has W = 8; kv has W = 16"):
        compress_kv(kv, gate, bias[:, :8], overlap=True)
    _, state = compress_kv(kv, gate, bias, overlap=True)
    text = (
        r"compress_kv: state is of shape \[B, R, W\] = \[2, 8, 16\]; this kv with m = 4 and "
        r"overlap = False has \[2, 4, 16\]$"
    )
    with pytest.raises(ValueError, match=text):
        compress_kv(kv, gate, bias, overlap=False, state=state)
    with pytest.raises(ValueError, match=r"= \[2, 8, 16\]; this kv .* has \[2, 8, 8\]$"):
        compress_kv(kv[..., :8], gate[..., :8], bias[:, :8], overlap=True, state=state)
    for wrong in (3, (state.kv, state.gate)):
        seen = type(wrong).__name__
        text = f"compress_kv: state is {seen}; expected a CompressState$"
        with pytest.raises(TypeError, match=text):
            compress_kv(kv, gate, bias, overlap=True, state=wrong)
    half = CompressState(state.kv.bfloat16(), state.gate.bfloat16(), 6)
    with pytest.raises(TypeError, match=r"compress_kv: state_kv is bfloat16; expected float32"):
        compress_kv(kv, gate, bias, overlap=True, state=half)
    with pytest.raises(ValueError, match=r"compress_kv: pending is 2 without a state; must be 0"):
        compress_kv.call(kv, gate, bias, overlap=True, pending=2)
    with pytest.raises(ValueError, match=r"compress_kv: pending is 4; must be in 0\.\.m - 1 = 3"):
        compress_kv.call(
            kv, gate, bias, overlap=True, state_kv=state.kv, state_gate=state.gate, pending=4
        )
    with pytest.raises(ValueError, match=r"compress_kv: one of state_kv and state_gate was given"):
        compress_kv.call(kv, gate, bias, overlap=True, state_kv=state.kv)
