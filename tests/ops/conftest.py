"""Here operators are tested by their meaning: the composite, whatever else this machine could run.

Backends are held to the same contracts by the conformance kit and by their own tests.
"""

from collections.abc import Iterator

import pytest

import transom


@pytest.fixture(autouse=True, scope="module")
def composite() -> Iterator[None]:
    """Every call runs as composite unless the test asks for another implementation."""
    with transom.use("composite"):
        yield
