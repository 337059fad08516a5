"""Options of the kit: which implementations, on which device, how many examples."""

from __future__ import annotations

import os

import pytest

import transom
from transom.conformance import checks, levels

OPTIONS = {
    "--transom-impl": (None, "only this implementation or backend (default: all)"),
    "--transom-device": ("cpu", "device type of the tensors"),
    "--transom-ops": (None, "only these operators, separated by commas"),
    "--transom-examples": (
        os.environ.get("TRANSOM_TEST_EXAMPLES", "6"),
        "drawn calls for each check of an implementation",
    ),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("transom")
    for name, (default, meaning) in OPTIONS.items():
        group.addoption(name, default=default, help=meaning)


def option(config: pytest.Config, name: str) -> str | None:
    """The option's value; its default where this file was collected too late to add options."""
    value: str | None = config.getoption(name, OPTIONS[name][0])
    return value


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"op", "impl", "check"} <= set(metafunc.fixturenames):
        return
    wanted, device, one = (
        option(metafunc.config, name)
        for name in ("--transom-ops", "--transom-device", "--transom-impl")
    )
    asked = [
        (name, impl, check)
        for name, op in transom.ops().items()
        if op.module.startswith("transom.") and (not wanted or name in wanted.split(","))
        for impl in checks.implementations(op, str(device), one)
        for check in levels.CHECKS
        # Level 4 asks how the operator stands in torch: the same for all of them but the gradients.
        if check.level < 4
        or (check.level == 4 and (one or impl.tier == "composite" or check.name == "gradients"))
    ]
    ids = [f"{name}-{impl.name}-{check.name}" for name, impl, check in asked]
    metafunc.parametrize("op, impl, check", [(n, i.name, c) for n, i, c in asked], ids=ids)


@pytest.fixture
def examples(request: pytest.FixtureRequest) -> int:
    return int(option(request.config, "--transom-examples") or 6)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(option(request.config, "--transom-device"))
