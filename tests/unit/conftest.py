"""Operators that only these tests know."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import scaled_norm as _operators  # noqa: E402

from transom.registry import forget_plans  # noqa: E402


@pytest.fixture
def norm():
    """The operator scaled_norm, as declared: what a test registers on it is taken away again."""
    yield from _fresh(_operators.scaled_norm)


@pytest.fixture
def linear():
    """The operator scaled_linear, likewise."""
    yield from _fresh(_operators.scaled_linear)


def _fresh(op):
    before = dict(op.impls)
    yield op
    op.impls.clear()
    op.impls.update(before)
    forget_plans()
