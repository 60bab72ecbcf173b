"""What every test runs under: one thread, no network, a cache of its own, examples that do not depend on the clock."""

import importlib.util
import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["shared_runs"]

# A script's background job ignores SIGINT, and one under nohup SIGHUP: so would every process that a test starts.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

# Before torch and the hub's client are imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

if importlib.util.find_spec("hypothesis"):  # a GPU machine may lack it, and the tests for a GPU do not need it
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "all",
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile("unit", settings.get_profile("all"), max_examples=25)
    settings.register_profile("nightly", settings.get_profile("all"), max_examples=1000, derandomize=False)
    settings.load_profile("unit")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Accept pyproject.toml's `timeout` where pytest-timeout is not installed: tests then have no limit."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds a test may take; not applied, as pytest-timeout is not installed")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of pytest-timeout where it is not installed."""
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): not applied, as pytest-timeout is not installed")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as integration the cases that a test's `unit` marker does not name."""
    for item in items:
        if (unit := item.get_closest_marker("unit")) and item.callspec.id not in unit.args:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.integration)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how long each journey (tests/journeys) took. This stands here since xdist's controller reads no other."""
    rows = [dict(report.user_properties) for report in terminalreporter.getreports("passed")]
    if rows := [row for row in rows if "journey" in row]:
        terminalreporter.section(f"journeys, beside a load of {os.getloadavg()[0]:.1f}")
        for row in rows:
            terminalreporter.line(
                "{journey:28} {wall_seconds:5} s, of a processor {processor_seconds:5} s".format(**row)
            )


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of the session, one for all workers: what one test has prepared another finds."""
    from shared_runs import session_folder  # here, where what stands at the top of this file has been set

    folder = session_folder(tmp_path_factory) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWITCHCLI_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws from torch's own generator does not depend on the tests that its worker ran before."""
    import torch  # here, where what stands at the top of this file has been set

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def autograd_in_forks() -> None:
    """A worker's forks may run autograd, whatever its tests did before.

    The first backward pass of a process counts devices. In a CUDA build without a GPU, FakeTensorMode registers one
    that is none. A first pass after that starts a thread for it, and autograd then refuses to run in forks.
    """
    import torch  # here, where what stands at the top of this file has been set

    torch.zeros(1, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def module_path() -> Iterator[None]:
    """A command that a test calls in this process sets PYTHONSAFEPATH for all processes that it starts, to the end."""
    yield
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection to anything but this machine is a failure of the test. RuntimeError: no client retries after it."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0]):
            raise RuntimeError(f"tests use no network, and this one connects to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
