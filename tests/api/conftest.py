"""The file of a recipe that the API is tried on."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def recipe(trained: Path) -> Path:
    """The recipe of the run that the command line trained."""
    return trained.with_name("tiny.yaml")
