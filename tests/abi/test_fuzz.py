"""Random and truncated tables: each is a library or a sentence, never a crash of the process.

What no host can see is left out: a pointer to nowhere, an array shorter than its count, a text
without an end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "tables.py"
MANY = 400


@pytest.mark.parametrize("first", [0, MANY, 2 * MANY])
def test_a_table_of_any_content_is_a_library_or_a_sentence(first):
    done = subprocess.run(
        [sys.executable, SCRIPT, str(first), str(first + MANY)], capture_output=True, text=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"the table of seed {first + len(lines)}: {done.stderr[-2000:]}"
    assert [seed for seed, _ in lines] == list(range(first, first + MANY))
    refused = [said for _, said in lines if said is not None]
    assert MANY / 4 < len(refused) < MANY - 20
    for said in refused:
        assert said.startswith("libfuzz.so: ") and said.isprintable(), said
    for part in ("is NULL", "UTF-8", "struct_size", "tier is", "built for ABI", "longer than 256"):
        assert any(part in said for said in refused), part
