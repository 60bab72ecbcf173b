"""What the tests of the documentation share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests import the modules behind scripts/docs."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts/documentation"))
