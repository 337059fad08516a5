"""Routing: which k experts a token goes to, and with which weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.dtypes import accumulator
from transom.kernels._same_bits import sigmoid
from transom.ranges import satisfied_by

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "topk_softmax")
# Where softplus is taken as linear, and where its root is taken as exp(x/2); both are exact to
# float64 rounding of the score relative to float32.
LINEAR_ABOVE = 20.0
ROOT_BELOW = -20.0
# Added to the sum of the chosen scores, so that scores that all underflow give weights of zero, not
# NaN.
TINY = 1e-20


@op(
    "logits[T,E], bias?[E], preset?[T,k], mask?[T] -> ids[T,k], weights[T,k]",
    dtypes="logits: float; bias: float; preset: index; mask: bool; ids: i32; weights: acc(logits)",
    flops="T*E*8 + T*k*3",
    accumulate="E",
    autocast="f32: logits",
    batch="T",
    examples=[
        dict(T=6, E=16, k=4, score="sigmoid", groups=4, top_groups=2, scale=2.5),
        dict(T=7, E=15, k=3, score="softmax", groups=5, top_groups=2),
        dict(T=5, E=12, k=4, score="topk_softmax", groups=3, top_groups=2),
        dict(T=4096, E=256, k=6, score="sqrtsoftplus", scale=1.5),
        dict(T=4096, E=256, k=8, score="sigmoid", groups=8, top_groups=4, scale=2.5),
        dict(T=4096, E=128, k=8, score="softmax"),
        dict(T=4096, E=128, k=4, score="topk_softmax"),
        dict(T=64, E=384, k=6, score="sqrtsoftplus", scale=2.5),
    ],
)
def route(
    logits: Tensor,
    k: int,
    *,
    score: str,
    bias: Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    preset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ids = the k largest of s + bias, weights = scale * s[ids] / (sum(s[ids]) + 1e-20).

    score        s of a logit z: "softmax" over all E; "sigmoid"; "sqrtsoftplus" = sqrt(log(1 +
                 exp(z))), with softplus(z) = z above 20; "topk_softmax": the key is z itself and
                 the weights are the softmax over the k chosen logits (already normalised:
                 `renormalize` changes nothing).
    bias         moves the selection only; weights come from s.
    groups       E is cut into `groups` equal runs and only the experts of the best `top_groups` are
                 ever chosen, whatever their keys.  A group's score is the sum of its 2 largest keys
                 with a bias, its largest key without.
    renormalize  False: weights = scale * s[ids].
    preset       ids chosen elsewhere (hash routing, routing replay), in that order, -1 allowed;
                 keys, bias and groups then play no part.
    mask         False: a padding token; its ids are -1, its weights 0, its logits are not read.

    Returns new tensors: ids int32, by falling key, and weights float32 (float64 for float64
    logits), 0 where the id is -1.  Scores, keys and sums are float32 or wider whatever the dtype of
    logits.  Ties, of experts and of groups, go to the lowest index; equal logits have equal scores.

    Keys that are not finite: a NaN key ranks as -inf, and keys of -inf come last, the lowest index
    first, so an id is always in range.  A group that holds a key of +inf has the score +inf, also
    beside one of -inf.  A bias of -inf so takes an expert out unless too few others are left in the
    chosen groups, and one of +inf puts it first.  A logit of -inf has the score 0, under a softmax
    also where all are -inf; the weights of a token are NaN where a chosen score is NaN or infinite.

    Raises ValueError for k outside 1..E, groups that do not divide E, top_groups outside 1..groups,
    fewer than k experts in the chosen groups, an unknown score, or preset ids outside -1..E-1.

    *Source:* op contracts 4.1 to 4.3; DeepSeek-V3, arXiv 2412.19437, equations 13 to 16 (sigmoid
    with bias and groups); DeepSeek-V4, arXiv 2606.19348 (sqrtsoftplus, hash routing).
    """
    T, E = logits.shape
    dtype = accumulator(logits.dtype)
    ids = torch.empty(T, k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(T, k, dtype=dtype, device=logits.device)
    # At the most: z, s, the key, its masked copy, and the sorted keys with their int64 places.
    for rows in _blocks(T, E * (6 * dtype.itemsize + 16) + k * (4 * dtype.itemsize + 32)):
        z = logits[rows].to(dtype).contiguous()
        taken = None if mask is None else mask[rows, None]
        if taken is not None:
            z = z.masked_fill(~taken, 0.0)
        s = z if score == "topk_softmax" else _scores(z, score)
        if preset is not None:
            at = preset[rows].long()
        else:
            key = s if bias is None else s + bias.to(dtype)
            at = _select(key, k, bias is not None, groups, top_groups)
        if taken is not None:
            at = at.masked_fill(~taken, -1)
        valid = (at >= 0) & (at < E)
        chosen = s.gather(1, at.clamp(0, E - 1))
        if score == "topk_softmax":
            chosen = _softmax_of_chosen(chosen, valid)
        else:
            chosen = torch.where(valid, chosen, 0.0)
            if renormalize:
                chosen = chosen / _sum_over_slots(chosen)
        ids[rows] = torch.where(valid, at, -1).to(torch.int32)
        weights[rows] = torch.where(valid, chosen * scale, 0.0)
    return ids, weights


def _blocks(tokens: int, bytes_each: int) -> Iterator[slice]:
    """Slices of the tokens whose temporaries, `bytes_each` for one token, fit the workspace."""
    step = max(1, config.workspace_bytes() // max(1, bytes_each))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _softplus(z: Tensor) -> Tensor:
    # log(1 + e) = log(u) * e / (u - 1) with u the rounded 1 + e (Kahan): accurate like log1p,
    # which, like torch's softplus, is not position independent.
    e = torch.exp(-z.abs())
    u = 1.0 + e
    log1p = torch.where(u == 1.0, e, torch.log(u) * e / torch.where(u == 1.0, 1.0, u - 1.0))
    return torch.where(z > LINEAR_ABOVE, z, z.clamp_min(0.0) + log1p)


def _scores(z: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return torch.where((z == -torch.inf).all(-1, keepdim=True), 0.0, torch.softmax(z, -1))
    if score == "sigmoid":
        return sigmoid(z)
    # exp(z) leaves float32 at -104, its root only at -208: where weights are still decided.
    return torch.where(z < ROOT_BELOW, torch.exp(0.5 * z), _softplus(z).sqrt())


def _select(key: Tensor, k: int, biased: bool, groups: int, top_groups: int) -> Tensor:
    key = torch.where(torch.isnan(key), -torch.inf, key)
    if top_groups == groups:
        return _largest(key, k)
    size = key.shape[1] // groups
    members = key.unflatten(1, (groups, size))
    if biased:
        best = members.topk(min(2, size), -1).values.sum(-1)
        best = torch.where(torch.isnan(best), torch.inf, best)  # of +inf and -inf
    else:
        best = members.amax(-1)
    # Only the experts of the open groups are ranked: no key of the others has to rank below them.
    opened = _largest(best, top_groups).sort(-1).values
    at = _largest(members.gather(1, opened[:, :, None].expand(-1, -1, size)).flatten(1), k)
    return opened.gather(1, at // size) * size + at % size


def _largest(key: Tensor, k: int) -> Tensor:
    # topk promises nothing about ties; a stable descending sort leaves the lowest index first.
    return torch.sort(key, dim=-1, descending=True, stable=True).indices[:, :k]


def _sum_over_slots(s: Tensor) -> Tensor:
    """1e-20 + s[:,0] + s[:,1] + ..., added in slot order, as [T,1]."""
    total = torch.full_like(s[:, :1], TINY)
    for slot in range(s.shape[1]):
        total = total + s[:, slot : slot + 1]
    return total


def _softmax_of_chosen(z: Tensor, valid: Tensor) -> Tensor:
    z = torch.where(valid, z, -torch.inf)
    top = z.amax(-1, keepdim=True)
    e = torch.where(valid, torch.exp(z - torch.where(top == -torch.inf, 0.0, top)), 0.0)
    return e / _sum_over_slots(e)


@route.reference
def _(
    logits: np.ndarray,
    k: int,
    score: str,
    bias: np.ndarray | None,
    groups: int,
    top_groups: int,
    renormalize: bool,
    scale: float,
    preset: np.ndarray | None,
    mask: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    T, E = logits.shape
    ids, weights = np.full((T, k), -1), np.zeros((T, k))
    for t in range(T):
        if mask is not None and not mask[t]:
            continue
        s = _reference_scores(logits[t], score)
        if preset is not None:
            ids[t] = preset[t]
        else:
            key = s if bias is None else s + bias
            key = np.where(np.isnan(key), -np.inf, key)
            member = key.reshape(groups, -1)
            best = member.max(1)
            if bias is not None:
                best = np.where(best == np.inf, np.inf, np.sort(member, 1)[:, -2:].sum(1))
            open_groups = np.argsort(-best, kind="stable")[:top_groups]
            ranked = np.argsort(-key, kind="stable")
            ids[t] = ranked[np.isin(ranked // (E // groups), open_groups)][:k]
        used = ids[t] >= 0
        w = s[ids[t][used]]
        if score == "topk_softmax":
            w = _from_largest(w)
        if score == "topk_softmax" or renormalize:
            w = w / (w.sum() + TINY)
        weights[t, used] = scale * w
    return ids, weights


def _reference_scores(z: np.ndarray, score: str) -> np.ndarray:
    if score == "softmax":
        e = _from_largest(z)
        return e / e.sum() if e.any() else e
    if score == "sigmoid":
        return np.exp(-np.logaddexp(0.0, -z))
    if score == "sqrtsoftplus":
        return np.sqrt(np.where(z > LINEAR_ABOVE, z, np.logaddexp(0.0, z)))
    return z


def _from_largest(z: np.ndarray) -> np.ndarray:
    """exp(z - max z); zeros where nothing is above -inf."""
    top = z.max(initial=-np.inf)
    return np.exp(z - (0.0 if top == -np.inf else top))


@route.check
def _(k: int, E: int, score: str, groups: int, top_groups: int) -> str | None:
    if (fault := _basic_fault(k, E, score)) is not None:
        return fault
    if groups < 1 or E % groups:
        return f"groups is {groups}; must be >= 1 and divide E = {E}"
    if not 1 <= top_groups <= groups:
        return f"top_groups is {top_groups}; must be in 1..groups = 1..{groups}"
    if top_groups * (E // groups) < k:
        return (
            f"{top_groups} of {groups} groups leave {top_groups * (E // groups)} experts; "
            f"k = {k} are to be chosen"
        )
    return None


def _basic_fault(k: int, E: int, score: str) -> str | None:
    if score not in SCORES:
        return f"score is {score!r}; must be one of {', '.join(map(repr, SCORES))}"
    if not 1 <= k <= E:
        return f"k is {k}; must be in 1..E = 1..{E}"
    return None


@route.check_values
@satisfied_by("-1 <= preset <= E - 1")
def _(preset: Tensor | None, E: int) -> str | None:
    return None if preset is None else _ids_fault("preset", preset, E)


def _ids_fault(name: str, ids: Tensor, E: int) -> str | None:
    a = ids.numpy()
    if a.size and (low := a.min()) < -1:
        return f"{name} holds {low}; must be in -1..E-1 = -1..{E - 1}"
    if a.size and (high := a.max()) >= E:
        return f"{name} holds {high}; must be in -1..E-1 = -1..{E - 1}; use -1 for no expert"
    return None


@route.sample
def _(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    """Logits that differ by more than rounding, in random order; with and without a preset. Now and
    then logits of -inf, and biases that take most experts out or put some first."""
    T, E, k = dims["T"], dims["E"], dims["k"]
    logits = rng.permuted(np.tile(np.linspace(-3.0, 3.0, E), (T, 1)), axis=1)
    logits += rng.uniform(-0.1, 0.1, (T, E)) * (6.0 / max(1, E))
    bias = np.round(rng.standard_normal(E) * 16) / 16
    if rng.random() < 0.3:
        logits[rng.random((T, E)) < rng.random((T, 1))] = -np.inf
    if rng.random() < 0.3:
        bias = rng.choice([0.0, -np.inf, np.inf, np.nan], E, p=[0.3, 0.5, 0.1, 0.1])
    return {
        "logits": logits,
        "bias": bias,
        "preset": rng.integers(-1, E, (T, k)) if rng.random() < 0.5 else None,
        "mask": rng.random(T) < 0.8,
    }


@route.gradient(save="logits ids", constant="bias")
def _(saved: Any, dids: None, dweights: Tensor) -> dict[str, Tensor | None]:
    return {
        "logits": route_backward(
            dweights,
            saved.logits,
            saved.ids,
            score=saved.score,
            renormalize=saved.renormalize,
            scale=saved.scale,
        )
        if saved.needs("logits")
        else None
    }


@op(
    "dweights[T,k], logits[T,E], ids[T,k] -> dlogits[T,E]",
    dtypes="dweights: acc(logits); logits: float; ids: index; dlogits: logits",
    flops="T*E*8 + T*k*8",
    accumulate="E",
    batch="T",
    examples=[
        dict(T=6, E=16, k=4, score="sigmoid", scale=2.5),
        dict(T=4096, E=256, k=6, score="sqrtsoftplus", scale=1.5),
        dict(T=4096, E=128, k=8, score="softmax"),
    ],
)
def route_backward(
    dweights: Tensor,
    logits: Tensor,
    ids: Tensor,
    *,
    score: str,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """dlogits of `route`, the selection taken as constant: ds = scale/Z * (dw - sum_j dw_j s_j /
    Z), times ds/dz.

    dweights   gradient of the weights; not read where the id is -1.
    ids        what `route` returned; a repeated id (a preset may repeat) adds both slots, in slot
               order.

    ds/dz is s*(1-s) for sigmoid, sigmoid(z)/(2s) for sqrtsoftplus (its limit s/2 below -20, so s =
    0 divides nothing), and the softmax Jacobian for the two softmaxes.  Z = sum(s[ids]) + 1e-20.
    Returns a new [T,E] tensor in the dtype of logits; zero for tokens without experts, whose logits
    are not read.

    *Source:* op contracts 4.4.
    """
    (T, E), k = logits.shape, ids.shape[1]
    dlogits = torch.empty(T, E, dtype=logits.dtype, device=logits.device)
    item = accumulator(logits.dtype).itemsize
    # At the most: z, s, the scattered gradient and five of the size of z in its slope.
    for rows in _blocks(T, E * (9 * item + 8) + k * (6 * item + 24)):
        dlogits[rows] = _dlogits(dweights[rows], logits[rows], ids[rows], score, renormalize, scale)
    return dlogits


def _dlogits(
    dweights: Tensor, logits: Tensor, ids: Tensor, score: str, renormalize: bool, scale: float
) -> Tensor:
    """dlogits of some tokens, in the accumulator's dtype."""
    E = logits.shape[1]
    valid = (ids >= 0) & (ids < E)
    at = ids.long().clamp(0, E - 1)
    z = logits.to(accumulator(logits.dtype)).contiguous()
    z = torch.where(valid.any(1, keepdim=True), z, 0.0)
    dw = torch.where(valid, dweights, 0.0) * scale
    if score == "topk_softmax":
        p = _softmax_of_chosen(z.gather(1, at), valid)
        ds = p * (dw - (dw * p).sum(1, keepdim=True))
        return _scattered(ds, at, valid, E)
    s = _scores(z, score)
    ds = dw
    if renormalize:
        chosen = torch.where(valid, s.gather(1, at), 0.0)
        total = _sum_over_slots(chosen)
        ds = (dw - (dw * (chosen / total)).sum(1, keepdim=True)) / total
    full = _scattered(ds, at, valid, E)
    if score == "softmax":
        return s * (full - (full * s).sum(1, keepdim=True))
    if score == "sigmoid":
        return full * s * sigmoid(-z)
    slope = torch.where(z < ROOT_BELOW, 0.5 * s, 0.5 * sigmoid(z) / s.clamp_min(TINY))
    return full * slope


def _scattered(ds: Tensor, at: Tensor, valid: Tensor, E: int) -> Tensor:
    """[T,E] with ds added at the chosen experts, one slot after the other."""
    full = ds.new_zeros(ds.shape[0], E)
    for slot in range(ds.shape[1]):
        here = at[:, slot : slot + 1]
        add = torch.where(valid[:, slot : slot + 1], ds[:, slot : slot + 1], 0.0)
        full.scatter_(1, here, full.gather(1, here) + add)
    return full


@route_backward.reference
def _(
    dweights: np.ndarray,
    logits: np.ndarray,
    ids: np.ndarray,
    score: str,
    renormalize: bool,
    scale: float,
) -> np.ndarray:
    dz = np.zeros(logits.shape)
    for t, row in enumerate(ids):
        used = row >= 0
        chosen, dw, z = row[used], scale * dweights[t, used], logits[t]
        if not chosen.size:
            continue
        if score == "topk_softmax":
            p = _from_largest(z[chosen])
            p /= p.sum() + TINY
            np.add.at(dz[t], chosen, p * (dw - dw @ p))
            continue
        s = _reference_scores(z, score)
        total = s[chosen].sum() + TINY
        ds = np.zeros(z.size)
        np.add.at(ds, chosen, (dw - dw @ s[chosen] / total) / total if renormalize else dw)
        if score == "softmax":
            dz[t] = s * (ds - ds @ s)
        elif score == "sigmoid":
            dz[t] = ds * s * np.exp(-np.logaddexp(0.0, z))
        else:
            sigmoid = np.exp(-np.logaddexp(0.0, -z))
            dz[t] = ds * np.where(s > 0, sigmoid / (2 * np.where(s > 0, s, 1)), 0)
    return dz


@route_backward.check
def _(k: int, E: int, score: str) -> str | None:
    return _basic_fault(k, E, score)


@route_backward.check_values
@satisfied_by("-1 <= ids <= E - 1")
def _(ids: Tensor, E: int) -> str | None:
    return _ids_fault("ids", ids, E)


@route_backward.sample
def _(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    """Distinct ids, as selection gives them: repeated ones may cancel to nothing but rounding."""
    T, k, E = dims["T"], dims["k"], dims["E"]
    ids = rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :k]
    return {"ids": np.where(rng.random(ids.shape) < 0.2, -1, ids)}
