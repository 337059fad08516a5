"""The vendor's operators, played on the CPU while these tests run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"ascend_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def vendor():
    """torch.ops.npu as torch_npu declares it, computed by references."""
    if importlib.util.find_spec("torch_npu") is not None:
        pytest.skip("torch_npu is installed; its own operators are there")
    played = _load("vendor")
    played.library = played.define()
    yield played
    played.library._destroy()


@pytest.fixture(scope="session")
def kernels():
    """Small kernels, right and wrong."""
    return _load("kernels")
