"""advise_huge_pages: what it asks the system for, and of which memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import transom
from transom.nn import Engram, advise_huge_pages, engram_hashes
from transom.weights.huge_pages import PAGE

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SMAPS = Path("/proc/self/smaps")


def asked_for(tensor: torch.Tensor) -> bool:
    """Whether the mapping that holds the tensor's middle is to have huge pages. Whether it gets
    them depends on what memory is free in one piece."""
    middle = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {middle:#x}")


@pytest.fixture
def allowed():
    if not SETTING.exists() or not SMAPS.exists() or "VmFlags:" not in SMAPS.read_text():
        pytest.skip("this system does not tell of huge pages")


def layer(**kwargs) -> Engram:
    hashed = engram_hashes([0], table_sizes=[70_000], heads=2, compressed_vocab=100, seed=0)[0]
    common = dict(column=16, vocab=100, token_map=None, pad=2, form="v4.1", gate_eps=1e-20)
    return Engram(8, 2, hashed=hashed, **common, **kwargs)


@pytest.mark.usefixtures("allowed")
def test_the_whole_pages_of_a_tensor_are_asked_for():
    table = torch.empty(8 * PAGE, dtype=torch.uint8)
    assert 7 * PAGE <= advise_huge_pages(table) <= 8 * PAGE
    assert asked_for(table)
    part = table[PAGE // 2 : 4 * PAGE]
    assert 2 * PAGE <= advise_huge_pages(part, collapse=True) <= 3 * PAGE


@pytest.mark.usefixtures("allowed")
def test_a_new_table_of_engram_is_asked_for():
    assert asked_for(layer().table)


def test_engram_asks_only_for_a_table_of_its_own_and_only_if_it_may(monkeypatch):
    given = []
    monkeypatch.setattr("transom.nn.engram.advise_huge_pages", given.append)
    table = layer().table
    layer(huge_pages=False)
    layer(table=table.detach().clone())
    assert [id(one) for one in given] == [id(table)]


@pytest.mark.usefixtures("allowed")
def test_the_parts_of_a_quantised_table_are_asked_for():
    table = transom.quantize(torch.zeros(1 << 17, 64), "int8")
    assert table.values.numel() - 2 * PAGE < advise_huge_pages(table) <= table.nbytes


def test_what_covers_no_huge_page_is_left_alone():
    assert advise_huge_pages(torch.empty(1000)) == 0
    assert advise_huge_pages(torch.empty(0, 64)) == 0
    assert advise_huge_pages(torch.empty(1 << 24, device="meta")) == 0
