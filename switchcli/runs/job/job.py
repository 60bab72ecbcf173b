"""Job: the resolved command line of a verb that trains."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.job.pins import Pin


class Job(NamedTuple):
    """A recipe with every key, and the checkpoints that it names."""

    recipe: Any
    """A TrainingRecipe, of the class of the verb."""
    pins: Mapping[str, Pin]
    """The checkpoints that the recipe names, by key."""

    def handle(self, key: str) -> CheckpointHandle | None:
        """Return the open checkpoint of a key; None if the recipe names none, or the run needs it no more."""
        pin = self.pins.get(key)
        return pin and pin.handle

    def checkpoints(self) -> dict[str, str]:
        """Return the path of each checkpoint, by key."""
        return {key: str(pin.handle.path) if pin.handle else pin.path for key, pin in self.pins.items()}
