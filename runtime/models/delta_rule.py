"""Linear attention of transformers' families (Gated DeltaNet, Kimi Delta Attention): `short_conv`
and `gated_delta_rule` between a module's own projections and norm.

The caches stay transformers': the last K inputs of the convolution, [B, C, K], and the state of the
delta rule, [B, H, Dk, Dv] in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import transom

from .patching import Replacement
from .untouched import ORIGINAL


def gated_delta_net(self: Any, x: Tensor, cache_params: Any) -> Tensor:
    """The forward of a Gated DeltaNet whose inputs have projections of their own."""
    gates = self.in_proj_b(x), self.in_proj_a(x)
    return of_projections(self, self.in_proj_qkv(x), self.in_proj_z(x), *gates, cache_params)


def of_projections(
    self: Any, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, cache_params: Any
) -> Tensor:
    """As gated_delta_net(), of qkv[B, S, C], z[B, S, Hv * Dv], b and a [B, S, Hv]."""
    widths = [self.key_dim, self.key_dim, self.value_dim]
    q, k, v = convolved(self, qkv, cache_params).split(widths, dim=-1)
    g = -self.A_log.float().exp() * nn.functional.softplus(a.float() + self.dt_bias)
    q, k = (x.unflatten(-1, (-1, self.head_k_dim)) for x in (q, k))
    v = v.unflatten(-1, (-1, self.head_v_dim))
    o = recurred(self, q, k, v, g, b.sigmoid(), cache_params)
    # The norm takes rows.
    rows = self.norm(o.reshape(-1, self.head_v_dim), z.reshape(-1, self.head_v_dim))
    return self.out_proj(rows.view(*o.shape[:2], -1))


def kimi_delta_attention(self: Any, x: Tensor, cache_params: Any) -> Tensor:
    """The forward of a Kimi Delta Attention."""
    qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
    qkv = convolved(self, qkv, cache_params)
    q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.chunk(3, dim=-1))
    beta = torch.sigmoid(self.b_proj(x))
    o = recurred(self, q, k, v, self.forget_gate(x), beta, cache_params)
    gate = self.g_b_proj(self.g_a_proj(x)).view(o.shape)
    return self.o_proj(self.o_norm(o, gate).flatten(2))


def masked(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """x with rows of zeros where the mask [B, S] has them."""
    return x if attention_mask is None else (x * attention_mask[..., None]).to(x.dtype)


def convolved(self: Any, x: Tensor, cache: Any) -> Tensor:
    """The short convolution of x[B, S, C] after the inputs in the cache, which x then joins."""
    weight, before = self.conv1d.weight.squeeze(1), None
    if cache is not None:
        kept = cache.get_conv_state(self.layer_idx, state_idx=0)
        if kept is not None:  # its first column is never read again
            before = kept[..., 1:].transpose(1, 2).to(x.dtype).contiguous()
        cache.update_conv_state(
            x.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
        )
    y, _ = transom.short_conv(x, weight, dilation=1, state=before)
    return y


def recurred(
    self: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cache: Any
) -> Tensor:
    """o[B, S, Hv, Dv] after the state in the cache, which is written anew."""
    held = None if cache is None else cache.get_recurrent_state(self.layer_idx, state_idx=0)
    o, state = transom.gated_delta_rule(q, k, v, g, beta, state=held, l2norm_eps=1e-6)
    if cache is not None:
        cache.update_recurrent_state(state, self.layer_idx)
    return o


def recording(self: Any, cache: Any) -> bool:
    """Whether the cache keeps what it would take to go back (assisted generation)."""
    return cache is not None and bool(cache.is_recording_past(self.layer_idx))


def linear_attention(replacing: type[nn.Module]) -> Replacement:
    """The replacement of a linear attention by its subclass `replacing`."""
    return Replacement(
        vars(replacing)[ORIGINAL],
        replacing,
        "gated_delta_rule, short_conv",
        _refuse,
        lambda module: ("conv1d",),
    )


def _refuse(module: Any) -> str | None:
    if module.activation not in ("silu", "swish"):
        return f"its convolution is followed by {module.activation}; short_conv has silu"
    if module.conv1d.bias is not None:
        return "its convolution has a bias; short_conv has none"
    return None
