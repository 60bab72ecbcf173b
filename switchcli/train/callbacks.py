"""What happens every so many steps beside the step itself: logging, evaluation, saving, called in that order."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.signals import StopRequest, StopTraining
from switchcli.errors import NumericsError
from switchcli.metric_names import (
    DROPPED_FRACTION,
    FLOPS_PER_SECOND,
    GRADIENT_NORM,
    HELD_OUT,
    HELD_OUT_PREFIX,
    LEARNING_RATE,
    NEG_LOG_PERPLEXITY,
    TOKENS_PER_SECOND,
)
from switchcli.model.moe.router import Policy
from switchcli.report.console import Console
from switchcli.train import router_health
from switchcli.train.loss import Objective
from switchcli.train.metrics import Metrics, merge
from switchcli.train.prefetch import Loader
from switchcli.train.schedules import ScheduleSpec
from switchcli.train.state import TrainState
from switchcli.train.validation import HeldOutText, bits_per_byte, evaluate, rank_batches, reduce

Record = Mapping[str, Any]
"""Figures by name, and under `layers` those of each sparse layer."""
STARVING = 0.1
"""Share of a step spent waiting for its batch from which a warning says so."""
REPORTED = (NEG_LOG_PERPLEXITY, DROPPED_FRACTION)
"""What a held-out evaluation reports: the figures that rows of padding do not touch."""


class MetricsLog(ABC):
    """Where the records of a run go."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write one record. Called on the main rank alone."""


class Callback(ABC):
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


class LogCallback(Callback):
    """Reduces the window's metrics to numbers, writes them to the log on the main rank, and empties the window."""

    of_weights = False

    def __init__(
        self,
        every_steps: int,
        total_steps: int,
        schedule: ScheduleSpec,
        tokens_per_step: int,
        flops_per_step: int,
        context: DistributedContext,
        log: MetricsLog,
        console: Console,
        state: TrainState,
        layers: Sequence[str],
        source: BatchSource,
        loader: Loader,
    ) -> None:
        """`tokens_per_step` counts encoder inputs, `flops_per_step` forward and backward; both over all ranks.

        The FLOPs are the model's: what activation checkpointing computes again is none of them.

        `layers` names the sparse layers in the order of the model's reports. `source` is what the batches come from,
        `loader` what steps wait for.
        """
        super().__init__(every_steps)
        self._total_steps = total_steps
        self._schedule = schedule
        self._tokens = tokens_per_step
        self._flops = flops_per_step
        self._context = context
        self._log = log
        self._since = (state.step, state.seconds)
        self._layers = layers
        self._source = source
        self._loader = loader
        self._waited = loader.seconds_waited
        self._console = console
        self._starving, self._told = 0, False
        self._alarms = router_health.RoutingAlarms(layers, console)

    def __call__(self, state: TrainState) -> None:
        if not state.metrics_since_log:  # all of its steps were left out
            return
        metrics = reduce(state.metrics_since_log, self._context)
        state.metrics_since_log = {}
        if not self._context.is_main:
            return
        self._alarms(metrics, steps=int(metrics[GRADIENT_NORM].weight) // self._context.dp_size)
        steps = state.step - self._since[0]
        seconds_per_step = (state.seconds - self._since[1]) / steps
        self._since = (state.step, state.seconds)
        waiting = (self._loader.seconds_waited - self._waited) / seconds_per_step / steps
        self._waited = self._loader.seconds_waited
        self._tell_of_waiting(waiting)
        self._log.write(
            {
                "step": state.step,
                **router_health.record(metrics, self._layers),
                LEARNING_RATE: self._schedule(state.step - 1, self._total_steps),
                "targets_seen": state.targets_seen,
                "seconds": state.seconds,
                TOKENS_PER_SECOND: self._tokens / seconds_per_step,
                FLOPS_PER_SECOND: self._flops / seconds_per_step,
                "data_wait_fraction": waiting,
                "seconds_left": (self._total_steps - state.step) * seconds_per_step,
                **self._source.record(state.step),
            }
        )

    def _tell_of_waiting(self, fraction: float) -> None:
        """A warning, once, when steps wait for data in two windows on end: the first batch is never there yet."""
        self._starving = self._starving + 1 if fraction > STARVING else 0
        if self._starving == 2 and not self._told:
            self._told = True
            self._console.warning(
                f"{fraction:.0%} of a step is spent waiting for its batch: raise train.batches_ahead; of prepared text "
                "train.workers, or put it on a faster disk ($SWITCHCLI_CACHE); of a stream take data.access=prepared"
            )


class EvaluationCallback(Callback):
    """Notes figures in the state, `figure` among them. A stop ends it in between by StopTraining: it notes nothing."""

    def __init__(self, every_steps: int, figure: str) -> None:
        super().__init__(every_steps)
        self._figure = figure

    def is_pending(self, state: TrainState, last_step: int) -> bool:
        """Whether the weights as they are should have been evaluated, and were not."""
        noted = state.evaluated_step == state.step and self._figure in state.eval_metrics
        return state.step > 0 and self.due(state.step, last_step) and not noted


class ValidationCallback(EvaluationCallback):
    """Evaluates on the same held-out batches each time, and notes the neg. log perplexity in the state."""

    def __init__(
        self,
        every_steps: int,
        model: nn.Module,
        objective: Objective,
        texts: Mapping[str, HeldOutText],
        rows_each: int,
        context: DistributedContext,
        log: MetricsLog,
        policy: Policy,
        stop: StopRequest,
    ) -> None:
        """`model` is the plain one; a batch has `rows_each` rows; `policy` is how capacity is counted. A `stop` on any
        rank ends it between two batches."""
        super().__init__(every_steps, HELD_OUT)
        self._model = model
        self._objective = objective
        self._texts = texts
        self._rows_each = rows_each
        self._context = context
        self._log = log
        self._policy = policy
        self._stop = stop

    def __call__(self, state: TrainState) -> None:
        metrics: Metrics = {}
        each: list[tuple[HeldOutText, Metrics]] = []
        texts = {}
        for label, text in self._texts.items():
            shares = rank_batches(text, self._rows_each, self._context.dp_rank, self._context.dp_size)
            batches = self._until_stopped(shares)
            found = evaluate(self._model, self._objective, batches, self._context, self._policy)
            texts[label] = text.metrics(found)
            metrics = merge(metrics, found)
            each.append((text, found))
        state.texts = texts
        figures = {f"{HELD_OUT_PREFIX}{name}": float(metrics[name].value()) for name in REPORTED if name in metrics}
        figure = figures[HELD_OUT]
        if not math.isfinite(figure):
            raise NumericsError(
                f"step {state.step}: the held-out neg. log perplexity is {figure}", router_health.WHEN_LOST
            )
        state.note({HELD_OUT: figure})
        state.bits_per_byte = bits_per_byte(each)
        if self._context.is_main:
            apart = {"texts": state.texts} if len(self._texts) > 1 else {}
            self._log.write({"step": state.step, **figures, **state.bits(), **apart})

    def _until_stopped(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._context.any_rank(self._stop.requested):
                raise StopTraining
            yield batch


class CanSave(Protocol):
    """What can save a run."""

    def save(self, state: TrainState) -> None: ...


class SaveCallback(Callback):
    """Saves the run. A stop calls it too."""

    def __init__(self, every_steps: int, run: CanSave) -> None:
        super().__init__(every_steps)
        self._run = run

    def __call__(self, state: TrainState) -> None:
        self._run.save(state)
