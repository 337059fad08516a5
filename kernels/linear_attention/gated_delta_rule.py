"""The gated delta rule: linear attention whose state forgets, and writes what it did not know yet.

Gated DeltaNet has one decay for a head, Kimi Delta Attention one for each channel of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.dtypes import accumulator

_EXAMPLES = [
    dict(B=2, S=7, Hk=2, Hv=4, Dk=6, Dv=5, Dg=1, scale=0.4, l2norm_eps=1e-6),
    dict(B=1, S=5, Hk=3, Hv=3, Dk=4, Dv=4, Dg=4, scale=0.5, l2norm_eps=None),
    dict(B=1, S=4096, Hk=16, Hv=48, Dk=128, Dv=128, Dg=1, scale=128**-0.5, l2norm_eps=1e-6),
    dict(B=1, S=4096, Hk=64, Hv=64, Dk=128, Dv=128, Dg=128, scale=128**-0.5, l2norm_eps=1e-6),
    dict(B=1, S=1, Hk=16, Hv=48, Dk=128, Dv=128, Dg=1, scale=128**-0.5, l2norm_eps=1e-6),
]
_CHUNK = 64
"""Tokens whose products are taken at once where the decay is a head's; a quarter of it otherwise,
since there every pair of tokens has its own for each channel."""


@op(
    "q[B,S,Hk,Dk], k[B,S,Hk,Dk], v[B,S,Hv,Dv], g[B,S,Hv,Dg], beta[B,S,Hv], state?[B,Hv,Dk,Dv]"
    " -> o[B,S,Hv,Dv], new_state[B,Hv,Dk,Dv]",
    dtypes="q: float; k: q; v: q; g: q | f32; beta: q | f32; state: acc(q);"
    " o: q; new_state: acc(q)",
    flops="7*B*S*Hv*Dk*Dv",
    accumulate="S*(Dk+Dv)",
    batch="B",
    examples=_EXAMPLES,
)
def _gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    scale: float,
    l2norm_eps: float | None,
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(q.dtype)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new = torch.empty(_state_shape(q, v), dtype=dtype, device=v.device)
    for at in _heads(q, v, g):
        held = _first(state, new, at)
        for tokens in _tokens(v.shape[1], g):
            chunk = _Chunk.of(q, k, v, g, beta, at, tokens, l2norm_eps)
            mixed, held = chunk.forward(held, scale)
            o[at[0], tokens, at[1]] = mixed.transpose(1, 2).to(o.dtype)
        new[at] = held
    return o, new


@op(
    "do[B,S,Hv,Dv], dnew_state[B,Hv,Dk,Dv], q[B,S,Hk,Dk], k[B,S,Hk,Dk], v[B,S,Hv,Dv],"
    " g[B,S,Hv,Dg], beta[B,S,Hv], state?[B,Hv,Dk,Dv]"
    " -> dq[B,S,Hk,Dk], dk[B,S,Hk,Dk], dv[B,S,Hv,Dv], dg[B,S,Hv,Dg], dbeta[B,S,Hv],"
    " dstate[B,Hv,Dk,Dv]",
    dtypes="do: q; dnew_state: acc(q); q: float; k: q; v: q; g: q | f32; beta: q | f32;"
    " state: acc(q); dq: q; dk: q; dv: q; dg: g; dbeta: beta; dstate: acc(q)",
    flops="21*B*S*Hv*Dk*Dv",
    accumulate="S*(Dk+Dv)*max(1, Hv//max(Hk,1))",
    batch="B",
    examples=_EXAMPLES,
)
def gated_delta_rule_backward(
    do: Tensor,
    dnew_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    scale: float,
    l2norm_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `gated_delta_rule`, from the last token to the first; dS is the state's.

        dS += scale q do^T;  dq = scale S do;  dd = dS^T k;  dbeta = r . dd;  dv = beta dd
        dk = dS d - P dv;  dP = dS - k dv^T;  dg = sum of dP * P over the channels that share it
        dS <- e^g dP;  d = beta r, r = v - P^T k, P = e^g S of the token before

    do, dnew_state  as o and new_state of the forward; the others as there, g[B,S,Hv,Dg] with Dg 1
                    or Dk.
    Returns dq, dk, dv, dg, dbeta in the shapes and dtypes of what they belong to, and
    dstate[B,Hv,Dk,Dv], also without a state.  States are computed again and kept at the ends of
    chunks only.  Sums are float32 (float64 for float64), in a fixed order.
    *Source:* derived from the recurrence of `gated_delta_rule`; its form by chunks after Yang et
    al., arXiv:2412.06464.
    """
    dtype = accumulator(q.dtype)
    group = v.shape[2] // max(q.shape[2], 1)
    dq, dk = (torch.zeros(q.shape, dtype=dtype, device=q.device) for _ in range(2))
    dv, dg, dbeta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (v, g, beta))
    dstate = torch.empty(dnew_state.shape, dtype=dtype, device=q.device)
    for at in _heads(q, v, g):
        held, before = _first(state, dstate, at), []
        parts = list(_tokens(v.shape[1], g))
        for tokens in parts:
            before.append(held)
            chunk = _Chunk.of(q, k, v, g, beta, at, tokens, l2norm_eps)
            _, held = chunk.forward(held, scale)
        dheld = dnew_state[at].to(dtype)
        key_heads = torch.arange(at[1].start, at[1].stop, device=q.device) // max(group, 1)
        for tokens in reversed(parts):
            chunk = _Chunk.of(q, k, v, g, beta, at, tokens, l2norm_eps)
            dmixed = do[at[0], tokens, at[1]].transpose(1, 2).to(dtype)
            grads, dheld = chunk.backward(before.pop(), scale, dmixed, dheld, l2norm_eps)
            rows = [x.transpose(1, 2) for x in grads]
            for whole, part in ((dq, rows[0]), (dk, rows[1])):
                whole[at[0], tokens].index_add_(2, key_heads, part)
            dv[at[0], tokens, at[1]] = rows[2].to(dv.dtype)
            dg[at[0], tokens, at[1]] = rows[3].to(dg.dtype)
            dbeta[at[0], tokens, at[1]] = rows[4].squeeze(-1).to(dbeta.dtype)
        dstate[at] = dheld
    return dq.to(q.dtype), dk.to(k.dtype), dv, dg, dbeta, dstate


class _Chunk(NamedTuple):
    """Tokens of some heads, [b, n, C, .] each, in the accumulator's dtype.

    With G the sums of g from the chunk's first token on, E_ij = e^(G_i - G_j), and S the state:

        (1 + A) D = beta (V - (e^G K) S), A_ij = beta_i k_i . (E_ij k_j), j < i
        O = scale ((e^G Q) S + P D), P_ij = q_i . (E_ij k_j), j <= i
        S <- e^(G_C) S + (e^(G_C - G) K)^T D

    Only differences of G that are not positive become exponentials of a result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    total: Tensor
    """G[b, n, C, Dg]."""
    beta: Tensor
    raw: tuple[Tensor, Tensor]
    """q and k before their norm."""

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        at: tuple[slice, slice],
        tokens: slice,
        eps: float | None,
    ) -> _Chunk:
        """The chunk of value heads at[1] of sequences at[0]."""
        dtype = accumulator(q.dtype)
        group = v.shape[2] // max(q.shape[2], 1)
        ids = torch.arange(at[1].start, at[1].stop, device=q.device) // max(group, 1)
        raw = [x[at[0], tokens].index_select(2, ids).transpose(1, 2).to(dtype) for x in (q, k)]
        own = [
            x[at[0], tokens, at[1]].transpose(1, 2).to(dtype) for x in (v, g, beta.unsqueeze(-1))
        ]
        unit = raw if eps is None else [_unit(x, eps) for x in raw]
        return cls(unit[0], unit[1], own[0], own[1].cumsum(2), own[2], (raw[0], raw[1]))

    def dots(self, left: Tensor, right: Tensor) -> Tensor:
        """left_i . (E_ij right_j), [b, n, C, C]; what lies above the diagonal has no meaning."""
        if self.total.shape[-1] == 1:
            return (left @ right.mT) * self.decays().squeeze(-1)
        return (self.decays() * left.unsqueeze(-2) * right.unsqueeze(-3)).sum(-1)

    def decays(self) -> Tensor:
        """E[b, n, C, C, Dg]."""
        return (self.total.unsqueeze(-2) - self.total.unsqueeze(-3)).exp_()

    def forward(self, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """O and the state after the chunk."""
        decay, last = self.total.exp(), self.total[..., -1:, :]
        delta = self.written(state, decay)
        weights = self.dots(self.q, self.k).tril()
        o = ((self.q * decay) @ state + weights @ delta) * scale
        kept = self.k * (last - self.total).exp()
        return o, last.exp().mT * state + kept.mT @ delta

    def written(self, state: Tensor, decay: Tensor) -> Tensor:
        """D, what the tokens add to the state."""
        rest = self.beta * (self.v - (self.k * decay) @ state)
        return torch.linalg.solve_triangular(
            self.dots(self.k, self.k).tril(-1) * self.beta, rest, upper=False, unitriangular=True
        )

    def backward(
        self, state: Tensor, scale: float, do: Tensor, dstate: Tensor, eps: float | None
    ) -> tuple[list[Tensor], Tensor]:
        """[dq, dk, dv, dg, dbeta] of the chunk and the gradient of the state before it."""
        decay, last = self.total.exp(), self.total[..., -1:, :]
        end, fade = last.exp(), (last - self.total).exp()
        kept, early, asked = self.k * fade, self.k * decay, self.q * decay
        rest = self.v - early @ state
        inner = self.dots(self.k, self.k).tril(-1)
        delta = self.written(state, decay)
        weights = self.dots(self.q, self.k).tril()
        do = do * scale
        # Of the state after, of O and of D.
        ddelta = weights.mT @ do + kept @ dstate
        solved = torch.linalg.solve_triangular(
            (inner * self.beta).mT, ddelta, upper=True, unitriangular=True
        )
        dinner = -(solved @ delta.mT).tril(-1)
        dbeta = (solved * rest).sum(-1, keepdim=True) + (dinner * inner).sum(-1, keepdim=True)
        dv = self.beta * solved
        dinner = self.beta * dinner
        dweights = (do @ delta.mT).tril()
        dkept, dasked, dearly = delta @ dstate.mT, do @ state.mT, -(dv @ state.mT)
        before = end.mT * dstate + asked.mT @ do - early.mT @ dv
        # Of the products under E: of the left and of the right factor.
        dq, dk = self.through(dweights, self.k), self.through(dinner, self.k)
        right = self.back(dweights, self.q) + self.back(dinner, self.k)
        dtotal = dq * self.q + dk * self.k - right * self.k
        dtotal += dasked * asked + dearly * early - dkept * kept
        dlast = (dkept * kept).sum(-2) + (dstate * state).sum(-1) * end.squeeze(-2)
        dtotal[..., -1, :] += dlast
        if self.total.shape[-1] == 1:
            dtotal = dtotal.sum(-1, keepdim=True)
        dg = dtotal.flip(2).cumsum(2).flip(2)
        dq = dq + dasked * decay
        dk = dk + right + dearly * decay + dkept * fade
        if eps is not None:
            dq, dk = (_unit_backward(raw, d, eps) for raw, d in zip(self.raw, (dq, dk)))
        return [dq, dk, dv, dg, dbeta], before

    def through(self, d: Tensor, right: Tensor) -> Tensor:
        """sum_j d_ij E_ij right_j, d zero above the diagonal."""
        if self.total.shape[-1] == 1:
            return (d * self.decays().squeeze(-1)).tril() @ right
        weights = torch.where(_below(d), d.unsqueeze(-1) * self.decays(), 0.0)
        return (weights * right.unsqueeze(-3)).sum(-2)

    def back(self, d: Tensor, left: Tensor) -> Tensor:
        """sum_i d_ij E_ij left_i, d zero above the diagonal."""
        if self.total.shape[-1] == 1:
            return (d * self.decays().squeeze(-1)).tril().mT @ left
        weights = torch.where(_below(d), d.unsqueeze(-1) * self.decays(), 0.0)
        return (weights * left.unsqueeze(-2)).sum(-3)


def _below(d: Tensor) -> Tensor:
    """[C, C, 1], True up to the diagonal: beyond it decays are of no pair and may be infinite."""
    return torch.ones(d.shape[-2:], dtype=torch.bool, device=d.device).tril().unsqueeze(-1)


def _unit(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def _unit_backward(x: Tensor, d: Tensor, eps: float) -> Tensor:
    """With n = x / |x| and r = (|x|^2 + eps)^-1/2: r (d - n (n . d)) + r^3 eps n (n . d).

    The two terms stand apart because the second is all there is where n = +-1 (one channel).
    """
    square = x.square().sum(-1, keepdim=True)
    r = torch.rsqrt(square + eps)
    n = x / square.sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    along = n * (n * d).sum(-1, keepdim=True)
    return r * ((d - along) + r.square() * eps * along)


def _state_shape(q: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    return v.shape[0], v.shape[2], q.shape[3], v.shape[3]


def _first(state: Tensor | None, like: Tensor, at: tuple[slice, slice]) -> Tensor:
    """The state before the first token."""
    return torch.zeros_like(like[at]) if state is None else state[at].to(like.dtype)


def _tokens(count: int, g: Tensor) -> Iterator[slice]:
    size = _CHUNK if g.shape[3] == 1 else _CHUNK // 4
    for s in range(0, count, size):
        yield slice(s, min(s + size, count))


def _heads(q: Tensor, v: Tensor, g: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of sequences and value heads whose chunks stay within the workspace."""
    B, _, heads, Dv = v.shape
    Dk, Dg = q.shape[3], g.shape[3]
    size = _CHUNK if Dg == 1 else _CHUNK // 4
    floats = size * (10 * Dk + 6 * Dv) + 6 * size * size * Dg + 6 * Dk * Dv
    fit = max(1, config.workspace_bytes() // (floats * accumulator(q.dtype).itemsize))
    wide = max(1, min(heads, fit))
    deep = max(1, min(B, fit // wide))
    for b in range(0, B, deep):
        for h in range(0, heads, wide):
            yield slice(b, min(b + deep, B)), slice(h, min(h + wide, heads))


@_gated_delta_rule.front
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    scale: float | None = None,
    l2norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = scale * S_t^T q_t, S_t = P + k_t d^T, d = beta_t (v_t - P^T k_t), P = e^(g_t) S_(t-1).

    Of each value head; P = diag(e^(g_t)) S_(t-1) where each channel of the keys has its own decay.

    q, k        [B,S,Hk,Dk].
    v           [B,S,Hv,Dv], Hv a multiple of Hk: value head h has key head h // (Hv/Hk).
    g           [B,S,Hv] (Gated DeltaNet) or [B,S,Hv,Dk] (Kimi Delta Attention): logarithms of the
                decay, at most 0; q's dtype or float32.
    beta        [B,S,Hv], how much of the difference is written; q's dtype or float32.
    state       [B,Hv,Dk,Dv], float32 (float64 for float64): what an earlier call returned; None:
                zeros, the start of a sequence.
    scale       of the output; Dk**-0.5 if None.
    l2norm_eps  q and k become x / sqrt(sum x^2 + l2norm_eps) first; None: they stay as they are.

    Returns o[B,S,Hv,Dv] in v's dtype and the state after the last token, new memory: write it back
    into a cache that is kept.  Any cut of a sequence into calls gives the same up to rounding.
    Sums are float32 (float64 for float64); o is rounded once.  Memory grows with S only by o.
    Gradients reach all tensors, and through the state earlier calls.
    Raises ValueError for shapes that disagree, TypeError for dtypes.

    *Source:* Yang et al., Gated Delta Networks, arXiv:2412.06464, eq. 10; Kimi Linear,
    arXiv:2510.26692 (a decay for each channel).
    """
    if g.ndim == 3:
        g = g.unsqueeze(-1)
    return _gated_delta_rule.call(
        q,
        k,
        v,
        g,
        beta,
        state=state,
        scale=max(q.shape[-1], 1) ** -0.5 if scale is None else scale,
        l2norm_eps=l2norm_eps,
    )


@_gated_delta_rule.gradient(save="q k v g beta state")
def _(saved, do, dnew_state):  # type: ignore[no-untyped-def]
    names = ("q", "k", "v", "g", "beta", "state")
    grads = gated_delta_rule_backward(
        do,
        dnew_state,
        saved.q,
        saved.k,
        saved.v,
        saved.g,
        saved.beta,
        state=saved.state,
        scale=saved.scale,
        l2norm_eps=saved.l2norm_eps,
    )
    return dict(zip(names, grads))


def _units(x: np.ndarray, eps: float | None) -> np.ndarray:
    return x if eps is None else x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)


@_gated_delta_rule.reference
def _(q, k, v, g, beta, state, scale, l2norm_eps):  # type: ignore[no-untyped-def]
    (B, S, Hv, Dv), (Hk, Dk) = v.shape, q.shape[2:]
    q, k = _units(q, l2norm_eps), _units(k, l2norm_eps)
    held = np.zeros((B, Hv, Dk, Dv)) if state is None else state.copy()
    o = np.zeros((B, S, Hv, Dv))
    for b in range(B):
        for h in range(Hv):
            key = h // (Hv // Hk)
            for s in range(S):
                kept = np.exp(g[b, s, h])[:, None] * held[b, h]
                d = beta[b, s, h] * (v[b, s, h] - kept.T @ k[b, s, key])
                held[b, h] = kept + np.outer(k[b, s, key], d)
                o[b, s, h] = scale * held[b, h].T @ q[b, s, key]
    return o, held


@gated_delta_rule_backward.reference
def _(do, dnew_state, q, k, v, g, beta, state, scale, l2norm_eps):  # type: ignore[no-untyped-def]
    (B, S, Hv, Dv), (Hk, Dk) = v.shape, q.shape[2:]
    unit_q, unit_k = _units(q, l2norm_eps), _units(k, l2norm_eps)
    dq, dk, dv, dg, dbeta = (np.zeros(x.shape) for x in (q, k, v, g, beta))
    dstate = np.array(dnew_state, dtype=np.float64)
    for b in range(B):
        for h in range(Hv):
            key = h // (Hv // Hk)
            held = [np.zeros((Dk, Dv)) if state is None else state[b, h]]
            steps = []
            for s in range(S):
                kept = np.exp(g[b, s, h])[:, None] * held[-1]
                rest = v[b, s, h] - kept.T @ unit_k[b, s, key]
                steps.append((kept, rest))
                held.append(kept + np.outer(unit_k[b, s, key], beta[b, s, h] * rest))
            d = dstate[b, h]
            for s in reversed(range(S)):
                kept, rest = steps[s]
                x = unit_k[b, s, key]
                d = d + scale * np.outer(unit_q[b, s, key], do[b, s, h])
                dq[b, s, key] += scale * held[s + 1] @ do[b, s, h]
                ddelta = d.T @ x
                dbeta[b, s, h] = rest @ ddelta
                dv[b, s, h] = beta[b, s, h] * ddelta
                dk[b, s, key] += d @ (beta[b, s, h] * rest) - kept @ dv[b, s, h]
                dkept = d - np.outer(x, dv[b, s, h])
                each = (dkept * kept).sum(1)
                dg[b, s, h] = each if g.shape[3] > 1 else each.sum()
                d = np.exp(g[b, s, h])[:, None] * dkept
            dstate[b, h] = d
    if l2norm_eps is not None:
        dq, dk = (
            (d - u * (u * d).sum(-1, keepdims=True))
            / np.sqrt((x * x).sum(-1, keepdims=True) + l2norm_eps)
            for x, u, d in ((q, unit_q, dq), (k, unit_k, dk))
        )
    return dq, dk, dv, dg, dbeta, dstate


def _sample(rng, dims):  # type: ignore[no-untyped-def]
    # Keys of length about 1, decays at most 1 and weights between 0 and 1, as models have them:
    # otherwise the state grows without bound.
    B, S, Hk, Hv, Dk, Dg = (dims[d] for d in ("B", "S", "Hk", "Hv", "Dk", "Dg"))
    g = -rng.exponential(1.0, (B, S, Hv, Dg)) * rng.choice([0.0, 0.1, 5.0], (B, S, Hv, 1))
    return {
        "k": rng.standard_normal((B, S, Hk, Dk)) / np.sqrt(max(Dk, 1)),
        "g": g,
        "beta": rng.random((B, S, Hv)),
    }


def _rules(Hk: int, Hv: int, Dk: int, Dg: int, l2norm_eps: float | None) -> str | None:
    if Hk < 1 or Hv % Hk:
        return f"v has Hv = {Hv} heads; must be a multiple of the Hk = {Hk} heads of q and k"
    if Dg not in (1, Dk):
        return f"g has {Dg} decays for a head; must be 1 or Dk = {Dk}"
    if l2norm_eps is not None and not l2norm_eps > 0:
        return f"l2norm_eps is {l2norm_eps}; must be above 0, or None for no norm"
    return None


for _op in (_gated_delta_rule, gated_delta_rule_backward):
    _op.check(_rules)
    _op.sample(_sample)
