"""The layout of a run's folder, and the writing of its small files."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from switchcli import publish
from switchcli.errors import RecipeError, disk_errors
from switchcli.report.sinks import publish_file


class RunFolder:
    """The paths in the folder of one run (docs/reference/run-folder.md). Nothing is created until it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.result = path / "result.json"
        self.trackers = (path / "tensorboard", path / "wandb")
        self.has_begun = False
        """Whether this start has taken a step or saved a checkpoint. Until then, a failure removes what it wrote."""

    def check_links(self) -> None:
        """Raise CheckpointError if a link, or another file that no run makes, is where the run would write."""
        with disk_errors(self.path):
            for file in (self.recipe, self.tokenizer, self.metrics, self.result):
                publish.check_file(file)
            for folder in (self.checkpoints, *self.trackers):
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


class FolderBefore:
    """The state of a run folder before a start, to which a start that fails returns it.

    Only files that a run makes are touched, and no link is followed within the folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        path = folder.path.resolve()
        self._missing = [each for each in (path, *path.parents) if not os.path.lexists(each)]
        """The folders that do not exist, the innermost first."""
        self._names = {each.name for each in path.iterdir()} if path.is_dir() else set()
        self._contents = {
            file: file.read_bytes()
            for file in (folder.recipe, folder.tokenizer)
            if file.is_file() and not file.is_symlink()
        }
        self.archived: Path | None = None
        """The new name of the run that was in the folder, if the start archived it."""
        self.is_locked = False
        """Whether this start holds the lock of the folder. Otherwise another one may have written what is there."""

    def restore(self) -> None:
        """Remove what the start wrote, and the folders that it made; bring back what it replaced or archived.

        What cannot be removed stays: the failure of the start is what the user has to see. Without the lock, only empty
        folders are removed.
        """
        with suppress(OSError):
            if self.is_locked:
                self._restore_files()
            for directory in self._missing:
                directory.rmdir()

    def _restore_files(self) -> None:
        folder = self._folder
        files = [folder.recipe, folder.tokenizer, folder.metrics, folder.path / "run.lock"]
        if self.archived is not None:
            self._names, self._contents = set(), {}
        for file, content in self._contents.items():
            if not file.exists() or file.read_bytes() != content:
                publish_file(file, content.decode())
        for directory in (folder.checkpoints, *folder.trackers):
            if directory.name not in self._names and publish.is_folder(directory):
                shutil.rmtree(directory)
        for file in files:
            if file.name not in self._names:
                file.unlink(missing_ok=True)
        if self.archived is not None:
            path = folder.path.resolve()
            path.rmdir()
            self.archived.rename(path)
