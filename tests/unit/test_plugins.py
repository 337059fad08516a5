"""Plugins by entry point, each test in a process of its own: lazy, isolated, explained."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PLUGIN = '''
"""A plugin that adds one implementation with public names only."""

def register(transom):
    from transom.requires import at_most, device, dtype
    import torch

    limits = [device("cpu"), dtype("logits", torch.float32), at_most("R", 4)]

    @transom.sinkhorn.impl(requires=limits, tier="tuned")
    def acme(logits, *, iterations, eps):
        return transom.sinkhorn.impls["composite"].function(logits, iterations=iterations, eps=eps)
'''


def run(tmp_path, code, plugin=PLUGIN, extras="", environment=None):
    """What `code` prints in a fresh process beside an installed plugin `acme`."""
    (tmp_path / "acme_plugin.py").write_text(plugin)
    info = tmp_path / "acme-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        f"[transom.plugins]\nacme = acme_plugin:register{extras}\n"
    )
    import os

    env = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        **(environment or {}),
    }
    code = "import torch, transom\nlogits = torch.randn(3, 4, 4)\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = """
with transom.record() as calls:
    transom.sinkhorn(logits, iterations=3, eps=1e-6)
print("acme" if calls[0].impl == "acme" else "ours")
"""


def test_a_plugin_is_loaded_at_the_first_call_and_chosen(tmp_path):
    out = run(tmp_path, "import sys; print('acme_plugin' in sys.modules)" + CALL)
    assert out.split() == ["False", "acme"]


def test_a_broken_plugin_is_a_sentence_and_never_an_error(tmp_path):
    out = run(
        tmp_path,
        CALL + "print(transom.backends()['acme'])",
        plugin="raise OSError('libacme.so.2: not found')",
    )
    assert out.splitlines() == [
        "ours",
        "plugin acme failed to load: OSError: libacme.so.2: not found",
    ]


def test_a_plugin_for_another_device_is_not_loaded(tmp_path):
    out = run(tmp_path, CALL + "import sys; print('acme_plugin' in sys.modules)", extras=" [npu]")
    assert out.split() == ["ours", "False"]


@pytest.mark.parametrize(
    "value, impl", [("none", "ours"), ("other", "ours"), ("acme,other", "acme")]
)
def test_plugins_can_be_chosen(tmp_path, value, impl):
    assert run(tmp_path, CALL, environment={"TRANSOM_PLUGINS": value}).split() == [impl]


def test_its_reasons_are_explained(tmp_path):
    out = run(
        tmp_path, "print(transom.explain('sinkhorn', torch.randn(2, 8, 8), iterations=1, eps=1e-6))"
    )
    assert "acme: R = 8; supported: at most 4" in out


def test_it_can_be_asked_for_by_its_name_as_a_backend(tmp_path):
    out = run(
        tmp_path,
        "with transom.use('acme'):\n    transom.sinkhorn(logits, iterations=3, eps=1e-6)\n"
        "print('ran')",
    )
    assert out.split() == ["ran"]
