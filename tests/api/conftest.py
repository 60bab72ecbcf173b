"""A tiny recipe beside its text, and a run that the command line trained by it: what the API is tried on."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import RECIPE, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all tests of the session: what it is prepared into is cached by its path and time."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    write_text(path)
    return path


@pytest.fixture(scope="session")
def recipe(text: Path) -> Path:
    """The file of a recipe that reads the text."""
    path = text.with_name("tiny.yaml")
    path.write_text(RECIPE.replace("text.txt", str(text)))
    return path


@pytest.fixture(scope="session")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `switchcli pretrain` trained in a process of its own. Nobody writes into it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    subprocess.run([sys.executable, "-m", "switchcli", "pretrain", recipe, "--out", out, "--quiet"], check=True)
    return out
