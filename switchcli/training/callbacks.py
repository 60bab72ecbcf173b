"""Callbacks: what training does every few steps besides the step itself, such as logging, evaluation and saving."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.errors import NumericsError
from switchcli.metric_names import (
    DROPPED_FRACTION,
    FLOPS_PER_SECOND,
    GRADIENT_NORM,
    HELD_OUT,
    HELD_OUT_LOSS,
    HELD_OUT_PREFIX,
    INPUT_TOKENS,
    LEARNING_RATE,
    NEG_LOG_PERPLEXITY,
    TOKENS_PER_SECOND,
)
from switchcli.model.moe.router import Policy
from switchcli.report.console import Console
from switchcli.system.signals import StopRequest, StopTraining
from switchcli.training import router_health
from switchcli.training.loss import Objective
from switchcli.training.metrics import Metrics, merge
from switchcli.training.prefetch import Loader
from switchcli.training.schedules import ScheduleSpec
from switchcli.training.state import TrainState
from switchcli.training.validation import HeldOutText, bits_per_byte, evaluate, rank_batches, reduce

Record = Mapping[str, Any]
"""Metrics by name, and under `layers` those of each sparse layer."""
SLOW_DATA_FRACTION = 0.1
"""Fraction of a step spent waiting for its batch above which a warning is given."""
REPORTED = (NEG_LOG_PERPLEXITY, DROPPED_FRACTION)
"""Metrics that an evaluation on held-out text reports: those that rows of padding do not change."""


class MetricsLog(ABC):
    """The destination of a run's records."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Write one record. Called only on the main rank."""


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


class LogCallback(Callback):
    """Writes the metrics since the last log, rates and times to the log, and warns about bad routing and slow data."""

    depends_on_weights = False

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
        evaluations: Sequence["EvaluationCallback"] = (),
    ) -> None:
        """Log the metrics of a run.

        Args:
            every_steps: steps between two records.
            total_steps: steps of the whole run.
            schedule: the learning rate.
            tokens_per_step: encoder input tokens of a step over all ranks.
            flops_per_step: FLOPs of the model, forward and backward, of a step over all ranks. What activation
                checkpointing recomputes does not count.
            context: the other ranks.
            log: gets the records.
            console: gets the warnings.
            state: the state at the start, from which rates are counted.
            layers: names of the sparse layers in forward order.
            source: the batches, which may add to a record.
            loader: what steps wait for.
            evaluations: those of the run. The time left includes them.
        """
        super().__init__(every_steps)
        self._total_steps = total_steps
        self._schedule = schedule
        self._tokens_per_step = tokens_per_step
        self._flops_per_step = flops_per_step
        self._context = context
        self._log = log
        self._console = console
        self._layers = layers
        self._source = source
        self._loader = loader
        self._evaluations = evaluations
        self._alarms = router_health.RoutingAlarms(layers, console)
        # At the last record: step and seconds of the state, and seconds that steps had waited for batches.
        self._last_step, self._last_seconds = state.step, state.seconds
        self._last_waited = loader.seconds_waited
        self._slow_data_records = 0
        self._slow_data_warned = False

    def __call__(self, state: TrainState) -> None:
        if not state.metrics_since_log:  # all steps since the last record were skipped
            return
        metrics = reduce(state.metrics_since_log, self._context)
        state.metrics_since_log = {}
        if not self._context.is_main:
            return
        # Each data-parallel rank adds 1 for each step that was not skipped.
        counted_steps = int(metrics[GRADIENT_NORM].weight) // self._context.dp_size
        self._alarms(metrics, counted_steps, state.step)
        steps = state.step - self._last_step
        seconds_per_step = (state.seconds - self._last_seconds) / steps
        self._last_step, self._last_seconds = state.step, state.seconds
        waiting = (self._loader.seconds_waited - self._last_waited) / seconds_per_step / steps
        self._last_waited = self._loader.seconds_waited
        self._check_waiting(waiting)
        evaluation_seconds = sum(one.seconds_left(state.step, self._total_steps) for one in self._evaluations)
        self._log.write(
            {
                "step": state.step,
                **router_health.record(metrics, self._layers),
                LEARNING_RATE: self._schedule(state.step - 1, self._total_steps),
                "targets_seen": state.targets_seen,
                INPUT_TOKENS: state.input_tokens(self._tokens_per_step),
                "seconds": state.seconds,
                TOKENS_PER_SECOND: self._tokens_per_step / seconds_per_step,
                FLOPS_PER_SECOND: self._flops_per_step / seconds_per_step,
                "data_wait_fraction": waiting,
                "seconds_left": (self._total_steps - state.step) * seconds_per_step + evaluation_seconds,
                **self._source.record(state.step),
            }
        )

    def _check_waiting(self, fraction: float) -> None:
        """Warn once if steps waited for data in two records in a row. One is normal: the first batch is never ready."""
        self._slow_data_records = self._slow_data_records + 1 if fraction > SLOW_DATA_FRACTION else 0
        if self._slow_data_records == 2 and not self._slow_data_warned:
            self._slow_data_warned = True
            self._console.warning(
                f"{fraction:.0%} of a step is spent waiting for its batch: raise train.batches_ahead; for prepared "
                "text raise train.workers, or put it on a faster disk ($SWITCHCLI_CACHE); for a stream take "
                "data.access=prepared"
            )


class EvaluationCallback(Callback):
    """Records metrics of an evaluation in the state, `metric` among them.

    A stop interrupts the evaluation with StopTraining. Then nothing is recorded.
    """

    def __init__(self, every_steps: int, metric: str) -> None:
        super().__init__(every_steps)
        self._metric = metric
        self._seconds = 0.0
        """Seconds that the last evaluation took; 0 before the first."""

    def __call__(self, state: TrainState) -> None:
        started = time.perf_counter()
        self.evaluate(state)
        self._seconds = time.perf_counter() - started

    @abstractmethod
    def evaluate(self, state: TrainState) -> None:
        """Measure the current weights, record the metrics in the state, and log them."""

    def seconds_left(self, step: int, last_step: int) -> float:
        """Return the seconds of all evaluations from `step` on, if each takes as long as the last one did."""
        # Multiples of every_steps in [step, last_step - 1], and the one after the last step.
        count = (last_step - 1) // self.every_steps - max(step - 1, 0) // self.every_steps + 1
        return count * self._seconds

    def is_pending(self, state: TrainState, last_step: int) -> bool:
        """Return whether the current weights should have been evaluated but were not."""
        recorded = state.evaluated_step == state.step and self._metric in state.eval_metrics
        return state.step > 0 and self.due(state.step, last_step) and not recorded


class ValidationCallback(EvaluationCallback):
    """Evaluates the model on held-out text, the same batches each time, and records the neg. log perplexity."""

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
        """Evaluate a model regularly.

        Args:
            every_steps: steps between two evaluations.
            model: the model itself, not one wrapped for training.
            objective: the loss that is evaluated.
            texts: held-out texts by label.
            rows_each: rows of a batch on each rank.
            context: the device, the precision and the other ranks.
            log: gets the record.
            policy: how routers count capacity.
            stop: a stop requested on any rank ends the evaluation between two batches.
        """
        super().__init__(every_steps, HELD_OUT)
        self._model = model
        self._objective = objective
        self._texts = texts
        self._rows_each = rows_each
        self._context = context
        self._log = log
        self._policy = policy
        self._stop = stop

    def evaluate(self, state: TrainState) -> None:
        total: Metrics = {}
        results: list[tuple[HeldOutText, Metrics]] = []
        metrics_by_text = {}
        for label, text in self._texts.items():
            batches = rank_batches(text, self._rows_each, self._context.dp_rank, self._context.dp_size)
            metrics = evaluate(self._model, self._objective, self._until_stopped(batches), self._context, self._policy)
            metrics_by_text[label] = text.metrics(metrics)
            total = merge(total, metrics)
            results.append((text, metrics))
        state.texts = metrics_by_text
        values = {f"{HELD_OUT_PREFIX}{name}": float(total[name].value()) for name in REPORTED if name in total}
        neg_log_perplexity = values[HELD_OUT]
        if not math.isfinite(neg_log_perplexity):
            raise NumericsError(
                f"step {state.step}: the held-out loss is {-neg_log_perplexity}",
                router_health.NONFINITE_FIX,
            )
        state.record_evaluation({HELD_OUT: neg_log_perplexity})
        state.bits_per_byte = bits_per_byte(results)
        if self._context.is_main:
            by_text = {"texts": state.texts} if len(self._texts) > 1 else {}
            loss = {HELD_OUT_LOSS: -neg_log_perplexity}
            self._log.write({"step": state.step, **values, **loss, **state.bits(), **by_text})

    def _until_stopped(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yield the batches. Raises StopTraining on all ranks together."""
        for batch in batches:
            if self._context.any_rank(self._stop.requested):
                raise StopTraining
            yield batch


class CanSave(Protocol):
    """A run that can be saved."""

    def save(self, state: TrainState) -> None: ...


class SaveCallback(Callback):
    """Saves the run. The trainer also calls it after a stop."""

    def __init__(self, every_steps: int, run: CanSave) -> None:
        super().__init__(every_steps)
        self._run = run

    def __call__(self, state: TrainState) -> None:
        self._run.save(state)
