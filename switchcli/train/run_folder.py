"""RunFolder: what lies where in a run's folder, and how its small files are written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchcli.errors import disk_errors
from switchcli.report.sinks import write_whole


class RunFolder:
    """The folder of one run (see the README for its layout); nothing is made until it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.result = path / "result.json"

    def write_recipe(self, text: str) -> None:
        write_whole(self.recipe, text)

    def write_tokenizer(self, text: str) -> None:
        write_whole(self.tokenizer, text)

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_whole(self.result, json.dumps(result, indent=1) + "\n")

    def set_aside(self) -> Path | None:
        """Rename what an earlier run left here, so that one can begin anew; the new name, if there was a run."""
        if not self.recipe.exists() and not self.checkpoints.exists():
            return None
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.before-{number}")).exists():
            number += 1
        with disk_errors(self.path):
            self.path.rename(aside)
        return aside
