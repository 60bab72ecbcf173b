"""The data of a run, and measuring its model, or another with its vocabulary, on the held-out part."""

import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from switchcli.data.batch import Batch, BatchSource
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.metric_names import HELD_OUT, NEG_LOG_PERPLEXITY
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.tasks.scores import score
from switchcli.tasks.tokens import ScoredExamples
from switchcli.train import router_health
from switchcli.train.loss import Objective
from switchcli.train.metrics import Metrics, merge
from switchcli.train.microbatches import rows_of_microbatch
from switchcli.train.scoring import ScoringSpec, TaskPredictor, score_metrics
from switchcli.train.validation import HeldOutText, evaluate_rows

NUM_SAMPLES = 2
"""Held-out texts that are shown with the answers of the model."""


class Checkable(Protocol):
    """Data that can be compared with what it was prepared from."""

    def check(self) -> None:
        """Raise DataError if it is not, or may not be."""


class TrainData(NamedTuple):
    """What a run trains on and is evaluated on."""

    tokenizer: Tokenizer
    identity: str
    """A digest of the text: a run goes on with the one that it began with."""
    source: BatchSource
    held_out: Mapping[str, HeldOutText]
    """By label; an empty one where there is one text."""
    samples: Batch
    """A few held-out inputs, a row each, with their targets: what is shown of the model's answers."""
    scored: tuple[ScoredExamples, ...] = ()
    """The tasks that the run is scored on."""
    former_identity: str | None = None
    """The identity that versions up to 0.1 gave to the same text, where it differs."""
    checked: tuple[Checkable, ...] = ()

    def check(self) -> None:
        """Raise DataError if rows that were read are not, or may not be, those that `identity` names."""
        for one in self.checked:
            one.check()


class HeldOutMeasurement(NamedTuple):
    """The figures of one model."""

    figures: dict[str, float]
    """By name, as in the state: better when higher."""
    tokens_per_second: float | None
    """Input tokens of the held-out rows, forward; None where another machine measured it."""
    load: dict[str, list[float]]
    """Held-out tokens that each expert got, by the name of its sparse layer."""


class RunEvaluation(NamedTuple):
    """Measures a run's model, or any other with its vocabulary, on what the run is evaluated on."""

    recipe: TrainingRecipe
    data: TrainData
    objective: Objective
    scoring: ScoringSpec
    microbatch: int
    """Rows of a batch."""
    context: DistributedContext

    def held_out(self, model: SwitchTransformer) -> HeldOutMeasurement:
        """Return neg. log perplexity, rate and load, on every rank. Compiled parts run as they were written."""
        started = time.perf_counter()
        metrics: Metrics = {}
        with self.context.eager():
            for text in self.data.held_out.values():
                found = evaluate_rows(
                    model, self.objective, text, self.microbatch, self.context, self.recipe.eval.capacity
                )
                metrics = merge(metrics, found)
        figure = float(metrics[NEG_LOG_PERPLEXITY].value())
        rows = sum(text.num_rows for text in self.data.held_out.values())
        rate = rows * self.recipe.inputs_length / (time.perf_counter() - started)
        layers = router_health.record(metrics, model.spec.sparse_layer_names()).get("layers", {})
        return HeldOutMeasurement({HELD_OUT: figure}, rate, {name: figures["load"] for name, figures in layers.items()})

    def everything(self, model: SwitchTransformer) -> HeldOutMeasurement:
        """Return what `held_out` does, with the scores of all tasks."""
        measured = self.held_out(model)
        predictor = TaskPredictor(model, self.data.tokenizer, self.context, self.scoring, self.scoring.capacity)
        scores = {exam.task.name: score(exam.task, predictor(exam), 0) for exam in self.data.scored}
        return measured._replace(figures={**measured.figures, **score_metrics(scores)})


def microbatch_rows(recipe: TrainingRecipe, context: DistributedContext) -> int:
    """Return how many rows a microbatch of the run has. Raises RecipeError where the ranks cannot share the batch."""
    length, tokens, group = recipe.inputs_length, recipe.train.microbatch_tokens, recipe.model.group_sequences
    return rows_of_microbatch(recipe.rows_per_step, tokens and tokens // length, group, context.dp_size, length)
