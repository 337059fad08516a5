"""Memory of composites: blocks and tiles of the workspace, never queries x keys or tokens x all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from transom.kernels.moe.route import SCORES


def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


def peak(function: Any, call: dict[str, Any], gradient: bool = False) -> int:
    """Bytes allocated at the most during a call, outputs included."""
    if gradient:
        call = {
            n: x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for n, x in call.items()
        }
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        o = function(**call)
        if gradient:
            torch.autograd.backward(o, torch.empty_like(o))
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("selected", [0, 512], ids=["HCA", "CSA"])
def test_a_v4_layer_takes_less_than_400_mib(selected: int) -> None:
    queries, heads, width, entries = 4096, 16, 128, 1024
    call = dict(
        q=torch.zeros(1, queries, heads, width),
        kv=torch.zeros(1, entries, width),
        visible=((torch.arange(queries) + 1) // 4)[None],
        local_kv=torch.zeros(1, queries, width),
        window=128,
        sink=torch.zeros(heads),
    )
    if selected:
        call["indices"] = integers(0, entries, (1, queries, selected)).int()
    most = peak(transom.sparse_attention, call)
    assert 32 * 2**20 < most < 120 * 2**20  # 32 MiB of output, 64 MiB of workspace


@pytest.mark.parametrize("selected", [0, 64], ids=["every entry", "list"])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_temporaries_of_sparse_attention_keep_to_the_workspace(
    selected: int, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "2")
    queries, heads, width, entries = 512, 8, 32, 2048
    call = dict(
        q=torch.zeros(1, queries, heads, width),
        kv=torch.zeros(1, entries, width),
        local_kv=torch.zeros(1, queries, width),
        window=128,
    )
    if selected:
        call["indices"] = integers(0, entries, (1, queries, selected))
    most = peak(transom.sparse_attention, call, gradient)
    own = 2 * (queries * heads * (width + 1) * 4)  # o and lse; or do and dq
    own += 2 * (entries + queries) * width * 4 if gradient else 0
    own += queries * heads * (width + 1) * 4 if gradient else 0
    assert most < own + 3 * 2**20  # logits of all queries would be 32 MiB


@pytest.mark.parametrize(
    "lists, length, block_size",
    [(256, 8, 16), (4, 8, 64), (1, 1, 1024)],
    ids=["own lists", "shared lists", "dense"],
)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_temporaries_of_block_sparse_attention_keep_to_the_workspace(
    lists: int, length: int, block_size: int, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "2")
    queries, heads, width, tokens = 256, 8, 32, 1024
    call = dict(
        q=torch.zeros(1, queries, heads, width),
        k=torch.zeros(1, tokens, 1, width),
        v=torch.zeros(1, tokens, 1, width),
        block_indices=integers(0, tokens // block_size, (1, lists, 1, length)),
        block_size=block_size,
        causal=True,
    )
    most = peak(transom.block_sparse_attention, call, gradient)
    own = queries * heads * (width + 1) * 4 * (4 if gradient else 1)
    own += 4 * tokens * width * 4 if gradient else 0
    assert most < own + 3 * 2**20  # logits of all queries would be 8 MiB in the dense case


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_temporaries_of_route_keep_to_the_workspace(
    score: str, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "2")
    tokens, experts, k = 8192, 128, 8
    call = dict(logits=torch.zeros(tokens, experts), mask=torch.ones(tokens).bool())
    settings = dict(k=k, score=score, groups=4, top_groups=2, bias=torch.zeros(experts))
    most = peak(lambda **tensors: transom.route(**tensors, **settings)[1], call, gradient)
    own = tokens * k * (4 + 4) + (tokens * (experts * 4 + k * 4) if gradient else 0)
    assert most < own + 5 * 2**19  # the logits are 4 MiB, and scores, keys and places as large each
