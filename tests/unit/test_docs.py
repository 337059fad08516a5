"""The generated pages are current, and every numbered edge case has a test or says why not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_page_of_ascend_is_that_of_its_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    made = importlib.import_module("ascend")
    kept = json.loads((ROOT / "docs/ascend.json").read_text(encoding="utf-8"))
    assert made.page(kept) == (ROOT / "docs/ascend.md").read_text(encoding="utf-8")
    assert "No binary ran on a device" in made.page(kept)
    assert made.rendered(kept) == (ROOT / "docs/ascend.json").read_text(encoding="utf-8")


def test_every_edge_case_has_a_test_or_a_reason():
    assert "**nothing**" not in (ROOT / "docs/edge_cases.md").read_text(encoding="utf-8")


def test_every_environment_variable_is_in_the_readme():
    from transom.config import VARIABLES

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [v.name for v in VARIABLES if f"`{v.name}`" not in text] == []
