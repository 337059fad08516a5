"""Every native operator on torch's threads, in forked and spawned children, several at once.

TRANSOM_TEST_SPLIT=1 lets the library split small calls as it does large ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import transom

REASON = transom.backends()["native"]


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("what", ["threads", "together", "fork", "spawn"])
def test_every_operator_gives_the_same_bits(what):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("processes.py"), what],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "TRANSOM_TEST_SPLIT": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
