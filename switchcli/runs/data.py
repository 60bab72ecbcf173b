"""What a run trains on, and how the figures of its model, or of another that reads by its vocabulary, are had."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from switchcli.checkpoint.saved_state import HELD_OUT
from switchcli.data.batch import AnyBatch, Batch
from switchcli.data.streaming import LiveStream
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import Runtime
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.tasks.scores import score
from switchcli.tasks.tokens import Scored
from switchcli.train import router_health
from switchcli.train.callbacks import Record
from switchcli.train.loss import Objective
from switchcli.train.metrics import Metrics, merge
from switchcli.train.microbatches import Microbatches
from switchcli.train.scoring import Answering, ScoringSpec, figures_of
from switchcli.train.validation import HeldOutText, evaluate_rows, shared


class Text(NamedTuple):
    """What a verb trains and is evaluated on."""

    tokenizer: Tokenizer
    identity: str
    """A digest of the text: a run goes on with the one that it began with."""
    rows: Callable[[int, int, int], AnyBatch]
    """`rows(step, first, count)`: sequences of a step's batch."""
    held_out: Mapping[str, HeldOutText]
    """By label; an empty one where there is one text."""
    samples: Batch
    """A few held-out inputs, a row each, with their targets: what is shown of the model's answers."""
    exams: tuple[Scored, ...] = ()
    """The tasks that the run is scored on."""
    shown: Callable[[int], Record] = lambda step: {}
    """More of a logged step: what its rows were of."""
    stream: LiveStream | None = None
    """What the rows come from, where it has a position of its own."""
    former_identity: str | None = None
    """The identity that versions up to 0.1 gave to the same text, where it differs."""
    check: Callable[[], None] = lambda: None
    """Raises DataError if rows that were read are not, or may not be, those that `identity` names."""


class Measured(NamedTuple):
    """A model on what a run is evaluated on."""

    figures: dict[str, float]
    """By name, as in the state: better when higher."""
    tokens_per_second: float | None
    """Input tokens of the held-out rows, forward; None where another machine measured it."""
    load: dict[str, list[float]]
    """Held-out tokens that each expert got, by the name of its sparse layer."""


class Measure(NamedTuple):
    """How the figures of a run's model are had, or of any other that reads by its vocabulary."""

    recipe: TrainingRecipe
    text: Text
    objective: Objective
    scoring: ScoringSpec
    microbatch: int
    """Rows of a batch."""
    runtime: Runtime

    def batches(self, text: HeldOutText) -> list[Batch]:
        """This rank's held-out batches, for the run's own model."""
        runtime = self.runtime
        return shared(text.rows, text.num_rows, self.microbatch, runtime.data_rank, runtime.data_ranks)

    def held_out(self, model: SwitchTransformer) -> Measured:
        """Neg. log perplexity, rate and load; on every rank. What was compiled runs as it was written."""
        started = time.perf_counter()
        metrics: Metrics = {}
        with self.runtime.uncompiled():
            for text in self.text.held_out.values():
                found = evaluate_rows(
                    model, self.objective, text, self.microbatch, self.runtime, self.recipe.eval.capacity
                )
                metrics = merge(metrics, found)
        figure = float(metrics["neg_log_perplexity"].value())
        rows = sum(text.num_rows for text in self.text.held_out.values())
        rate = rows * self.recipe.inputs_length / (time.perf_counter() - started)
        layers = router_health.record(metrics, model.spec.routed_parts()).get("layers", {})
        return Measured({HELD_OUT: figure}, rate, {name: figures["load"] for name, figures in layers.items()})

    def everything(self, model: SwitchTransformer) -> Measured:
        """The same with the scores of all tasks."""
        measured = self.held_out(model)
        answering = Answering(model, self.text.tokenizer, self.runtime, self.scoring, self.scoring.capacity)
        scores = {exam.task.name: score(exam.task, answering(exam) or (), 0) for exam in self.text.exams}
        return measured._replace(figures={**measured.figures, **figures_of(scores)})


def shares(recipe: TrainingRecipe, rows: Callable[[int, int, int], AnyBatch], runtime: Runtime) -> Microbatches:
    """This rank's microbatches. Raises RecipeError where the ranks cannot share the batch."""
    length, tokens = recipe.inputs_length, recipe.train.microbatch_tokens
    group = recipe.model.group_sequences
    microbatch = tokens and tokens // length
    place, size = runtime.data_rank, runtime.data_ranks
    return Microbatches(rows, recipe.rows_per_step, microbatch, group, place, size, length)
