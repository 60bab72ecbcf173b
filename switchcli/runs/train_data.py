"""The data of a run, and the evaluation of models on its held-out part and its tasks."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from pydantic import ConfigDict, TypeAdapter

from switchcli.data.batch import Batch, BatchSource
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.errors import DataError
from switchcli.metric_names import HELD_OUT, NEG_LOG_PERPLEXITY, TOKENS_PER_SECOND
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console
from switchcli.tasks.scores import score
from switchcli.tasks.tokens import ScoredExamples
from switchcli.training import router_health
from switchcli.training.loss import Objective
from switchcli.training.metrics import Metrics, merge
from switchcli.training.microbatches import rows_of_microbatch
from switchcli.training.scoring import TaskPredictor, score_metrics
from switchcli.training.scoring_spec import ScoringSpec
from switchcli.training.validation import HeldOutText, evaluate_rows

NUM_SAMPLES = 2
"""The number of held-out texts that are printed with the answers of the model."""


class TrainData(NamedTuple):
    """The training and evaluation data of a run."""

    tokenizer: Tokenizer
    identity: str
    """A digest of the training data. A run can only be resumed with the data that it began with."""
    source: BatchSource
    held_out: Mapping[str, HeldOutText]
    """The held-out texts by label. The label of a single text is empty."""
    samples: Batch
    """A few held-out inputs with their targets, a row each, to print with the answers of the model."""
    scored: tuple[ScoredExamples, ...] = ()
    """The examples to score, one item for each task."""


class HeldOutMeasurement(NamedTuple):
    """The metrics of one model on the evaluation data of a run."""

    metrics: dict[str, float]
    """Metrics by name, as in the training state; higher is better."""
    tokens_per_second: float | None
    """Input tokens of the held-out rows per second of the forward pass. None if another machine measured it."""
    load: dict[str, list[float]]
    """Held-out tokens that each expert got, by the name of the sparse layer."""

    def to_json(self) -> dict[str, Any]:
        """Return the measurement with the keys of files on disk."""
        return {"metrics": self.metrics, TOKENS_PER_SECOND: self.tokens_per_second, "load": self.load}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """Return the measurement that `to_json` wrote. Raises KeyError, TypeError or ValueError if it did not."""
        finite = TypeAdapter(cls, config=ConfigDict(allow_inf_nan=False))
        return finite.validate_python((saved["metrics"], saved[TOKENS_PER_SECOND], saved["load"]))


class RunEvaluation(NamedTuple):
    """Measures models with the vocabulary of a run on the run's evaluation data."""

    recipe: TrainingRecipe
    data: TrainData
    objective: Objective
    scoring: ScoringSpec
    microbatch_rows: int
    """Rows of a batch on one rank, rounded up to whole routing groups of the model."""
    context: DistributedContext
    console: Console

    def held_out(self, model: SwitchTransformer) -> HeldOutMeasurement:
        """Return neg. log perplexity, throughput and expert load on held-out text. Collective.

        Compiled modules run in eager mode.
        """
        started = time.perf_counter()
        metrics: Metrics = {}
        capacity = self.recipe.eval.capacity
        with self.context.eager():
            for text in self.data.held_out.values():
                text_metrics = evaluate_rows(model, self.objective, text, self.microbatch_rows, self.context, capacity)
                metrics = merge(metrics, text_metrics)
        neg_log_perplexity = float(metrics[NEG_LOG_PERPLEXITY].value())
        num_rows = sum(text.num_rows for text in self.data.held_out.values())
        tokens_per_second = num_rows * self.recipe.inputs_length / (time.perf_counter() - started)
        layers = router_health.record(metrics, model.spec.sparse_layer_names()).get("layers", {})
        load = {name: layer["load"] for name, layer in layers.items()}
        return HeldOutMeasurement({HELD_OUT: neg_log_perplexity}, tokens_per_second, load)

    def held_out_and_tasks(self, model: SwitchTransformer) -> HeldOutMeasurement:
        """Return the measurement of `held_out`, with the scores of all tasks among the metrics. Collective."""
        measured = self.held_out(model)
        predictor = TaskPredictor(model, self.data.tokenizer, self.context, self.scoring, self.scoring.capacity)
        answers = predictor.answer_all(self.data.scored, self.console)
        scores = {}
        for examples in self.data.scored:
            name = examples.task.name
            scores[name] = score(examples.task, answers[name], 0)  # 0 draws: without an interval
        return measured._replace(metrics={**measured.metrics, **score_metrics(scores)})


def check_same_data(digests: Mapping[str, str], context: DistributedContext) -> None:
    """Raise DataError if the ranks read different data, by digests of its content. Collective.

    The name of each digest says what it is of, for the message. Paths and times do not count: machines may hold copies.
    """
    if difference := context.first_difference(digests):
        name, rank = difference
        context.main_only(lambda: _raise_ranks_read_different(name, rank))


def _raise_ranks_read_different(name: str, rank: int) -> None:
    raise DataError(
        f"{name}: rank {rank} reads other content than rank 0, and all ranks must read the same: copy the files again "
        "from the machine of rank 0, or name files on a disk that all machines share"
    )


def microbatch_rows(recipe: TrainingRecipe, context: DistributedContext) -> int:
    """Return the number of rows in a microbatch of one rank.

    Raises:
        RecipeError: the ranks cannot divide the batch.
    """
    length, group_rows = recipe.inputs_length, recipe.model.group_sequences
    rows = recipe.train.microbatch_tokens and recipe.train.microbatch_tokens // length
    return rows_of_microbatch(recipe.rows_per_step, rows, group_rows, context.dp_size, length)
