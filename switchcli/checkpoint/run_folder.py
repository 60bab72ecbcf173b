"""The layout of a run's folder, and the writing of its small files."""

import os
from pathlib import Path

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.documents import RECIPE
from switchcli.errors import RecipeError, disk_errors
from switchcli.system import publish

_LOGS = (".log", ".out", ".err")
"""Suffixes of the logs that a scheduler opens in the folder of a run before the run starts."""


class RunFolder:
    """The paths in the folder of one run (docs/reference/run-folder.md). Nothing is created until it is written."""

    def __init__(self, path: Path, resume: bool = True) -> None:
        """`resume`: a run that is in the folder is resumed, else it is archived."""
        self.path = path
        self.resume = resume
        self.newest: checkpoint.Checkpoint | None = None
        """The checkpoint in the folder that this start goes on from."""
        self.recipe = path / RECIPE
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.result = path / "result.json"
        self._files = (self.recipe, self.tokenizer, self.metrics, self.result)
        self._folders = (self.checkpoints, path / "tensorboard", path / "wandb")

    @property
    def same_command(self) -> str:
        """The command that resumes the run, for a message. `--no-resume` again would archive the run."""
        return "the same command" if self.resume else "the same command without --no-resume"

    def check_free(self) -> None:
        """Check that a run may be here.

        Raises:
            RecipeError: the folder holds files and no run, so it is somebody else's; or the run that is to be archived
                lies around the current folder.
        """
        with disk_errors(self.path):
            is_run = (self.path / "run.lock").is_file() or checkpoint.saved_checkpoints(self.checkpoints)
            others = [] if is_run or not self.path.is_dir() else [path.name for path in self.path.iterdir()]
        # lost+found: the folder may be a disk of its own.
        others = [
            name for name in others if not name.startswith((".", "lost+found")) and Path(name).suffix not in _LOGS
        ]
        if others:
            raise RecipeError(
                f"--out {self.path}: holds {min(others)} and no run of switchcli: give a new or an empty folder"
            )
        if self.is_to_archive() and Path.cwd().is_relative_to(self.path.resolve()):
            raise RecipeError(
                f"--out {self.path}: --no-resume would rename the current folder: run the command from another one"
            )

    def check_links(self) -> None:
        """Raise CheckpointError if a link, or another file that no run makes, is where the run would write."""
        with disk_errors(self.path):
            for file in self._files:
                publish.check_file(file)
            for folder in self._folders:
                publish.check_folder(folder)

    def remove_leftovers(self) -> None:
        """Remove the temporary files that a killed process left. Only the holder of the folder's lock may."""
        for path in self._files:
            publish.remove_stale(path, age=0)

    def is_to_archive(self) -> bool:
        """Return whether the folder holds an earlier run, with a recipe or checkpoints, that is not resumed."""
        return not self.resume and (os.path.lexists(self.recipe) or os.path.lexists(self.checkpoints))

    def archive(self) -> Path | None:
        """Rename the folder of an earlier run that is not resumed. Return its new path, or None if there is none.

        If the run folder is a link, the folder that it names is renamed, and the link stays: the new run will be where
        the earlier one was.
        """
        if not self.is_to_archive():
            return None
        path = self.path.resolve() if self.path.is_symlink() else self.path
        archived = publish.archive_name(path)
        with disk_errors(self.path):
            path.rename(archived)
        return archived
