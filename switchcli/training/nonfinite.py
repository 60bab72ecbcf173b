"""NonFiniteHandler: the policy `train.nonfinite` for numbers that are not finite, applied equally on every rank."""

from collections.abc import Mapping
from typing import Any, Protocol

from switchcli.errors import NumericsError
from switchcli.report.console import Console, silent
from switchcli.training.config import NonfiniteSpec
from switchcli.training.state import TrainState


class Rewindable(Protocol):
    """A run that can return to its newest checkpoint."""

    def restore(self, state: TrainState) -> bool:
        """Restore weights, optimizer and state from the newest checkpoint. Return whether there is one."""

    def note_skipped(self, record: Mapping[str, Any]) -> None:
        """Write the record of the skipped steps."""


class NonFiniteHandler:
    """Skips the steps of a NumericsError, so that training continues, or raises the error."""

    def __init__(
        self,
        settings: NonfiniteSpec,
        run: Rewindable | None = None,
        console: Console | None = None,
    ) -> None:
        """`run` is needed unless the policy is `stop`. The console warns about skipped steps."""
        self._settings = settings
        self._run = run
        self._console = console or silent()

    @property
    def before_updates(self) -> bool:
        """Whether to check each gradient before the optimizer uses it. Otherwise the check runs one step late, which
        avoids a device sync."""
        return self._settings.policy != "stop"

    def __call__(self, error: NumericsError, state: TrainState, step: int, updated: bool) -> None:
        """Skip step `step`, in which a number is not finite; under `roll_back` also the steps since the checkpoint.

        Args:
            error: the number that is not finite.
            state: the state of the run, which becomes that after the skipped steps.
            step: the number of the step, counted from 1.
            updated: whether weights and optimizer state already contain the update of the step.

        Raises:
            NumericsError: `error` itself, where the policy stops the run, an update cannot be undone or there is no
                checkpoint; or one that names the limit, where `at_most` is reached.
        """
        policy, at_most = self._settings.policy, self._settings.at_most
        if self._run is None or policy == "stop" or (policy == "skip" and updated):
            raise error
        skipped, seconds, first = state.skipped_steps, state.seconds, step
        if len(skipped) >= at_most:
            limit = f"after {len(skipped)} others in this run (train.nonfinite.at_most is {at_most}: raise it to go on)"
            raise NumericsError(f"{error.problem}, {limit}", error.fix)
        if policy == "roll_back":
            if not self._run.restore(state):
                raise error
            first = state.step + 1
        # Restoring also restored these two: put back the newer values.
        state.skipped_steps, state.seconds = [*skipped, (first, step)], seconds
        state.step = step
        # The record lists all skipped steps, because restoring removed the records since the checkpoint.
        self._run.note_skipped({"step": step, "skipped_steps": state.skipped_steps})
        weights = f"with the weights of step {first - 1} and " if policy == "roll_back" else ""
        steps = f"step {step}" if first == step else f"steps {first} to {step}"
        self._console.warning(
            f"{error.problem}: going on {weights}without the batches of {steps} "
            f"(time {len(state.skipped_steps)} of at most {at_most}: train.nonfinite)"
        )


ALWAYS_STOP = NonFiniteHandler(NonfiniteSpec(policy="stop"))
"""A handler that always raises the error."""
