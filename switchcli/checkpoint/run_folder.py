"""The layout of a run's folder, and the writing of its small files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchcli import publish
from switchcli.errors import RecipeError, disk_errors
from switchcli.report.sinks import publish_file


class RunFolder:
    """The paths in the folder of one run (see the README for its layout). Nothing is created until it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.result = path / "result.json"

    def check_links(self) -> None:
        """Raise CheckpointError if a link, or another file that no run makes, is where the run would write."""
        with disk_errors(self.path):
            for file in (self.recipe, self.tokenizer, self.metrics, self.result):
                publish.check_file(file)
            for folder in (self.checkpoints, self.path / "tensorboard", self.path / "wandb"):
                publish.check_folder(folder)

    def write_recipe(self, text: str) -> None:
        publish_file(self.recipe, text)

    def write_tokenizer(self, text: str) -> None:
        publish_file(self.tokenizer, text)

    def write_result(self, result: Mapping[str, Any]) -> None:
        publish_file(self.result, json.dumps(result, indent=1) + "\n")

    def archive(self) -> Path | None:
        """Rename the folder of an earlier run, so that a new run can begin here. Return its new path, or None if none.

        If the run folder is a link, the folder that it names is renamed, and the link stays: the new run will be where
        the earlier one was. Raises RecipeError if the current folder is in the run folder.
        """
        if not os.path.lexists(self.recipe) and not os.path.lexists(self.checkpoints):
            return None
        path = self.path.resolve() if self.path.is_symlink() else self.path
        if Path.cwd().is_relative_to(path.resolve()):
            raise RecipeError(
                f"--out {self.path}: --no-resume would rename the current folder: run the command from another one"
            )
        number = 1
        while os.path.lexists(archived := path.with_name(f"{path.name}.before-{number}")):
            number += 1
        with disk_errors(self.path):
            path.rename(archived)
        return archived
