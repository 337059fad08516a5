"""Options of the kit: which implementations, on which device, how many examples."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

import transom
from transom.conformance import checks

OPTIONS = {
    "--transom-impl": (None, "only this implementation or backend (default: all)"),
    "--transom-device": ("cpu", "device type of the tensors"),
    "--transom-ops": (None, "only these operators, separated by commas"),
    "--transom-examples": (
        os.environ.get("TRANSOM_TEST_EXAMPLES", "15"),
        "drawn calls per operator and implementation",
    ),
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("transom")
    for name, (default, meaning) in OPTIONS.items():
        group.addoption(name, default=default, help=meaning)


def option(config: pytest.Config, name: str) -> str | None:
    """The option's value; its default where this file was collected too late to add options."""
    value: str | None = config.getoption(name, OPTIONS[name][0])
    return value


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile(
        "transom", derandomize=True, database=None, deadline=None, print_blob=True,
        max_examples=int(option(config, "--transom-examples") or 15),
        suppress_health_check=[
            HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture,
        ],
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted, device = (
        option(metafunc.config, "--transom-ops"),
        option(metafunc.config, "--transom-device"),
    )
    ops = [
        op for name, op in transom.ops().items()
        if op.module.startswith("transom.") and (not wanted or name in wanted.split(","))
    ]  # fmt: skip
    if {"op", "impl"} <= set(metafunc.fixturenames):
        impl = option(metafunc.config, "--transom-impl")
        pairs = [(o, i.name) for o in ops for i in checks.implementations(o, str(device), impl)]
        metafunc.parametrize("op, impl", pairs, ids=[f"{o.name}-{i}" for o, i in pairs])
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", ops, ids=[o.name for o in ops])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(option(request.config, "--transom-device"))
