"""Callback: what training does every few steps besides the step itself, such as logging, evaluation and saving."""

from abc import ABC, abstractmethod

from switchcli.training.state import TrainState


class Callback(ABC):
    """Called with the state after every `every_steps`-th step and, with `at_end`, after the last."""

    depends_on_weights = True
    """Whether its result depends on the weights: it is called again after a roll-back."""

    def __init__(self, every_steps: int, at_end: bool = True) -> None:
        self.every_steps = every_steps
        self.at_end = at_end

    def due(self, step: int, last_step: int) -> bool:
        """Return whether to call it after `step`, counted from 1."""
        return self.at_end if step == last_step else step % self.every_steps == 0

    @abstractmethod
    def __call__(self, state: TrainState) -> None: ...
