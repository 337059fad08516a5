"""Whether calls go through transom._C, and why not."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from transom.abi import extension, library


@pytest.fixture
def found(monkeypatch):
    """A function: what is found when transom._C is this module (None: it is missing)."""

    def look(module):
        monkeypatch.setitem(sys.modules, "transom._C", module)
        return extension._found.__wrapped__()

    return look


def test_without_the_extension_the_reason_names_this_python(found):
    module, reason = found(None)
    assert module is None
    assert reason.endswith(f"no transom._C for Python {sys.version_info[0]}.{sys.version_info[1]}")


def test_an_extension_of_another_header_is_not_used(found):
    speaks = ".".join(map(str, library.header_version()))
    assert found(SimpleNamespace(ABI=(1, 0))) == (
        None,
        f"transom._C was built for ABI 1.0; this transom speaks {speaks}",
    )


def test_a_torch_whose_tensors_cannot_be_read_is_left_to_cffi(found):
    version = library.header_version()
    module = SimpleNamespace(ABI=version, set_up=lambda *args: "this torch has no table")
    assert found(module) == (None, "this torch has no table")


@pytest.mark.skipif(extension.module() is None, reason=str(extension.why_cffi()))
def test_the_extension_says_what_it_misses_of_a_torch():
    reason = extension.module().set_up({"tensor": object})
    assert reason == "this torch has no DLPack exchange table"
