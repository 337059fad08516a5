"""The simulated accelerator as a device of torch and under a model, in processes of its own."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = (Path(__file__).parent / "device_of_sim.py").read_text(encoding="utf-8")
CLAIMS = re.findall(r"^def (?!main)(\w+)", SCRIPT, re.M)

# What sim computes itself; all else that the model needs is the composite's.
MINE = {"moe_experts", "lightning_indexer", "sparse_attention", "sparse_attention_backward"}


def test_it_is_a_device_of_torch(child):
    """All claims in one process: to import torch takes longer than they do."""
    assert child("device_of_sim.py", *CLAIMS).split() == CLAIMS


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_generates_and_learns_on_it(child):
    told = json.loads(child("model_on_sim.py"))
    assert told["device"] == "sim:0"
    assert told["got"] == told["tokens"]
    there, here = told["losses"]
    assert here == pytest.approx(there, rel=1e-5) and here[2] < here[0]
    name, worst = told["worst"]
    assert worst < 1e-5, f"{name} differs by {worst:.2e} after three steps"
    # Each operator ran where it should, none by chance, and none went round by the CPU.
    for op, impl in told["generated"] + told["trained"]:
        assert impl == ("sim" if op in MINE else "composite"), (op, impl)
    assert {op for op, _ in told["generated"]} >= MINE - {"sparse_attention_backward"}
    assert ["sparse_attention_backward", "sim"] in told["trained"]
    assert told["fallbacks"] and all(op.startswith("aten::") for op in told["fallbacks"])
    # Which explain() says before the call.
    assert told["explained"]["sparse_attention"].startswith("sparse_attention: sim (tier tuned)\n")
    assert told["explained"]["sinkhorn"].startswith("sinkhorn: composite (tier composite)\n")
    assert told["counters"]["tiles"] > 0
