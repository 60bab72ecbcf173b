"""All tasks, metrics and suites by name, collected from the modules of this package.

A module contributes its TASKS (`tuple[Task, ...]`), METRICS (a mapping from the name that recipes use to the metric)
and SUITES (`tuple[Suite, ...]`). So a new family of tasks is one new file. The order is alphabetical by module, then
the module's own.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Final, TypeVar

from switchcli import tasks
from switchcli.tasks.suites import Suite
from switchcli.tasks.task import LabelMetric, Metric, Task

T = TypeVar("T")

_READERS: Final = {"registry", "config"}
"""Modules that use the collection, so they cannot contribute to it."""


def _modules() -> Iterator[ModuleType]:
    for name in sorted(module.name for module in pkgutil.iter_modules(tasks.__path__)):
        if name not in _READERS:
            yield importlib.import_module(f"switchcli.tasks.{name}")  # noqa: TID251 - one of ours


def _by_name(definitions: Iterable[tuple[str, T]]) -> Mapping[str, T]:
    by_name: dict[str, T] = {}
    for name, value in definitions:
        assert name not in by_name, f"switchcli.tasks: two definitions have the name {name}: rename one of them"
        by_name[name] = value
    return MappingProxyType(by_name)


_MODULES: Final = tuple(_modules())
TASKS: Final[Mapping[str, Task]] = _by_name(
    (task.name, task) for module in _MODULES for task in getattr(module, "TASKS", ())
)
SUITES: Final[Mapping[str, Suite]] = _by_name(
    (suite.name, suite) for module in _MODULES for suite in getattr(module, "SUITES", ())
)
METRICS: Final[Mapping[str, Metric | LabelMetric]] = _by_name(
    item for module in _MODULES for item in getattr(module, "METRICS", {}).items()
)
"""Metrics that a user's own task may name."""
assert not TASKS.keys() & SUITES.keys(), "a task and a suite have the same name, and a recipe names both in one list"
