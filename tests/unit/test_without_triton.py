"""transom where triton is not installed: everything works, and explain() says why Triton is not
used."""

from __future__ import annotations

import subprocess
import sys

CALL = """
import sys

class Absent:
    "Finds no triton, as where it is not installed."
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)

import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
sys.meta_path.insert(0, Absent())
import torch, transom
logits = torch.randn(4, 8)
ids, weights = transom.route(logits, 2, score="softmax")
assert ids.shape == (4, 2) and "triton" not in sys.modules
print(transom.backends()["triton"])
print(transom.explain("route", logits, 2, score="softmax"))
"""
REASON = "triton is not installed; expected triton >= 3.2; pip install transom[triton]"


def test_calls_run_and_explain_says_why_triton_does_not():
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *explained = done.stdout.splitlines()
    assert first == REASON
    assert f"  triton: {REASON}" in explained
