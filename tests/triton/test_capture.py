"""Host code of every Triton kernel on tensors without memory, each step of it watched: what a CUDA
graph could not capture (a value read back, a size that depends on values, a tensor made or copied
on the host) is seen without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

WATCHED = """
import importlib, torch, transom
from torch.utils._python_dispatch import TorchDispatchMode

kit = importlib.import_module("transom.conformance.compiled.compile")
roads = importlib.import_module("transom.backends.triton._launch")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item",
         "repeat_interleave.Tensor")

class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        out = function(*args, **(kwargs or {}))
        made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if name.startswith(WAITS) or any(t.device.type == "cpu" for t in made):
            seen.append(name)
        return out

for name in kit.offered():
    op = transom.ops()[name]
    function = kit.implementation(op)
    for text, values in kit.calls(op, False):
        seen = []
        with Watch(), roads.record("sm_90") as launches:
            op.invoke(function, *values)
        print(name, len(launches), *seen, sep=",")

op = transom.ops()["route"]  # the watch itself sees what it is for
for wrong in (lambda: torch.ones(2).sum(), lambda: torch.ones(2, device="meta").nonzero()):
    seen = []
    with Watch():
        try:
            wrong()
        except NotImplementedError:  # of a tensor without memory
            seen.append("raised")
    assert seen
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_nothing_in_host_code_waits_or_allocates_on_the_host():
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert len({name for name, *_ in rows}) > 40
    assert [row for row in rows if row[2:]] == []
