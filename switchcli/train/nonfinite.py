"""Recovery: what a run does when a number is not finite, as `train.nonfinite` asks; the same on every rank."""

from collections.abc import Callable, Mapping
from typing import Any

from switchcli.errors import NumericsError
from switchcli.train.config import NonfiniteSpec
from switchcli.train.state import TrainState


class Recovery:
    """Has a run go on from a NumericsError, or end by it."""

    def __init__(
        self,
        settings: NonfiniteSpec,
        restore: Callable[[TrainState], bool] = lambda state: False,
        warn: Callable[[str], None] = lambda text: None,
        write: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> None:
        """`restore` takes weights, optimizer and state from the newest checkpoint; it says whether there is one. What
        is left out is told to `warn` in words and to `write` as a record."""
        self._settings = settings
        self._restore = restore
        self._warn = warn
        self._write = write

    @property
    def before_updates(self) -> bool:
        """Whether a gradient is to be looked at before it is used; else a step late, without a wait for the device."""
        return self._settings.policy != "stop"

    def __call__(self, error: NumericsError, state: TrainState, step: int, updated: bool) -> None:
        """Leave out step `step`, whose number is not finite, and perhaps those before it. `updated`: the weights and
        the optimizer's state have learned from it.

        Raises:
            NumericsError: `error`: the recipe, or what there is, allows no going on.
        """
        policy, at_most = self._settings.policy, self._settings.at_most
        if policy == "stop" or (policy == "skip" and updated):
            raise error
        left_out, seconds, first = state.left_out, state.seconds, step
        if len(left_out) >= at_most:
            others = (
                f"after {len(left_out)} others in this run (train.nonfinite.at_most is {at_most}: raise it to go on)"
            )
            raise NumericsError(f"{error.found}, {others}", error.mend)
        if policy == "roll_back":
            if not self._restore(state):
                raise error
            first = state.step + 1
        state.left_out, state.seconds = [*left_out, (first, step)], seconds
        state.step = step
        self._write({"step": step, "left_out": state.left_out})  # all: going back takes the records since then
        weights = f"with the weights of step {first - 1} and " if policy == "roll_back" else ""
        those = f"step {step}" if first == step else f"steps {first} to {step}"
        self._warn(
            f"{error.found}: going on {weights}without the batches of {those} (time {len(state.left_out)} of at most "
            f"{at_most}: train.nonfinite)"
        )


ENDS = Recovery(NonfiniteSpec(policy="stop"))
"""Of a run that goes on from none."""
