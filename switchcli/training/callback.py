"""Callback: what training does every few steps besides the step itself, such as logging, evaluation and saving."""

from abc import ABC, abstractmethod

from switchcli.training.state import TrainState


class Callback(ABC):
    """Called with the state after every `every_steps`-th step and after the last."""

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps

    def due(self, step: int, last_step: int) -> bool:
        """Return whether to call it after `step`, counted from 1."""
        return step == last_step or step % self.every_steps == 0

    @abstractmethod
    def __call__(self, state: TrainState) -> None: ...
