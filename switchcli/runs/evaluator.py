"""Evaluator: measure a loaded model's task scores, neg. log perplexity and routing health."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from switchcli.data.config import DataSpec, TextsSpec
from switchcli.data.objectives.denoisers import TextObjective
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.pipeline import PreparedTexts
from switchcli.data.task_batches import InterleavedRows
from switchcli.distributed.context import DistributedContext
from switchcli.errors import DataError, RecipeError
from switchcli.metric_names import AUXILIARY_LOSS
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import EvalRecipe, TaskRecipe, TextRecipe
from switchcli.report.console import Console, silent
from switchcli.runs import text_sets
from switchcli.runs.loading import LoadedModel
from switchcli.runs.pretraining import text_loss
from switchcli.runs.score_tables import task_results
from switchcli.runs.task_sets import digests_of, report_task_sets, scored_examples_of
from switchcli.runs.train_data import check_same_data
from switchcli.tasks import tokens
from switchcli.tasks.config import tasks_of
from switchcli.tasks.scores import Scores, score
from switchcli.tasks.task import AnsweredExample
from switchcli.training import router_health
from switchcli.training.loss import Objective, cross_entropy, packed_cross_entropy
from switchcli.training.metrics import Metrics, merge
from switchcli.training.scoring import TaskPredictor
from switchcli.training.validation import HeldOutText, evaluate_rows

BATCH_ROWS = 16
"""Minimum rows of a batch for the cross-entropy. They are rounded up to whole routing groups."""
TEXT_KEYS = tuple(TextsSpec.model_fields)


class HeldOutResult(NamedTuple):
    """Neg. log perplexity and routing health of a model."""

    tasks: dict[str, dict[str, Any]]
    """Metrics on the targets of each task, by task."""
    text: dict[str, Any] | None
    """Metrics on all held-out text together. None if there is none."""
    texts: dict[str, dict[str, Any]]
    """Metrics of each text, by language or corpus. Empty for a single text."""

    def by_name(self) -> dict[str, dict[str, Any]]:
        """Return the metrics of each text and task. A single text has the name `text`."""
        if self.texts:
            return {**self.texts, **self.tasks}
        return {**({"text": self.text} if self.text else {}), **self.tasks}


class EvalPass(NamedTuple):
    """All results under one pair of capacity policies."""

    capacity: dict[str, Policy]
    """The policies for `text` and for `tasks`."""
    scores: dict[str, Scores]
    held_out: HeldOutResult
    answers: dict[str, tuple[AnsweredExample, ...]]
    """The answered examples of each task."""

    def to_json(self) -> dict[str, Any]:
        """Return everything except the answers."""
        held_out = {"held_out": self.held_out.tasks, "text": self.held_out.text, "texts": self.held_out.texts}
        return {"capacity": self.capacity, **task_results(self.scores), **held_out}


def labeled_rows(examples: tokens.ScoredExamples) -> HeldOutText:
    """Return the labeled examples of a task, packed into rows, as a text to measure the cross-entropy on."""
    return HeldOutText(InterleavedRows([examples.packed]).rows, examples.packed.num_rows)


class Evaluator:
    """A loaded model, with the texts and tasks to measure it on."""

    def __init__(self, model: LoadedModel, recipe: EvalRecipe, context: DistributedContext, console: Console) -> None:
        self._model, self._recipe, self._context, self._console = model, recipe, context, console
        self.tasks = tasks_of(recipe.tasks)
        trained_on = tasks_of(model.recipe.tasks) if isinstance(model.recipe, TaskRecipe) else {}
        self._warn_about_new_tasks([name for name in self.tasks if name not in trained_on])
        self.scored = context.main_first(
            lambda: scored_examples_of(self.tasks.values(), recipe.data, recipe.scoring, model.tokenizer)
        )
        check_same_data(digests_of(self.scored, model.tokenizer), context)
        self._objective: Objective = cross_entropy
        self._prepared: PreparedTexts | None = None
        self._texts = self._held_out_texts()
        if context.is_main:
            report_task_sets(self.tasks.values(), self.scored, recipe.scoring.split, model.tokenizer, console)

    def training_identity(self) -> str | None:
        """Return the digest of training rows made of this text as the model's were, "" if none can be made.

        None if the recipe names other text than that of the model's own recipe.
        """
        trained, text = self._model.recipe, self._recipe.text
        if self._prepared is None or not isinstance(trained, TextRecipe):
            return None
        if any(getattr(trained.data, key) != getattr(text, key) for key in TEXT_KEYS):
            return None
        try:
            return text_sets.training_identity(trained, self._prepared, silent())
        except (DataError, RecipeError):  # no such rows can be made of this text
            return ""

    def capacities(self) -> list[tuple[Policy, Policy]]:
        """Return the pairs of capacity policies to measure with: one for text, and one for tasks."""
        if self._recipe.capacities is not None:
            return [(capacity, capacity) for capacity in self._recipe.capacities]
        return [(self._model.recipe.eval.capacity, self._recipe.scoring.capacity)]

    def texts_to_measure(self) -> dict[str, tuple[HeldOutText, bool]]:
        """Return the rows of each text and task by name, and whether they are packed."""
        is_packed = self._objective is packed_cross_entropy
        texts = {label or "text": (text, is_packed) for label, text in self._texts.items()}
        for examples in self._labeled():
            texts[examples.task.name] = (labeled_rows(examples), True)
        return texts

    def evaluate(self, text: Policy, tasks: Policy) -> EvalPass:
        """Measure everything, with `text` and `tasks` as the capacity policies of the routers. Collective."""
        model, scoring = self._model, self._recipe.scoring
        predictor = TaskPredictor(model.model, model.tokenizer, self._context, scoring, tasks)
        answers = predictor.answer_all(self.scored, self._console)
        scores = {name: score(self.tasks[name], answered, scoring.draws) for name, answered in answers.items()}
        held_out = self.held_out(model.model, text)
        return EvalPass({"text": text, "tasks": tasks}, scores, held_out, answers)

    def held_out(self, model: SwitchTransformer, capacity: Policy) -> HeldOutResult:
        """Return neg. log perplexity and routing health of `model`, which may differ from the loaded one. Collective.

        A pruned model, for example, is measured on the data of the original one.
        """
        tasks = {}
        for examples in self._labeled():
            metrics = self._measure(model, labeled_rows(examples), packed_cross_entropy, capacity)
            tasks[examples.task.name] = _record(model, metrics, examples.packed.num_rows)
        if not self._texts:
            return HeldOutResult(tasks, None, {})
        measured = {label: self._measure(model, text, self._objective, capacity) for label, text in self._texts.items()}
        num_rows = sum(text.num_rows for text in self._texts.values())
        together = _record(model, functools.reduce(merge, measured.values()), num_rows)
        if len(measured) == 1:
            (text,), (metrics,) = self._texts.values(), measured.values()
            return HeldOutResult(tasks, {**together, **text.metrics(metrics)}, {})
        texts = {}
        for label, text in self._texts.items():
            texts[label] = {**_record(model, measured[label], text.num_rows), **text.metrics(measured[label])}
        return HeldOutResult(tasks, together, texts)

    def _labeled(self) -> Iterator[tokens.ScoredExamples]:
        """Yield the examples of each task that has labels to measure the cross-entropy on."""
        return (examples for examples in self.scored if examples.packed.num_rows)

    def _measure(self, model: SwitchTransformer, text: HeldOutText, objective: Objective, capacity: Policy) -> Metrics:
        return evaluate_rows(model, objective, text, BATCH_ROWS, self._context, capacity)

    def _held_out_texts(self) -> dict[str, HeldOutText]:
        """Return the held-out rows of the recipe's text, corrupted and packed as in the training of the model."""
        trained, text = self._model.recipe, self._recipe.text
        if text is None:
            return {}
        length = self._recipe.data.inputs_length
        objective: TextObjective = SpanCorruption(inputs_length=length)
        packing: dict[str, Any] = {}
        # A converted checkpoint has a recipe too, with the default objective.
        if isinstance(trained, TextRecipe):
            objective, packing = trained.data.objective, {"packing": trained.data.packing}
            if length != objective.inputs_length:
                objective = _with_length(objective, length)
        data = DataSpec(**{key: getattr(text, key) for key in TEXT_KEYS}, objective=objective, **packing)
        self._objective = text_loss(data)

        self._prepared = self._context.main_first(
            lambda: text_sets.prepare_texts(data, text.sequences, self._console, self._model.tokenizer)
        )
        check_same_data(self._prepared.digests(), self._context)
        return text_sets.held_out_rows(self._prepared, data.rows, text.sequences)

    def _warn_about_new_tasks(self, names: Sequence[str]) -> None:
        """Print a warning on the main rank if the model was not trained on the tasks of these names."""
        if not names or not self._context.is_main:
            return
        verb = self._model.recipe.verb
        training = "was pre-trained alone" if verb == "pretrain" else f"was not trained on {', '.join(names)}"
        self._console.warning(
            f"{self._model.path} {training}: it does not know the form of the answers, and its scores will be near 0; "
            "`switchcli finetune` teaches it"
        )


def _with_length(objective: TextObjective, inputs_length: int) -> TextObjective:
    """Return the objective with rows of another length. Raises RecipeError if it does not allow that length."""
    try:
        return type(objective).model_validate({**objective.model_dump(), "inputs_length": inputs_length})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(
            f"data.inputs_length ({inputs_length}) does not suit the objective of the checkpoint's run ({reason}): "
            f"leave it out for rows of {objective.inputs_length} tokens"
        ) from None


def _record(model: SwitchTransformer, metrics: Metrics, num_rows: int) -> dict[str, Any]:
    """Return neg. log perplexity and routing health as JSON, without the auxiliary loss, which only training has."""
    record = router_health.record(metrics, model.spec.sparse_layer_names())
    record.pop(AUXILIARY_LOSS, None)
    return {"sequences": num_rows, **record}
