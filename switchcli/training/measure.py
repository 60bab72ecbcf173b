"""Measure a model: its cross-entropy and routing on held-out text, and its answers to the examples of tasks.

Validation during training, `eval`, and the measurement of teachers, baselines and pruned models all call an Evaluator.
"""

import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from switchcli.data.batch import Batch
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.errors import NumericsError
from switchcli.metric_names import AUXILIARY_LOSS, HELD_OUT, NEG_LOG_PERPLEXITY, TASKS_AVERAGE
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.system.signals import NEVER, StopRequest, StopTraining
from switchcli.tasks.scores import DRAWS, Scores, score
from switchcli.tasks.task import AnsweredExample
from switchcli.tasks.tokens import ScoredExamples
from switchcli.terminal.console import Console
from switchcli.training import router_health
from switchcli.training.config import ScoringSpec
from switchcli.training.scoring import TaskPredictor, score_metrics, task_results
from switchcli.training.state import Metrics, merge
from switchcli.training.validation import HeldOutText, evaluate, rank_batches

ALL_TEXT = "text"
"""The name in results of a single held-out text, and of several together."""
_T = TypeVar("_T")
_NO_TEXTS: Mapping[str, HeldOutText] = MappingProxyType({})


class TextMetrics(NamedTuple):
    """The metrics of a model on one held-out text, summed over all ranks."""

    text: HeldOutText
    metrics: Metrics


class Measurement(NamedTuple):
    """What was measured of one model: except for the seconds the same on every rank."""

    capacity: Mapping[str, Policy]
    """How routers counted capacity, for `text` and for `tasks`."""
    texts: Mapping[str, TextMetrics]
    """The metrics of each text, by label. The label of a single text may be empty."""
    targets: Mapping[str, TextMetrics]
    """Metrics on the labeled targets of each task, by task."""
    scores: Mapping[str, Scores]
    """The scores of each task, by task. Values go up to 100."""
    answers: Mapping[str, tuple[AnsweredExample, ...]]
    """The answered examples of each task, by task."""
    layers: tuple[str, ...]
    """Names of the sparse layers of the model, in forward order."""
    text_seconds: float
    """Seconds of the forward passes on all texts."""

    @property
    def num_rows(self) -> int:
        """The rows of all texts."""
        return sum(text.num_rows for text, _ in self.texts.values())

    @property
    def total(self) -> Metrics:
        """The metrics on all texts together. Empty without texts."""
        measured: list[Metrics] = [metrics for _, metrics in self.texts.values()]
        return functools.reduce(merge, measured, {})

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name as in the state of a run: higher is better."""
        held_out = {HELD_OUT: float(self.total[NEG_LOG_PERPLEXITY].value())} if self.texts else {}
        return {**held_out, **score_metrics(self.scores)}

    def load(self) -> dict[str, list[float]]:
        """Return the tokens of all texts and targets that each expert got, by the name of the sparse layer."""
        targets = [metrics for _, metrics in self.targets.values()]
        layers = router_health.record(functools.reduce(merge, targets, self.total), self.layers).get("layers", {})
        return {name: layer["load"] for name, layer in layers.items()}

    def held_out(self) -> dict[str, dict[str, Any]]:
        """Return the record of each text by its name, and under `text` that of all texts together."""
        together = {ALL_TEXT: self._record(self.num_rows, self.total)} if len(self.texts) > 1 else {}
        return {**together, **self._records(named_texts(self.texts))}

    def target_records(self) -> dict[str, dict[str, Any]]:
        """Return the record of the targets of each task, by task."""
        return self._records(self.targets)

    def parts(self) -> dict[str, dict[str, Any]]:
        """Return the record of each text and of the targets of each task, by name: all that was measured, once."""
        return {**self._records(named_texts(self.texts)), **self.target_records()}

    def _records(self, measured: Mapping[str, TextMetrics]) -> dict[str, dict[str, Any]]:
        return {
            name: {**self._record(text.num_rows, metrics), **text.metrics(metrics)}
            for name, (text, metrics) in measured.items()
        }

    def _record(self, num_rows: int, metrics: Metrics) -> dict[str, Any]:
        """Return neg. log perplexity and routing health, without the auxiliary loss, which only training has."""
        record = router_health.record(metrics, self.layers)
        record.pop(AUXILIARY_LOSS, None)
        return {"sequences": num_rows, **record}

    def to_json(self) -> dict[str, Any]:
        """Return everything except the answers, in its form in files."""
        texts, targets = self.held_out(), self.target_records()
        return {"capacity": dict(self.capacity), **task_results(self.scores), "held_out": texts, "targets": targets}


def named_texts(texts: Mapping[str, _T]) -> dict[str, _T]:
    """Return texts, or what belongs to them, by name: a single one has the name `text`, others have their labels."""
    return {ALL_TEXT if len(texts) == 1 else label: text for label, text in texts.items()}


class Evaluator(NamedTuple):
    """What models of one vocabulary are measured on, and how. `_replace` leaves out a part."""

    tokenizer: Tokenizer
    texts: Mapping[str, HeldOutText]
    """Held-out texts by label."""
    tasks: tuple[ScoredExamples, ...]
    """The examples to answer, one item for each task."""
    scoring: ScoringSpec
    """How examples are answered and answers scored."""
    capacity: Policy | None
    """How routers count capacity. None: `paper` on texts and targets, `dropless` for answers."""
    rows_each: int
    """Rows of a batch of text on each rank, at most. They are rounded up to whole routing groups of the model."""
    context: DistributedContext
    console: Console
    """Shows the progress of answering."""
    targets: Mapping[str, HeldOutText] = _NO_TEXTS
    """Labeled targets of tasks to measure the cross-entropy on, by task."""

    @property
    def metric(self) -> str:
        """The metric by which models are compared."""
        return TASKS_AVERAGE if self.tasks else HELD_OUT

    def __call__(self, model: SwitchTransformer, stop: StopRequest = NEVER) -> Measurement:
        """Measure a model, which must not be wrapped for training. Collective.

        Scores have no intervals, which take long: see `with_intervals`. A `stop` that is requested on any rank ends
        the measurement.

        Raises:
            NumericsError: the loss on held-out text is not finite.
            StopTraining: a stop was requested. All ranks raise it.
        """
        on_text, on_tasks = self.capacity or "paper", self.capacity or "dropless"
        started = time.perf_counter()
        texts = {label: self._measure_text(model, text, on_text, stop) for label, text in self.texts.items()}
        text_seconds = time.perf_counter() - started
        targets = {name: self._measure_text(model, text, on_text, stop) for name, text in self.targets.items()}
        predictor = TaskPredictor(model, self.tokenizer, self.context, self.scoring, on_tasks)
        answers = predictor.answer_all(self.tasks, self.console, stop) if self.tasks else {}
        capacity: dict[str, Policy] = {"text": on_text, "tasks": on_tasks}
        layers = tuple(model.spec.sparse_layer_names())
        return Measurement(capacity, texts, targets, self._scores(answers, 0), answers, layers, text_seconds)

    def with_intervals(self, measured: Measurement) -> Measurement:
        """Return the measurement with the intervals of scores."""
        return measured._replace(scores=self._scores(measured.answers, DRAWS))

    def batches(self, model: SwitchTransformer, text: HeldOutText) -> list[Batch]:
        """Return this rank's batches of a text, of whole routing groups of the model: equally many on each rank."""
        group, ranks = model.spec.group_sequences, self.context.dp_size
        rows = min(self.rows_each, -(-text.num_rows // ranks))  # of a small text no batch is mostly padding
        return rank_batches(text, -(-rows // group) * group, self.context.dp_rank, ranks)

    def _scores(self, answers: Mapping[str, tuple[AnsweredExample, ...]], draws: int) -> dict[str, Scores]:
        tasks = (examples.task for examples in self.tasks)
        return {task.name: score(task, answers[task.name], draws) for task in tasks}

    def _measure_text(
        self, model: SwitchTransformer, text: HeldOutText, capacity: Policy, stop: StopRequest
    ) -> TextMetrics:
        batches = _until_stopped(self.batches(model, text), stop, self.context)
        metrics = evaluate(model, text.objective, batches, self.context, capacity)
        loss = -float(metrics[NEG_LOG_PERPLEXITY].value())
        if not math.isfinite(loss):
            raise NumericsError(f"the held-out loss is {loss}", "take an older checkpoint")
        return TextMetrics(text, metrics)


def _until_stopped(batches: Iterable[Batch], stop: StopRequest, context: DistributedContext) -> Iterator[Batch]:
    """Yield the batches. Raises StopTraining on all ranks together after a stop."""
    for batch in batches:
        if context.any_rank(stop.requested):
            raise StopTraining
        yield batch
