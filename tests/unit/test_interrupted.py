"""Ctrl-C while a kernel runs: raised when the kernel returns, and nothing is left half-written."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import transom

INTERRUPTED = """
    import os, signal, threading
    import torch, transom

    torch.set_num_threads(1)

    def interrupted(function):
        function()  # plans are made
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                function()
        except KeyboardInterrupt:
            return
"""
WRITES = """
    tokens = torch.randint(0, 1000, (1, 200_000))
    table = torch.randn(4096, 64)
    hashed = dict(
        multipliers=torch.tensor([3, 5]), moduli=torch.full((1, 2), 2048),
        offsets=torch.tensor([0, 2048]), pad=0,
    )
    out = torch.empty(1, 200_000, 128)
    expected = transom.hashed_embedding(tokens, table, **hashed)

    def function():
        out.fill_(float("nan"))
        function.version = out._version
        transom.hashed_embedding(tokens, table, out=out, **hashed)

    interrupted(function)
    whole = torch.equal(out, expected) and out._version > function.version
    untouched = bool(out.isnan().all())
    print("whole" if whole else "untouched" if untouched else "half-written")
    transom.hashed_embedding(tokens, table, out=out, **hashed)
    print(torch.equal(out, expected))
"""
RETURNS = """
    logits = torch.randn(20_000, 4, 4)
    expected = transom.sinkhorn(logits, iterations=100, eps=1e-6)
    interrupted(lambda: transom.sinkhorn(logits, iterations=100, eps=1e-6))
    print(torch.equal(transom.sinkhorn(logits, iterations=100, eps=1e-6), expected))
"""


@pytest.mark.parametrize("impl", ["native", "composite"])
def test_an_interrupt_is_raised_when_the_kernel_has_returned(impl):
    if (reason := transom.backends().get(impl)) is not None:
        pytest.skip(reason)
    code = textwrap.dedent(INTERRUPTED) + textwrap.dedent(WRITES) + textwrap.dedent(RETURNS)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"import os; os.environ['TRANSOM_USE'] = '{impl}'{code}",
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    first, *rest = done.stdout.split()
    assert first in ("whole", "untouched") and rest == ["True", "True"], done.stderr[-2000:]
