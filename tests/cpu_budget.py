"""The CPU time of each test file, child processes included, and the budget that a file must keep.

`pytest --cpu-budget=check` fails a run in which a file takes more than twice its recorded budget. `--cpu-budget=record`
writes the budgets (tests/cpu_budgets.json), and `--cpu-budget=show` prints what each file took. The unit is the CPU
time of tests/repository/test_calibration.py in the same run, so that a budget holds on a slow processor too.
"""

import json
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
BUDGETS = TESTS / "cpu_budgets.json"
CALIBRATION = "repository/test_calibration.py"
TIERS = ("nightly", "integration")
"""The markers of the tiers; a test with none of them is a unit test."""
SLACK = 2.0
"""Factor by which a file may exceed its budget: one file's time, in units of the same run, varies by up to 1.8."""
SMALL = 10.0
"""Units below which no file is judged: the first tests of a worker also pay for imports and shared fixtures."""
TICKS = os.sysconf("SC_CLK_TCK")

Budgets = dict[str, dict[str, float]]
"""Units of CPU time by tier, and by file below tests/."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-budget", choices=("show", "check", "record"), help="CPU time by test file: cpu_budgets.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    if mode := config.getoption("cpu_budget"):
        config.pluginmanager.register(Meter(), "cpu-meter")
        if not hasattr(config, "workerinput"):
            config.pluginmanager.register(Ledger(mode, budgets()), "cpu-ledger")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the largest budgets first: a worker that is given one last keeps the others waiting."""
    total = Counter[str]()
    for tier in budgets().values():
        total.update(tier)  # type: ignore[arg-type]
    items.sort(key=lambda item: -total[item.path.relative_to(TESTS).as_posix()])


def budgets() -> Budgets:
    return json.loads(BUDGETS.read_text(encoding="utf-8"))


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children, of those that live too (a fork server's among them)."""
    spent = sum(os.times()[:4])
    for task in Path("/proc/self/task").glob("*/children"):
        for child in _read(task).split():
            # proc(5): fields 14 to 17, counted after the name in parentheses, which may hold blanks
            fields = _read(Path(f"/proc/{child}/stat")).rpartition(")")[2].split()
            spent += sum(map(int, fields[11:15])) / TICKS
    return spent


def _read(path: Path) -> str:
    try:
        with open(path) as file:  # noqa: PTH123 - tests patch Path
            return file.read()
    except OSError:  # it has ended, or this is not Linux
        return ""


class Meter:
    """Notes on each report the tier of its test, and how much CPU time its phase took; runs in every worker."""

    def __init__(self) -> None:
        self._last = cpu_seconds()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self._last = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        now = cpu_seconds()
        report.cpu_seconds, self._last = now - self._last, now
        report.tier = next((tier for tier in TIERS if item.get_closest_marker(tier)), "unit")
        return report


class Ledger:
    """Adds the reports up by tier and file, and judges them; runs where the results come together."""

    def __init__(self, mode: str, allowed: Budgets) -> None:
        self._mode = mode
        self._allowed = allowed
        self._spent = Counter[tuple[str, str]]()
        self._excess: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if hasattr(report, "cpu_seconds"):  # a report that xdist makes of a worker that died has none
            file = report.nodeid.partition("::")[0].removeprefix("tests/")
            self._spent[report.tier, file] += report.cpu_seconds

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        unit = self._spent["unit", CALIBRATION]
        if not unit:
            return
        for (tier, file), seconds in sorted(self._spent.items()):
            units, budget = seconds / unit, self._allowed.get(tier, {}).get(file, 0.0)
            if self._mode == "record":
                self._allowed.setdefault(tier, {})[file] = round(units, 1)
            elif self._mode == "check" and units > SLACK * max(budget, SMALL):
                self._excess.append(f"{file}, {tier}: {units:.0f} units of CPU time, budget {budget:.0f}")
        if self._mode == "record":
            kept = {tier: {file: units for file, units in sorted(files.items()) if (TESTS / file).exists()}
                    for tier, files in self._allowed.items()}  # fmt: skip
            BUDGETS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if self._excess and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        unit, total = self._spent["unit", CALIBRATION], sum(self._spent.values())
        terminalreporter.section("CPU time by file, child processes included")
        for (tier, file), seconds in self._spent.most_common(None if self._mode == "show" else 10):
            terminalreporter.line(f"{seconds:8.1f} s {file}, {tier}")
        terminalreporter.line(f"{total:8.1f} s all files" + (f"; the unit is {unit:.2f} s" if unit else ""))
        for line in self._excess:
            terminalreporter.line(f"over budget: {line}. Make it cheaper, or record a new budget.", red=True)
