"""Options of the kit: which implementations, on which device, how many examples."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

import transom
from transom.conformance import checks


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("transom")
    group.addoption("--transom-impl", default=None, help="only this implementation or backend (default: all)")
    group.addoption("--transom-device", default="cpu", help="device type of the tensors")
    group.addoption("--transom-ops", default=None, help="only these operators, separated by commas")
    group.addoption(
        "--transom-examples", type=int, default=int(os.environ.get("TRANSOM_TEST_EXAMPLES", "15")),
        help="drawn calls per operator and implementation",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile(
        "transom", derandomize=True, database=None, deadline=None, print_blob=True,
        max_examples=config.getoption("--transom-examples"),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    settings.load_profile("transom")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    wanted, device = option("--transom-ops"), option("--transom-device")
    ops = [o for n, o in transom.ops().items() if o.module.startswith("transom.") and (not wanted or n in wanted.split(","))]
    if {"op", "impl"} <= set(metafunc.fixturenames):
        pairs = [(o, i.name) for o in ops for i in checks.implementations(o, device, option("--transom-impl"))]
        metafunc.parametrize("op, impl", pairs, ids=[f"{o.name}-{i}" for o, i in pairs])
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", ops, ids=[o.name for o in ops])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--transom-device"))
