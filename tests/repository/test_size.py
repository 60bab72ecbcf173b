"""The package does not grow unnoticed: a commit that raises a budget of size.toml says what the user gets for it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_and_what_its_verbs_reach_are_within_their_budgets() -> None:
    budgets = tomllib.loads((ROOT / "tests/repository/size.toml").read_text(encoding="utf-8"))
    command = [sys.executable, str(ROOT / "scripts/size"), "--json"]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert figures.keys() == budgets.keys()
    over = {name: (figure, budgets[name]) for name, figure in figures.items() if figure > budgets[name]}
    assert not over, f"figure and budget: {over}"
