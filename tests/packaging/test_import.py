"""What `import transom` costs beyond `import torch`."""

from __future__ import annotations

from pathlib import Path

from .conftest import Environment, run

WATCHED = """
import sys, time, torch
asked = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("triton", "numba", "transformers"):
            asked.append(name)
sys.meta_path.insert(0, Watch())
begin = time.process_time()
import transom
print(1000 * (time.process_time() - begin), *asked)
"""
LIMIT_MS = 150.0


def test_import_is_light(installed: Environment, tmp_path: Path) -> None:
    """No extra is so much as looked for, and the best of five takes less than 150 ms of the
    processor (not of the clock: other processes of a test run are no fault of ours), with bytecode
    at hand."""
    best, asked = float("inf"), []
    for _ in range(5):
        time_ms, *asked = run(installed.python, "-c", WATCHED, cwd=tmp_path).split()
        best = min(best, float(time_ms))
        if best < LIMIT_MS:
            break
    assert asked == []
    assert best < LIMIT_MS
