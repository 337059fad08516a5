"""Selection by keys that are infinite or NaN: one rule, kept by every implementation that is here.

The Triton kernels are asked in their interpreter, by tests/triton/test_interpreted.py.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import transom
from transom.conformance import agree, checks
from transom.kernels.moe.route import SCORES
from transom.registry import OPS

INF, NAN = float("inf"), float("nan")
INTERPRETED = "TRITON_INTERPRET" in os.environ
DRAWN = 30 if INTERPRETED else 150


def implementations(op: str) -> list[str]:
    only = "triton" if INTERPRETED else None
    found = [i.name for i in checks.implementations(OPS[op], "cpu", only)]
    return found if INTERPRETED else [*found, "reference"]


def mixed(rng: np.random.Generator, shape: tuple[int, ...], values: list[float]) -> np.ndarray:
    """Numbers of `values`, in other shares each time: also all of them the same."""
    return rng.choice(values, shape, p=rng.dirichlet(np.full(len(values), 0.4)))


@pytest.mark.parametrize("impl", implementations("route"))
@pytest.mark.parametrize(
    ("bias", "groups", "k", "ids"),
    [
        # group 2 holds +inf beside -inf, and it is the best
        ([0.3, 0.3, 0, 0, INF, -INF, 0.1, 0.1], 4, 1, [4]),
        # an expert taken out is chosen before any of another group
        ([-INF, 0, 9, -INF, 0, 0, 0, 0], 2, 3, [2, 1, 0]),
        ([0, 0, 0, 0, 1, -INF, -INF, -INF], 2, 3, [0, 1, 2]),
        ([-INF, -INF, 0, 0, 0, 0, INF, INF], 4, 2, [6, 7]),
        ([NAN, 0, 0, 0, INF, NAN, NAN, NAN], 2, 4, [4, 5, 6, 7]),
        # no group is better than another: the first
        ([-INF] * 8, 4, 2, [0, 1]),
        ([NAN] * 8, 2, 3, [0, 1, 2]),
        ([-INF, NAN, -INF, NAN, -INF, 0, 0, INF], 1, 5, [7, 5, 6, 0, 1]),
    ],
)
def test_edge_105_no_expert_of_a_group_left_out_is_chosen(impl, bias, groups, k, ids):
    with transom.use(route=impl):
        got, weights = transom.route(
            torch.zeros(1, 8), k, score="sigmoid", bias=torch.tensor(bias), groups=groups
        )
    assert got.tolist() == [ids] and torch.allclose(weights, torch.full((1, k), 1 / k))


@pytest.mark.parametrize("impl", implementations("route"))
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_edge_105_logits_of_minus_infinity_have_no_weight(impl, score):
    z = torch.tensor([[-INF, 2.0, -INF, 2.0], [-INF] * 4])
    with transom.use(route=impl):
        ids, weights = transom.route(z, 3, score=score)
    assert ids.tolist() == [[1, 3, 0], [0, 1, 2]]
    assert weights.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("impl", implementations("route"))
@pytest.mark.parametrize("score", SCORES)
def test_edge_105_drawn_keys_choose_what_the_reference_chooses(rng, impl, score):
    op = OPS["route"]
    for _ in range(DRAWN):
        groups, size = int(rng.integers(1, 6)), int(rng.integers(1, 7))
        open_groups = int(rng.integers(1, groups + 1))
        E, k = groups * size, int(rng.integers(1, open_groups * size + 1))
        z = mixed(rng, (3, E), [0.0, 1.0, -1.0, 2.0, INF, -INF, NAN])
        bias = mixed(rng, (E,), [0.0, 0.5, -1.0, INF, -INF, NAN]) if rng.random() < 0.6 else None
        mask = rng.random(3) < 0.7 if rng.random() < 0.3 else None
        call = (bool(rng.random() < 0.7), 1.5, None, mask)
        with np.errstate(all="ignore"):
            ids, weights = op.reference_of(z, k, score, bias, groups, open_groups, *call)
        with transom.use(route=impl):
            got = transom.route(
                torch.from_numpy(z).float(),
                k,
                score=score,
                bias=None if bias is None else torch.from_numpy(bias).float(),
                groups=groups,
                top_groups=open_groups,
                renormalize=call[0],
                scale=1.5,
                mask=None if mask is None else torch.from_numpy(mask),
            )
        case = f"{z}\n{bias}\ngroups={groups}, top_groups={open_groups}, k={k}, mask={mask}"
        assert got[0].tolist() == ids.tolist(), case
        assert agree.compare("weights", got[1], weights, E, 1.0) is None, case


@pytest.mark.parametrize("impl", implementations("lightning_indexer"))
def test_edge_106_drawn_scores_select_what_the_reference_selects(rng, impl):
    op = OPS["lightning_indexer"]
    for n in range(DRAWN):
        B, S, H, D, N = (int(rng.integers(1, most)) for most in (3, 4, 4, 5, 40))
        top_k, odd = int(rng.integers(1, N + 3)), [INF, -INF, NAN]
        k = mixed(rng, (B, N, D), [0.0, 1.0, -1.0, 2.0, -2.0, *odd])
        q = mixed(rng, (B, S, H, D), [0.0, 1.0, -1.0, *(odd if n % 3 == 0 else [])])
        weights = mixed(rng, (B, S, H), [0.0, 1.0, -1.0, 0.5, *(odd if n % 4 == 0 else [])])
        visible = rng.integers(0, N + 2, (B, S))
        with np.errstate(all="ignore"):
            want = op.reference_of(q, k, weights, top_k, visible)
        with transom.use(lightning_indexer=impl):
            got = transom.lightning_indexer(
                torch.from_numpy(q).float(),
                torch.from_numpy(k).float(),
                torch.from_numpy(weights).float(),
                top_k,
                visible=torch.from_numpy(visible),
            )
        assert got.tolist() == want.tolist(), f"{q}\n{k}\n{weights}\n{visible}, top_k={top_k}"
