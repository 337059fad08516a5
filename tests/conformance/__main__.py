"""`python -m transom.conformance [options]`: the kit, wherever it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# By path, not by name: only then does pytest read the kit's options in time.
sys.exit(pytest.main([str(Path(__file__).parent), "--import-mode=importlib", "-q", *sys.argv[1:]]))
