"""TensorBoard and Weights & Biases, through accelerate's trackers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from switchcli.errors import RecipeError


class Trackers:
    """The trackers that a recipe names; they get what metrics.jsonl gets. Only the main rank makes one."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """TensorBoard writes to `folder`/tensorboard, W&B where its own settings say.

        Raises:
            RecipeError: the package of a tracker is not installed.
        """
        available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
        for name in names:
            if not available[name]():
                raise RecipeError(
                    f"log.trackers: {name} is not installed: pip install 'switchcli[{name}]', or leave it out"
                )
        self._trackers: list[TensorBoardTracker | WandBTracker] = []
        if "tensorboard" in names:
            self._trackers.append(TensorBoardTracker("tensorboard", logging_dir=str(folder)))
        if "wandb" in names:
            self._trackers.append(WandBTracker("switchcli", name=folder.name, dir=str(folder)))
        for tracker in self._trackers:
            tracker.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """The numbers of one record, at its `step`; those of mappings as `outer/inner`. Lists are for metrics.jsonl."""
        values = dict(_numbers(record))
        del values["step"]
        for tracker in self._trackers:
            tracker.log(values, step=int(record["step"]))

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value
