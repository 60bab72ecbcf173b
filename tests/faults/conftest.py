"""The files that the verbs of the harness start from, and the verbs that are prepared: once in a session."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.harness import Prepared, lay_out

Prepare = Callable[[str], Prepared]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("faults").resolve())


@pytest.fixture(scope="session")
def prepare(sound: Path) -> Prepare:
    """Return the verb of a name, prepared the first time."""
    prepared: dict[str, Prepared] = {}

    def prepare(name: str) -> Prepared:
        prepared[name] = prepared.get(name) or Prepared.of(sound, name)
        return prepared[name]

    return prepare


@pytest.fixture
def draw() -> random.Random:
    return random.Random(0)
