"""Job: the resolved command line of a verb that trains or evaluates."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.recipe import resolve
from switchcli.recipe.schema import schema_of
from switchcli.runs.inputs.loading import CheckpointHandle, open_model
from switchcli.terminal.console import main_console


class Job(NamedTuple):
    """A recipe with every key, and the checkpoints that it names."""

    recipe: Any
    """A recipe of the class of the verb."""
    handles: Mapping[str, CheckpointHandle]
    """The open checkpoints, by key; without those that a run which has begun needs no more."""

    def to_text(self) -> str:
        """Return the recipe and the paths of the checkpoints as text, for the other ranks."""
        return json.dumps([resolve.dump(self.recipe), {key: str(handle.path) for key, handle in self.handles.items()}])

    @classmethod
    def from_text(cls, text: str) -> "Job":
        """Open the job that `to_text` has described, whose checkpoints the main rank has verified.

        Raises CheckpointError and DataError like `open_model`.
        """
        document, paths = json.loads(text)
        tree = resolve.parse_saved(document.encode(), "the recipe of rank 0")
        schema = schema_of(tree)
        assert schema is not None, "it was resolved"
        handles = {key: open_model(Path(path), main_console(), verify=False) for key, path in paths.items()}
        return cls(resolve.validate(tree, schema), handles)
