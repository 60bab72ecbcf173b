"""What happens every so many steps beside the step itself: logging, evaluation, saving, called in that order."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from switchcli.checkpoint.saved_state import HELD_OUT
from switchcli.data.batch import Batch
from switchcli.distributed.context import Runtime
from switchcli.errors import NumericsError
from switchcli.model.moe.router import Policy
from switchcli.train import router_health
from switchcli.train.loss import Objective
from switchcli.train.metrics import Metrics, merge
from switchcli.train.schedules import ScheduleSpec
from switchcli.train.state import TrainState
from switchcli.train.validation import HeldOutText, bits_per_byte, evaluate, reduce

Record = Mapping[str, Any]
"""Figures by name, and under `layers` those of each sparse layer."""
STARVING = 0.1
"""Share of a step spent waiting for its batch from which a warning says so."""
REPORTED = ("neg_log_perplexity", "dropped_fraction")
"""What a held-out evaluation reports: the figures that rows of padding do not touch."""


class Hook(ABC):
    """Called with the state after every `every_steps`-th step, and after the last if it is for the end too."""

    of_weights = True
    """Whether what it does is of the weights as they are: done again where those go back to others."""

    def __init__(self, every_steps: int, at_end: bool = True) -> None:
        self.every_steps = every_steps
        self.at_end = at_end

    def due(self, step: int, last_step: int) -> bool:
        return self.at_end if step == last_step else step % self.every_steps == 0

    @abstractmethod
    def __call__(self, state: TrainState) -> None: ...


class Log(Hook):
    """Reduces the window's metrics to numbers, hands them to `write` on the main rank, and empties the window."""

    of_weights = False

    def __init__(
        self,
        every_steps: int,
        total_steps: int,
        schedule: ScheduleSpec,
        tokens_per_step: int,
        flops_per_step: int,
        runtime: Runtime,
        write: Callable[[Record], None],
        warn: Callable[[str], None],
        state: TrainState,
        layers: Sequence[str],
        shown: Callable[[int], Record],
        seconds_waited: Callable[[], float],
    ) -> None:
        """`tokens_per_step` counts encoder inputs, `flops_per_step` forward and backward; both over all ranks.

        The FLOPs are the model's: what activation checkpointing computes again is none of them.

        `layers` names the sparse layers in the order of the model's reports. `shown` says what the rows of the steps
        so far were of, `seconds_waited` how long steps waited for their batches.
        """
        super().__init__(every_steps)
        self._total_steps = total_steps
        self._schedule = schedule
        self._tokens = tokens_per_step
        self._flops = flops_per_step
        self._runtime = runtime
        self._write = write
        self._since = (state.step, state.seconds)
        self._layers = layers
        self._shown = shown
        self._seconds_waited = seconds_waited
        self._waited = seconds_waited()
        self._warn = warn
        self._starving, self._told = 0, False
        self._alarms = router_health.Alarms(layers, warn)

    def __call__(self, state: TrainState) -> None:
        if not state.window:  # all of its steps were left out
            return
        metrics = reduce(state.window, self._runtime)
        state.window = {}
        if not self._runtime.is_main:
            return
        self._alarms(metrics, steps=int(metrics["gradient_norm"].weight) // self._runtime.data_ranks)
        steps = state.step - self._since[0]
        seconds_per_step = (state.seconds - self._since[1]) / steps
        self._since = (state.step, state.seconds)
        waiting = (self._seconds_waited() - self._waited) / seconds_per_step / steps
        self._waited = self._seconds_waited()
        self._tell_of_waiting(waiting)
        self._write(
            {
                "step": state.step,
                **router_health.record(metrics, self._layers),
                "learning_rate": self._schedule(state.step - 1, self._total_steps),
                "targets_seen": state.targets_seen,
                "seconds": state.seconds,
                "tokens_per_second": self._tokens / seconds_per_step,
                "flops_per_second": self._flops / seconds_per_step,
                "data_wait_fraction": waiting,
                "seconds_left": (self._total_steps - state.step) * seconds_per_step,
                **self._shown(state.step),
            }
        )

    def _tell_of_waiting(self, fraction: float) -> None:
        """A warning, once, when steps wait for data in two windows on end: the first batch is never there yet."""
        self._starving = self._starving + 1 if fraction > STARVING else 0
        if self._starving == 2 and not self._told:
            self._told = True
            self._warn(
                f"{fraction:.0%} of a step is spent waiting for its batch: raise train.batches_ahead; of prepared text "
                "train.workers, or put it on a faster disk ($SWITCHCLI_CACHE); of a stream take data.access=prepared"
            )


class Evaluation(Hook):
    """Notes figures in the state, `figure` among them; or ends in between, for a stop, and notes nothing."""

    def __init__(self, every_steps: int, figure: str) -> None:
        super().__init__(every_steps)
        self._figure = figure

    def owed(self, state: TrainState, last_step: int) -> bool:
        """Whether the weights as they are should have been evaluated, and were not."""
        noted = state.evaluated_step == state.step and self._figure in state.figures
        return state.step > 0 and self.due(state.step, last_step) and not noted


class HeldOut(Evaluation):
    """Evaluates on the same held-out batches each time, and notes the neg. log perplexity in the state."""

    def __init__(
        self,
        every_steps: int,
        model: nn.Module,
        objective: Objective,
        texts: Mapping[str, HeldOutText],
        batches: Callable[[HeldOutText], Sequence[Batch]],
        runtime: Runtime,
        write: Callable[[Record], None],
        policy: Policy = "paper",
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`model` is the plain one; `batches` gives this rank's share; `policy` is how capacity is counted; on any
        rank `stop` ends it between two batches."""
        super().__init__(every_steps, HELD_OUT)
        self._model = model
        self._objective = objective
        self._texts = texts
        self._batches = batches
        self._runtime = runtime
        self._write = write
        self._policy = policy
        self._stop, self._stopped = stop, False

    def __call__(self, state: TrainState) -> None:
        metrics: Metrics = {}
        each: list[tuple[HeldOutText, Metrics]] = []
        texts = {}
        for label, text in self._texts.items():
            batches = self._until_stopped(self._batches(text))
            found = evaluate(self._model, self._objective, batches, self._runtime, self._policy)
            if self._stopped:
                return
            texts[label] = text.figures(found)
            metrics = merge(metrics, found)
            each.append((text, found))
        state.texts = texts
        figures = {f"held_out/{name}": float(metrics[name].value()) for name in REPORTED if name in metrics}
        figure = figures[HELD_OUT]
        if not math.isfinite(figure):
            raise NumericsError(
                f"step {state.step}: the held-out neg. log perplexity is {figure}", router_health.WHEN_LOST
            )
        state.note({HELD_OUT: figure})
        state.bits_per_byte = bits_per_byte(each)
        if self._runtime.is_main:
            apart = {"texts": state.texts} if len(self._texts) > 1 else {}
            self._write({"step": state.step, **figures, **state.bits(), **apart})

    def _until_stopped(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._stopped = any(self._runtime.sum_over_ranks([int(self._stop())]))
            if self._stopped:
                return
            yield batch


class Save(Hook):
    """Saves the run. A stop calls it too."""

    def __init__(self, every_steps: int, save: Callable[[TrainState], None]) -> None:
        super().__init__(every_steps)
        self._save = save

    def __call__(self, state: TrainState) -> None:
        self._save(state)


class Sample(Hook):
    """Shows what the model makes of a few texts; at the end the run shows them anyway."""

    def __init__(self, every_steps: int, show: Callable[[], object]) -> None:
        super().__init__(every_steps, at_end=False)
        self._show = show

    def __call__(self, state: TrainState) -> None:
        self._show()
