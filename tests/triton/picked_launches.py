"""Which launches are compiled for which target; test_compile.py runs this in its own process."""

from __future__ import annotations

import importlib

import pytest

import transom


def module(name):
    return importlib.import_module(f"transom.conformance.compiled.{name}")


@pytest.fixture(scope="module", autouse=True)
def figures(tmp_path_factory):
    """Figures of earlier runs stay out of the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSOM_CACHE", str(tmp_path_factory.mktemp("figures")))
        yield


@pytest.fixture(scope="module")
def on_sm_86():
    kit = module("compile")
    return list(kit.launches(transom.ops()["grouped_gemm"], ("sm_86",), True))


def test_every_tile_of_every_type_is_compiled_for_every_target(on_sm_86):
    kit = module("compile")
    little = list(kit.picked(on_sm_86, False, kit.EDGE))

    def covered(launches):
        return {
            (launch.name, str(launch.tile), launch.constants.get("FORMAT"), call.split()[0])
            for _, launch, call, _ in launches
            if not call.startswith((kit.EDGE, "float16"))
        }

    assert covered(little) == covered(on_sm_86)
    assert len(little) < len(on_sm_86) / 3


def test_one_target_of_each_vendor_is_compiled_in_full(on_sm_86):
    kit = module("compile")
    assert kit.leading(("sm_80", "sm_90", "gfx950")) == {"sm_90", "gfx950"}
    assert kit.leading(("sm_120", "sm_86")) == {"sm_120"}
    full = list(kit.picked(on_sm_86, True, kit.EDGE))
    assert any(call.startswith("float16") for _, _, call, _ in full)
    assert any(call.startswith(kit.EDGE) for _, _, call, _ in full)


def test_figures_are_kept_for_one_source_one_target_and_one_set_of_constants(on_sm_86):
    kept = module("figures").Kept()
    first, second = (launch for _, launch, _, _ in on_sm_86[:2])
    key = kept.key(first, "sm_86", module("compile").identity(first))
    assert key != kept.key(first, "sm_89", module("compile").identity(first))
    assert key != kept.key(second, "sm_86", module("compile").identity(second))
    kept.put(key, {"registers": 7})
    with kept.path.open("a") as file:
        file.write('{"key": "cut')  # as a process leaves it that is ended while it writes
    assert module("figures").Kept().get(key) == {"registers": 7}


def test_cache_rows_compile_beside_keys_of_float16(monkeypatch, tmp_path):
    """What a row holds does not fit into float16: query and keys become float32, in the kernel."""
    kit, op = module("compile"), transom.ops()["sparse_attention_rows"]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = kit.launches(op, ("sm_90",), True, lambda call, values: call.startswith("float16"))
    launch = next(n for _, n, _, chosen in found if chosen and n.name.endswith(": _forward"))
    assert kit.compile_launch(launch, "sm_90").asm["cubin"]
