"""Experiment trackers: TensorBoard and Weights & Biases, through accelerate."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switchcli.errors import RecipeError, SwitchError, disk_errors


class Trackers:
    """The trackers that a recipe names. They get the records of metrics.jsonl. Only the main rank creates one."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Start the trackers. TensorBoard writes to `folder`/tensorboard, W&B where its own settings say.

        Raises:
            RecipeError: a tracker cannot start.
            CheckpointError: the disk refuses.
        """
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        self._trackers: list[TensorBoardTracker | WandBTracker] = []
        if "tensorboard" in names:
            self._trackers.append(TensorBoardTracker("tensorboard", logging_dir=str(folder)))
        if "wandb" in names:
            self._trackers.append(WandBTracker("switchcli", name=folder.name, dir=str(folder)))
        for tracker in self._trackers:
            with _errors_of(tracker.name), disk_errors(folder):
                tracker.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of one record at its `step`, those of nested mappings as `outer/inner`. Lists are skipped."""

        values = dict(_flatten(record))
        del values["step"]
        for tracker in self._trackers:
            tracker.log(values, step=int(record["step"]))

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def check_usable(names: Sequence[str]) -> None:
    """Raise RecipeError if the package of a tracker is not installed, or W&B is not logged in."""
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    is_available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in names:
        if not is_available[name]():
            raise RecipeError(
                f"log.trackers: {name} is not installed: pip install 'switchcli[{name}]', or leave it out"
            )
    if "wandb" in names:
        with _errors_of("wandb"):
            import wandb

            wandb.login()  # asks nothing with WANDB_MODE=offline


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Raise an error of a tracker's package in this block as a RecipeError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SwitchError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        login = "log in by `wandb login`, set WANDB_MODE=offline, " if name == "wandb" else ""
        raise RecipeError(f"log.trackers: {name} cannot start ({reason}): {login}or leave it out") from error


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value
