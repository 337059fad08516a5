"""gated_delta_rule: what the generic kit cannot know (edge cases 107 to 112 of the contracts)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom

B, HK, HV, DK, DV = 2, 2, 4, 6, 5
DECAYS = pytest.mark.parametrize("channels", [False, True], ids=["a head's", "a channel's"])


def inputs(S: int, channels: bool = False, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A call of S tokens with a state before it."""
    source = torch.Generator().manual_seed(S)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    decay = (B, S, HV, DK) if channels else (B, S, HV)
    return {
        "q": normal(B, S, HK, DK),
        "k": normal(B, S, HK, DK),
        "v": normal(B, S, HV, DV),
        "g": -normal(*decay).abs(),
        "beta": normal(B, S, HV).sigmoid(),
        "state": normal(B, HV, DK, DV).to(torch.promote_types(dtype, torch.float32)),
    }


def run(call: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    o, state = transom.gated_delta_rule(**{**call, "l2norm_eps": 1e-6, **more})
    return o, state


def cut(call: dict[str, Any], tokens: slice) -> dict[str, Any]:
    return {n: t if n == "state" else t[:, tokens] for n, t in call.items()}


@DECAYS
@pytest.mark.parametrize("S", [0, 1, 2, 15, 16, 17, 63, 64, 65, 129])
def test_edge_107_any_cut_gives_the_same_outputs_and_state(S: int, channels: bool) -> None:
    call = inputs(S, channels)
    o, state = run(call)
    for at in {0, S // 3, max(S - 1, 0), S}:
        first, between = run(cut(call, slice(at)))
        second, last = run({**cut(call, slice(at, None)), "state": between})
        torch.testing.assert_close(torch.cat([first, second], 1), o)
        torch.testing.assert_close(last, state)


@DECAYS
def test_token_by_token_equals_the_whole(channels: bool) -> None:
    call = inputs(20, channels, torch.float32)
    o, state = run(call)
    held = call["state"]
    for s in range(20):
        row, held = run({**cut(call, slice(s, s + 1)), "state": held})
        torch.testing.assert_close(row, o[:, s : s + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(held, state, rtol=1e-4, atol=1e-5)


@DECAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edge_108_strong_decay_over_a_long_sequence_stays_finite(
    channels: bool, dtype: torch.dtype
) -> None:
    call = inputs(1000, channels, dtype)
    for g in (0.0, -5.0):
        o, state = run({**call, "g": torch.full_like(call["g"], g)})
        assert torch.isfinite(o).all() and torch.isfinite(state).all(), g
    once = torch.zeros_like(call["g"])
    once[:, 40] = -80.0
    o, state = run({**call, "g": once})
    alone, _ = run({**cut({**call, "g": once}, slice(40, None)), "state": None})
    torch.testing.assert_close(o[:, 40:], alone, rtol=1e-2, atol=1e-3)


def test_edge_109_orthonormal_keys_are_recalled_exactly() -> None:
    keys = torch.eye(DK, dtype=torch.float64).view(1, DK, 1, DK)
    values = torch.randn(1, DK, 1, DV, dtype=torch.float64)
    zero, one = torch.zeros(1, DK, 1, dtype=torch.float64), torch.ones(1, DK, 1).double()
    _, state = transom.gated_delta_rule(keys, keys, values, zero, one)
    o, _ = transom.gated_delta_rule(keys, keys, values, zero, 0 * one, state=state, scale=1.0)
    torch.testing.assert_close(o, values)


def test_edge_109_without_beta_the_state_decays_and_takes_nothing() -> None:
    call = inputs(9)
    _, state = run({**call, "beta": torch.zeros_like(call["beta"])})
    torch.testing.assert_close(state, call["state"] * call["g"].sum(1).exp()[..., None, None])


def test_edge_110_a_row_of_zeros_is_normed_to_zeros() -> None:
    call = inputs(5)
    call["q"], call["k"] = torch.zeros_like(call["q"]), torch.zeros_like(call["k"])
    o, state = run(call)
    assert not o.any()
    torch.testing.assert_close(state, call["state"] * call["g"].sum(1).exp()[..., None, None])


@DECAYS
def test_edge_111_heads_of_values_share_keys_in_order(channels: bool) -> None:
    call = inputs(33, channels)
    o, state = run(call)
    for h in range(HV):
        own = {n: call[n][:, :, h : h + 1] for n in ("v", "g", "beta")}
        key = {n: call[n][:, :, h // 2 : h // 2 + 1] for n in ("q", "k")}
        alone, last = run({**own, **key, "state": call["state"][:, h : h + 1]})
        torch.testing.assert_close(alone, o[:, :, h : h + 1])
        torch.testing.assert_close(last, state[:, h : h + 1])


def test_edge_112_the_state_that_is_given_is_left_alone() -> None:
    call = inputs(70, dtype=torch.float32)
    before = call["state"].clone()
    _, state = run(call)
    assert torch.equal(call["state"], before) and state.data_ptr() != call["state"].data_ptr()
    call["state"].copy_(state)
    assert torch.equal(call["state"], state)


def test_one_decay_for_all_channels_equals_the_heads() -> None:
    call = inputs(40)
    wide = call["g"].unsqueeze(-1).expand(-1, -1, -1, DK)
    for got, want in zip(run({**call, "g": wide}), run(call)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("S", [1, 40, 70])
def test_agrees_with_transformers(S: int) -> None:
    hf = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    call = inputs(S, dtype=torch.float32)
    q, k = (call[n].repeat_interleave(HV // HK, dim=2) for n in "qk")
    given = dict(g=call["g"], beta=call["beta"], initial_state=call["state"])
    more = dict(output_final_state=True, use_qk_l2norm_in_kernel=True)
    o, state = run(call)
    for form in (hf.torch_chunk_gated_delta_rule, hf.torch_recurrent_gated_delta_rule):
        want, last = form(q, k, call["v"], **given, **more)
        torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@DECAYS
@pytest.mark.parametrize("S", [3, 66])
def test_gradients_equal_those_of_the_recurrence(S: int, channels: bool) -> None:
    call = {n: t.requires_grad_() for n, t in inputs(S, channels).items()}
    outs = run(call)
    weights = [torch.randn_like(x) for x in outs]
    got = torch.autograd.grad(outs, list(call.values()), weights)

    held, rows = call["state"], []
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (call["q"], call["k"]))
    q, k = (x.repeat_interleave(HV // HK, dim=2) for x in (q, k))
    decay = call["g"].exp() if channels else call["g"].exp().unsqueeze(-1)
    for s in range(S):
        held = held * decay[:, s].unsqueeze(-1)
        rest = call["v"][:, s] - torch.einsum("bhkv,bhk->bhv", held, k[:, s])
        held = held + k[:, s].unsqueeze(-1) * (call["beta"][:, s, :, None] * rest).unsqueeze(-2)
        rows.append(torch.einsum("bhkv,bhk->bhv", held, q[:, s]) * DK**-0.5)
    want = torch.autograd.grad((torch.stack(rows, 1), held), list(call.values()), weights)
    for name, a, b in zip(call, got, want):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"v": (B, 8, 3, DV), "g": (B, 8, 3), "beta": (B, 8, 3)}, "v has Hv = 3 heads"),
        ({"g": (B, 8, HV, 2)}, "g has 2 decays for a head; must be 1 or Dk = 6"),
        ({"state": (B, HV, DV, DK)}, "state"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, tuple[int, ...]], text: str) -> None:
    call = {**inputs(8), **{n: torch.zeros(s, dtype=torch.float64) for n, s in change.items()}}
    if "v" in change:
        call["state"] = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"^gated_delta_rule: .*{text}"):
        run(call)
    with pytest.raises(ValueError, match="l2norm_eps is 0.0; must be above 0"):
        run(inputs(2), l2norm_eps=0.0)
