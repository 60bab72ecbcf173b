"""The callbacks of a run: logging, evaluation on held-out text and on tasks, and saving.

Each takes the run, and reads from it what it needs.
"""

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    MALFORMED,
    NEG_LOG_PERPLEXITY,
    TASKS_AVERAGE,
    TOKENS_PER_SECOND,
)
from switchcli.system.signals import StopRequest
from switchcli.training import router_health
from switchcli.training.loop import Callback
from switchcli.training.measure import Measurement
from switchcli.training.microbatches import Loader
from switchcli.training.state import TrainState
from switchcli.training.validation import bits_per_byte, reduce

if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer

SLOW_DATA_FRACTION = 0.1
"""Fraction of a step spent waiting for its batch above which a warning is given."""
REPORTED = (NEG_LOG_PERPLEXITY, DROPPED_FRACTION)
"""Metrics that an evaluation on held-out text reports: those that rows of padding do not change."""


class LogCallback(Callback):
    """Writes the metrics since the last log, rates and times to the log, and warns about bad routing and slow data."""

    def __init__(self, run: "Trainer", loader: Loader, evaluations: Sequence["EvaluationCallback"]) -> None:
        """`loader` is what steps wait for. The time that is left includes the `evaluations`."""
        super().__init__(run.recipe.log.every_steps)
        self._run, self._loader, self._evaluations = run, loader, evaluations
        self._layers = run.recipe.model.sparse_layer_names()
        self._alarms = router_health.RoutingAlarms(self._layers, run.console)
        # At the last record: step and seconds of the state, and seconds that steps had waited for batches.
        self._last_step, self._last_seconds = run.state.step, run.state.seconds
        self._last_waited = loader.seconds_waited
        self._slow_data_records = 0
        self._slow_data_warned = False

    def __call__(self, state: TrainState) -> None:
        run, total_steps, batch_tokens = self._run, self._run.recipe.train.steps, self._run.recipe.train.batch_tokens
        if not state.metrics_since_log:  # all steps since the last record were skipped
            return
        metrics = reduce(state.metrics_since_log, run.context)
        state.metrics_since_log = {}
        if not run.context.is_main:
            return
        self._alarms(metrics, int(metrics[GRADIENT_NORM].weight), state.step)  # steps that were not skipped
        steps = state.step - self._last_step
        seconds_per_step = (state.seconds - self._last_seconds) / steps
        self._last_step, self._last_seconds = state.step, state.seconds
        waiting = (self._loader.seconds_waited - self._last_waited) / seconds_per_step / steps
        self._last_waited = self._loader.seconds_waited
        self._check_waiting(waiting)
        evaluation_seconds = sum(one.seconds_left(state.step, total_steps) for one in self._evaluations)
        run.log(
            {
                "step": state.step,
                **router_health.record(metrics, self._layers),
                LEARNING_RATE: run.schedule(state.step - 1, total_steps),
                "targets_seen": state.targets_seen,
                INPUT_TOKENS: state.input_tokens(batch_tokens),
                "seconds": state.seconds,
                TOKENS_PER_SECOND: batch_tokens / seconds_per_step,
                FLOPS_PER_SECOND: run.task.flops_per_step / seconds_per_step,
                "data_wait_fraction": waiting,
                "seconds_left": (total_steps - state.step) * seconds_per_step + evaluation_seconds,
                **run.data.source.record(state.step),
            }
        )

    def _check_waiting(self, fraction: float) -> None:
        """Warn once if steps waited for data in two records in a row. One is normal: the first batch is never ready."""
        self._slow_data_records = self._slow_data_records + 1 if fraction > SLOW_DATA_FRACTION else 0
        if self._slow_data_records == 2 and not self._slow_data_warned:
            self._slow_data_warned = True
            self._run.console.warning(
                f"{fraction:.0%} of a step is spent waiting for its batch: put prepared text on a faster disk "
                "($SWITCHCLI_CACHE); for a stream take data.access=prepared"
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

    def __init__(self, run: "Trainer", stop: StopRequest) -> None:
        super().__init__(run.recipe.eval.every_steps, HELD_OUT)
        self._run, self._stop = run, stop

    def evaluate(self, state: TrainState) -> None:
        run = self._run
        try:
            measured = run.evaluator._replace(tasks=())(run.model, stop=self._stop)
        except NumericsError as error:
            raise NumericsError(f"step {state.step}: {error.problem}", router_health.NONFINITE_FIX) from None
        total = measured.total
        values = {f"{HELD_OUT_PREFIX}{name}": float(total[name].value()) for name in REPORTED if name in total}
        state.texts = {label: text.metrics(metrics) for label, (text, metrics) in measured.texts.items()}
        state.record_evaluation({HELD_OUT: values[HELD_OUT]})
        state.bits_per_byte = bits_per_byte(measured.texts.values())
        if run.context.is_main:
            by_text = {"texts": state.texts} if len(state.texts) > 1 else {}
            run.log({"step": state.step, **values, HELD_OUT_LOSS: -values[HELD_OUT], **state.bits(), **by_text})


class TaskEvalCallback(EvaluationCallback):
    """Scores the model on every task, and records the scores."""

    def __init__(self, run: "Trainer", stop: StopRequest) -> None:
        super().__init__(run.recipe.eval.every_steps, TASKS_AVERAGE)
        self._run, self._stop = run, stop
        self.measured: Measurement | None = None
        """The last answers and scores; None before the first ones and after a stop."""

    def measure(self) -> Measurement:
        """Answer every example. Raises StopTraining after a stop."""
        self.measured = None
        self.measured = self._run.evaluator._replace(texts={})(self._run.model, stop=self._stop)
        return self.measured

    def evaluate(self, state: TrainState) -> None:
        measured = self.measure()
        metrics = measured.metrics()
        state.record_evaluation(metrics)
        if self._run.context.is_main:
            malformed = {name: one.malformed for name, one in measured.scores.items() if one.malformed is not None}
            self._run.log({"step": state.step, **metrics, **({MALFORMED: malformed} if malformed else {})})


class SaveCallback(Callback):
    """Saves the run. The trainer also calls it after a stop."""

    def __init__(self, run: "Trainer") -> None:
        super().__init__(run.recipe.checkpoint.save_every_steps)
        self._run = run

    def due(self, step: int, last_step: int) -> bool:
        return super().due(step, last_step) or step in self._run.recipe.checkpoint.keep_steps

    def __call__(self, state: TrainState) -> None:
        self._run.save(state)
