"""Evaluator: a loaded model and what it is measured on: scores of tasks, neg. log perplexity, routing health."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from switchcli.data.config import DataSpec, TextsSpec
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.pipeline import PreparedTexts
from switchcli.data.task_mixture import InterleavedRows
from switchcli.distributed.context import DistributedContext
from switchcli.metric_names import AUXILIARY_LOSS
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import EvalRecipe, TaskRecipe, TextRecipe
from switchcli.report.console import Console
from switchcli.runs import text_sets
from switchcli.runs.loading import LoadedModel
from switchcli.runs.pretraining import text_loss
from switchcli.runs.score_tables import task_results
from switchcli.runs.task_sets import report_task_sets, scored_examples_of
from switchcli.tasks import tokens
from switchcli.tasks.config import tasks_of
from switchcli.tasks.scores import Scores, score
from switchcli.tasks.task import AnsweredExample
from switchcli.train import router_health
from switchcli.train.loss import Objective, cross_entropy, packed_cross_entropy
from switchcli.train.metrics import Metrics, merge
from switchcli.train.scoring import TaskPredictor
from switchcli.train.validation import HeldOutText, evaluate_rows

ROWS_EACH = 16
"""Rows of a batch for the cross-entropy, at least."""
TEXT_KEYS = tuple(TextsSpec.model_fields)


class HeldOutResult(NamedTuple):
    """Neg. log perplexity and routing health."""

    tasks: dict[str, dict[str, Any]]
    """By task, on its targets."""
    text: dict[str, Any] | None
    texts: dict[str, dict[str, Any]]
    """By language, or by corpus without one, where there are several texts."""

    def named(self) -> dict[str, dict[str, Any]]:
        """Return each text and task once, by name."""
        return {**(self.texts or ({"text": self.text} if self.text else {})), **self.tasks}


class EvalPass(NamedTuple):
    """All figures under one way to count capacity."""

    capacity: dict[str, Policy]
    """For `text` and `tasks`."""
    scores: dict[str, Scores]
    held_out: HeldOutResult
    answers: dict[str, tuple[AnsweredExample, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return all but the answers."""
        figures = {"held_out": self.held_out.tasks, "text": self.held_out.text, "texts": self.held_out.texts}
        return {"capacity": self.capacity, **task_results(self.scores), **figures}


def example_texts(exam: tokens.ScoredExamples) -> HeldOutText:
    """Return the labelled examples of a task as text."""
    return HeldOutText(InterleavedRows([exam.packed]).rows, exam.packed.num_rows)


class Evaluator:
    """A loaded model with what it is measured on."""

    def __init__(self, loaded: LoadedModel, recipe: EvalRecipe, context: DistributedContext, console: Console) -> None:
        self._loaded, self._recipe, self._context, self._console = loaded, recipe, context, console
        own = loaded.recipe
        self.tasks = tasks_of(recipe.tasks)
        learned = tasks_of(own.tasks) if isinstance(own, TaskRecipe) else {}
        self._never_seen([name for name in self.tasks if name not in learned])
        self.scored = context.main_first(
            lambda: scored_examples_of(self.tasks.values(), recipe.data, recipe.scoring, loaded.tokenizer)
        )
        self._objective: Objective = cross_entropy
        self._prepared: PreparedTexts | None = None
        self._texts = self._held_out_texts()
        if context.is_main:
            report_task_sets(self.tasks.values(), self.scored, recipe.scoring.split, console)

    def check(self) -> None:
        """Raise DataError if text that the model was measured on is not what was prepared."""
        if self._prepared is not None:
            self._prepared.check()

    def capacities(self) -> list[tuple[Policy, Policy]]:
        """Return each pair of policies to measure under: for text, and for tasks."""
        if self._recipe.capacities is not None:
            return [(capacity, capacity) for capacity in self._recipe.capacities]
        return [(self._loaded.recipe.eval.capacity, self._recipe.scoring.capacity)]

    def rows(self) -> dict[str, tuple[HeldOutText, bool]]:
        """Return what the model is measured on, by name, and whether its rows are packed."""
        packed = self._objective is packed_cross_entropy
        held_out = {label or "text": (text, packed) for label, text in self._texts.items()}
        return held_out | {exam.task.name: (example_texts(exam), True) for exam in self.scored if exam.packed.num_rows}

    def evaluate(self, text: Policy, tasks: Policy) -> EvalPass:
        """Measure everything with the routers counting capacity by `text` and `tasks`."""
        loaded, recipe = self._loaded, self._recipe
        predictor = TaskPredictor(loaded.model, loaded.tokenizer, self._context, recipe.scoring, tasks)
        tracked = self._console.track(self.scored, "answering", len(self.scored))
        answered = {exam.task.name: predictor(exam) for exam in tracked}
        scores = {name: score(self.tasks[name], found, recipe.scoring.draws) for name, found in answered.items()}
        held_out = self.held_out(loaded.model, text)
        return EvalPass({"text": text, "tasks": tasks}, scores, held_out, answered)

    def held_out(self, model: SwitchTransformer, capacity: Policy) -> HeldOutResult:
        """Neg. log perplexity and routing health of `model`, which may be another than the one loaded."""
        tasks = {
            exam.task.name: self._figures(
                model, self._rows(model, example_texts(exam), packed_cross_entropy, capacity), exam.packed.num_rows
            )
            for exam in self.scored
            if exam.packed.num_rows
        }
        found = {label: self._rows(model, text, self._objective, capacity) for label, text in self._texts.items()}
        if not found:
            return HeldOutResult(tasks, None, {})
        sequences = sum(text.num_rows for text in self._texts.values())
        all_of_it = self._figures(model, functools.reduce(merge, found.values()), sequences)
        if len(found) == 1:
            (text,), (metrics,) = self._texts.values(), found.values()
            return HeldOutResult(tasks, {**all_of_it, **text.metrics(metrics)}, {})
        each = {
            label: {**self._figures(model, found[label], text.num_rows), **text.metrics(found[label])}
            for label, text in self._texts.items()
        }
        return HeldOutResult(tasks, all_of_it, each)

    def _rows(self, model: SwitchTransformer, text: HeldOutText, objective: Objective, capacity: Policy) -> Metrics:
        return evaluate_rows(model, objective, text, ROWS_EACH, self._context, capacity)

    def _figures(self, model: SwitchTransformer, metrics: Metrics, num_rows: int) -> dict[str, Any]:
        """Neg. log perplexity and routing health over so many rows."""
        figures = router_health.record(metrics, model.spec.sparse_layer_names())
        figures.pop(AUXILIARY_LOSS, None)  # of training alone
        return {"sequences": num_rows, **figures}

    def _held_out_texts(self) -> dict[str, HeldOutText]:
        """Rows of text as the model was trained on, where there is some to look at."""
        own, text = self._loaded.recipe, self._recipe.text
        if text is None:
            return {}
        objective = SpanCorruption(inputs_length=own.inputs_length)
        data = DataSpec(**{key: getattr(text, key) for key in TEXT_KEYS}, objective=objective)
        if isinstance(own, TextRecipe):
            data = data.model_copy(update={"objective": own.data.objective, "packing": own.data.packing})
        self._objective = text_loss(data)

        self._prepared = self._context.main_first(
            lambda: text_sets.prepare_texts(data, text.sequences, self._console, self._loaded.tokenizer)
        )
        return text_sets.held_out_rows(self._prepared, data.rows, text.sequences)

    def _never_seen(self, names: Sequence[str]) -> None:
        if not names or not self._context.is_main:
            return
        verb = self._loaded.recipe.verb
        raw = "was pre-trained alone" if verb == "pretrain" else f"was not trained on {', '.join(names)}"
        self._console.warning(
            f"{self._loaded.path} {raw}: it does not know the form of the answers, and its scores will be near 0; "
            "`switchcli finetune` teaches it"
        )
