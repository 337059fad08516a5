"""What every test runs under: hypothesis profiles, and a generator seeded by the test's name."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Required runs repeat exactly: no random seed, no deadline (a busy machine is not a bug), few
# examples. TRANSOM_TEST_EXAMPLES=500 searches longer; TRANSOM_TEST_PROFILE=random searches
# elsewhere each time and keeps what it found in .hypothesis/.
EXAMPLES = int(os.environ.get("TRANSOM_TEST_EXAMPLES", "15"))
SHARED = {
    "max_examples": EXAMPLES,
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("ci", derandomize=True, database=None, **SHARED)
settings.register_profile("random", **SHARED)
settings.load_profile(os.environ.get("TRANSOM_TEST_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: the other test processes share the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """The same numbers in every run of a test, and other numbers in every test."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(name, make) -> the folder `name` with what `make(folder)` puts there, made by the first test
    process that asks."""
    from filelock import FileLock

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        done = folder / "done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of
