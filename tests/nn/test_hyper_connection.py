"""transom.nn HyperConnection: the module around a sublayer, its head, its precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import transom
from transom.nn.hyper_connection import HyperConnection, HyperConnectionHead, to_streams

R, D = 4, 16
ARGS = dict(iterations=20, eps=1e-6, rms_eps=1e-6, post_scale=2.0)


def block(sublayer: nn.Module | None = None, **change) -> HyperConnection:
    torch.manual_seed(0)
    return HyperConnection(sublayer or nn.Linear(D, D), D, R, **{**ARGS, **change})


def streams(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, R, D, generator=torch.Generator().manual_seed(1))


def test_is_pre_sublayer_post():
    layer, x = block(), streams(2, 3)
    h, post, comb = transom.mhc_pre(x, layer.fn, layer.scale, layer.base, **ARGS)
    want = transom.mhc_post(layer.sublayer(h), x, post, comb)
    torch.testing.assert_close(layer(x), want)


def test_starts_as_a_plain_residual_connection():
    layer, e = block(), torch.randn(5, D)
    with torch.no_grad():
        y, want = layer(to_streams(e, R)), e + layer.sublayer(e)
    torch.testing.assert_close(y, to_streams(want, R), rtol=0.1, atol=0.1)
    assert float((y - to_streams(want, R)).norm() / want.norm()) < 0.05


def test_further_arguments_and_results_pass_through():
    class Attention(nn.Module):
        def forward(self, h, shift, *, scale):
            return h * scale + shift, "cache", 7

    layer, x = block(Attention()), streams(2)
    y, cache, number = layer(x, 0.5, scale=2.0)
    assert y.shape == x.shape and (cache, number) == ("cache", 7)


def test_every_parameter_has_a_gradient():
    layer = block()
    layer(streams(3)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())


def test_the_mixing_parameters_stay_float32_when_the_model_is_cast():
    layer = block().bfloat16()
    assert {p.dtype for p in (layer.fn, layer.scale, layer.base)} == {torch.float32}
    assert layer.sublayer.weight.dtype == torch.bfloat16
    assert layer(streams(2).bfloat16()).dtype == torch.bfloat16
    assert layer.double().fn.dtype == torch.float64


def test_the_state_dict_holds_three_tensors_beside_the_sublayer():
    names = {n for n in block().state_dict() if not n.startswith("sublayer.")}
    assert names == {"fn", "scale", "base"}


def test_the_head_gathers_the_streams():
    head = HyperConnectionHead(D, R, eps=1e-6, rms_eps=1e-6)
    e = torch.randn(3, D)
    torch.testing.assert_close(head(to_streams(e, R)), e, rtol=0.1, atol=0.1)
    assert head.bfloat16().fn.dtype == torch.float32


def test_edge_75_one_stream_is_a_residual_connection():
    layer = HyperConnection(nn.Linear(D, D), D, 1, **ARGS)
    e = torch.randn(5, D)
    y = layer(e[:, None])[:, 0]
    torch.testing.assert_close(y, e + layer.sublayer(e), rtol=0.05, atol=0.05)


def test_every_step_goes_through_the_registry():
    with transom.record() as calls:
        block()(streams(2)).sum().backward()
    assert [c.op for c in calls] == ["mhc_pre", "mhc_post", "mhc_post_backward", "mhc_pre_backward"]


def test_compiles_without_a_graph_break():
    layer, x = block(), streams(2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(hidden=0), "HyperConnection: hidden is 0, streams is 4; both must be >= 1"),
        (dict(post_scale=0.0), "HyperConnection: post_scale is 0.0; must be > 0"),
    ],
)
def test_bad_numbers_are_refused(change, text):
    call = {"hidden": D, "streams": R, **ARGS, **change}
    with pytest.raises(ValueError, match=text):
        HyperConnection(nn.Identity(), call.pop("hidden"), call.pop("streams"), **call)
