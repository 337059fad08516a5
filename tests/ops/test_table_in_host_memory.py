"""A table in host memory beside a device's tensors: who may read it, and what everybody else says.

No CUDA device is needed: fake tensors have its name, and facts say what is pinned.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import transom
from transom import dispatch
from transom.dispatch import facts_of
from transom.facts import Facts
from transom.op import Impl
from transom.selection import reasons, select

LOOKUPS = ("hashed_embedding", "hashed_embedding_out", "hashed_embedding_pooled")


def values(name, quantised=False, device="cuda"):
    """A call's declared arguments, the table on the host, the rest on the device; fake."""
    long = dict(dtype=torch.int64, device=device)
    table = torch.empty(200, 128)
    if quantised:
        table = transom.QuantizedWeight(
            "int8", torch.empty(200, 128, dtype=torch.int8), torch.empty(200, 1)
        )
    out = (torch.empty(2, 5, 512, device=device),) if name.endswith("_out") else ()
    more = (False,) if name.endswith("_pooled") else ()
    return (
        torch.empty(2, 5, **long),
        table,
        *out,
        torch.empty(3, **long),
        torch.empty(2, 2, **long),
        torch.empty(4, **long),
        2,
        None,
        None,
        (),
        *more,
    )


@pytest.fixture
def on_cuda(monkeypatch):
    """facts(name, pinned, ...) of a call on a CUDA device, and its selection."""
    monkeypatch.setattr("transom.device.arch", lambda *_: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def facts(name, pinned, quantised=False, gradient=False) -> Facts:
        with FakeTensorMode(allow_non_fake_inputs=True):
            op = transom.ops()[name]
            found = facts_of(op, values(name, quantised), gradient)
        assert found.device == "cuda" and found.host == {"table": False}
        return dataclasses.replace(found, host={"table": pinned})

    return facts


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize("pinned", (True, False))
def test_the_composite_refuses_and_nothing_is_copied(on_cuda, name, pinned):
    op = transom.ops()[name]
    seen = reasons(op.impls["composite"], on_cuda(name, pinned))
    assert seen == [
        "table is in host memory; supported: tensors of one device; move it there with"
        " table.to('cuda')"
    ]


def reader(name):
    """An implementation that reads the table where it lies."""
    return Impl(name, "reader", "acme", print, host=("table",))


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize("quantised", (False, True))
def test_a_reader_takes_a_pinned_table_and_says_what_else_it_misses(on_cuda, name, quantised):
    impl = reader(name)
    assert reasons(impl, on_cuda(name, True, quantised)) == []
    assert reasons(impl, on_cuda(name, False, quantised)) == [
        "table is in pageable host memory; supported: device memory and pinned host memory; call"
        " table.pin_memory()"
    ]
    assert reasons(impl, on_cuda(name, True, quantised, gradient=True)) == [
        "a gradient is asked for; supported with table in host memory: inference"
    ]
    strided = dataclasses.replace(on_cuda(name, True, quantised), layouts={"table": "rows"})
    assert "table is not contiguous" in reasons(impl, strided)[0]


def test_a_call_that_nobody_takes_names_every_reason(on_cuda):
    explanation = select(transom.hashed_embedding, on_cuda("hashed_embedding", False))
    assert explanation.chosen is None
    assert "table.to('cuda')" in str(explanation)


def test_only_the_table_may_be_elsewhere_and_only_on_the_host():
    op = transom.ops()["hashed_embedding"]
    cuda, cpu, meta = map(torch.device, ("cuda:0", "cpu", "meta"))
    assert op.check_devices({"tokens": cuda, "table": cpu}) == cuda
    for devices in (
        {"tokens": cuda, "table": cuda, "offsets": cpu},
        {"tokens": cpu, "table": cuda},
        {"tokens": cuda, "table": meta},
        {"tokens": meta, "table": cpu},
    ):
        with pytest.raises(ValueError, match=f"{[*devices][-1]} is on .*; tokens is on"):
            op.check_devices(devices)
    backward = transom.ops()["hashed_embedding_backward"]
    with pytest.raises(ValueError, match="tokens is on cpu; dy is on cuda:0"):
        backward.check_devices({"dy": cuda, "tokens": cpu})


def test_a_fake_result_is_on_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True):
        flat = transom.hashed_embedding.flatten(*values("hashed_embedding"))
        assert torch.ops.transom.hashed_embedding.default(*flat).device.type == "cuda"


def test_pinned_and_pageable_tables_have_plans_of_their_own(monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = values("hashed_embedding")
        keys = []
        for pinned in (True, False):
            monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, pinned=pinned: pinned)
            keys.append(dispatch._key(transom.hashed_embedding, call))
    assert keys[0] != keys[1]


ASK_TRITON = """
import importlib, sys, torch, transom
kit = importlib.import_module("transom.conformance.compiled.compile")
roads = importlib.import_module("transom.backends.triton._launch")
sys.path.insert(0, sys.argv[1])
from test_table_in_host_memory import LOOKUPS, values
for name in LOOKUPS:
    op, call = transom.ops()[name], values(name, device="cpu")
    function = kit.implementation(op)
    with roads.record("sm_90") as launches:
        op.invoke(function, *call)
    (launch,) = launches
    assert launch.arguments["table"] is call[1]
    assert op.impls["triton"].host == ("table",)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_is_a_reader_and_its_launch_is_given_the_table_itself():
    """In a process of its own: where no device is, this one has a note in place of the kernels."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_TRITON, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
