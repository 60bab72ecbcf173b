"""NonFiniteHandler: what a run does when a number is not finite, as `train.nonfinite` asks; the same on every rank."""

from collections.abc import Mapping
from typing import Any, Protocol

from switchcli.errors import NumericsError
from switchcli.report.console import Console, silent
from switchcli.train.config import NonfiniteSpec
from switchcli.train.state import TrainState


class Rewindable(Protocol):
    """A run that can go back to its newest checkpoint."""

    def restore(self, state: TrainState) -> bool:
        """Take weights, optimizer and state from the newest checkpoint. Return whether there is one."""

    def note_skipped(self, record: Mapping[str, Any]) -> None:
        """Write the record of steps that were left out."""


class NonFiniteHandler:
    """Has a run go on from a NumericsError, or end by it."""

    def __init__(
        self,
        settings: NonfiniteSpec,
        run: Rewindable | None = None,
        console: Console | None = None,
    ) -> None:
        """`run` may be left out where the policy is to stop. A warning names the steps that are left out."""
        self._settings = settings
        self._run = run
        self._console = console or silent()

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
        if self._run is None or policy == "stop" or (policy == "skip" and updated):
            raise error
        left_out, seconds, first = state.skipped_steps, state.seconds, step
        if len(left_out) >= at_most:
            others = (
                f"after {len(left_out)} others in this run (train.nonfinite.at_most is {at_most}: raise it to go on)"
            )
            raise NumericsError(f"{error.problem}, {others}", error.fix)
        if policy == "roll_back":
            if not self._run.restore(state):
                raise error
            first = state.step + 1
        state.skipped_steps, state.seconds = [*left_out, (first, step)], seconds
        state.step = step
        # All of them: going back takes the records since then.
        self._run.note_skipped({"step": step, "left_out": state.skipped_steps})
        weights = f"with the weights of step {first - 1} and " if policy == "roll_back" else ""
        those = f"step {step}" if first == step else f"steps {first} to {step}"
        self._console.warning(
            f"{error.problem}: going on {weights}without the batches of {those} "
            f"(time {len(state.skipped_steps)} of at most {at_most}: train.nonfinite)"
        )


ENDS = NonFiniteHandler(NonfiniteSpec(policy="stop"))
"""Of a run that goes on from none."""
