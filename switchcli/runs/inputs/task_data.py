"""The data of a run on text-to-text tasks (section 4.1), and the examples that a model is scored on."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from switchcli.data.batch import Batch
from switchcli.data.objectives.example_packing import RowLengths
from switchcli.data.prepare.cache import default_cache
from switchcli.data.prepare.store import digest_of_lines
from switchcli.data.task_batches import InterleavedRows, TaskMixtureSource
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.errors import DataError, RecipeError
from switchcli.recipe.schema import TaskRecipe
from switchcli.runs.inputs.train_data import NUM_SAMPLES, RunData, TrainData, check_same_data, warn_of_unknown
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import TaskDataSpec, suites_of, tasks_of
from switchcli.tasks.task import Task
from switchcli.terminal.console import Console
from switchcli.training.config import ScoringSpec
from switchcli.training.loss import Objective, packed_cross_entropy
from switchcli.training.validation import HeldOutText

OVERLAP_LIMIT = 0.02
"""The fraction of inputs to score that are trained on as well above which there is a warning. CoLA has 0.015."""
TRUNCATION_LIMIT = 0.1
"""The fraction of truncated examples above which the rows are too short for the task."""


def scored_examples_of(
    tasks: Collection[Task], data: TaskDataSpec, scoring: ScoringSpec, tokenizer: Tokenizer, needed: bool = False
) -> tuple[tokens.ScoredExamples, ...]:
    """Return the examples to score of each task that has the split to score on.

    Raises:
        DataError: as `tokens.scored_examples` says. With `needed`, also if no example has a label.
    """
    lengths = RowLengths(data.inputs_length, data.targets_length)
    scored = tuple(
        tokens.scored_examples(task, scoring.split, data.folder, tokenizer, lengths, scoring.examples)
        for task in tasks
        if reading.has_split(task, scoring.split)
    )
    # Only examples with a label are packed into rows.
    if needed and not any(examples.packed.num_rows for examples in scored):
        raise DataError(
            f"tasks: no labeled example of {', '.join(task.name for task in tasks)} in {scoring.split}: name a task "
            f"that has some, or give {scoring.split}: to a task of your own"
        )
    return scored


def digests_of(scored: Sequence[tokens.ScoredExamples], tokenizer: Tokenizer) -> dict[str, str]:
    """Return digests of the tokenizer and of the examples of each task to score, by what they are of."""
    digests = {
        f"the examples of {examples.task.name} to score": digest_of_lines(map(repr, examples.examples))
        for examples in scored
    }
    return {"the tokenizer": tokenizer.sha256, **digests}


def report_task_sets(
    tasks: Collection[Task],
    scored: Sequence[tokens.ScoredExamples],
    split: str,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    """Print how many examples of each task are scored and truncated, and which tasks are not scored.

    Warns of inputs with many characters that the tokenizer does not know.
    """
    by_name = {examples.task.name: examples for examples in scored}
    for task in tasks:
        if task.name not in by_name:
            console.warning(f"{task.name}: has no {split} split: it is not scored")
            continue
        examples = by_name[task.name]
        count, num_truncated = len(examples.examples), examples.num_truncated
        unlabeled = sum(not example.targets for example in examples.examples)
        without = f", {unlabeled:,} more without a right answer" if unlabeled else ""
        message = f"{task.name}: {count - unlabeled:,} examples to score{without}"
        limit = f"data.inputs_length={examples.packed.lengths.inputs}"
        report_truncation(message, num_truncated, count, limit, console)
        if lacking := [label for label in task.labels if tokenizer.unknown in tokenizer.encode(label)]:
            console.warning(
                f"{task.name}: the model's vocabulary lacks characters of its labels ({', '.join(lacking[:4])}"
                f"{', ...' if len(lacking) > 4 else ''}), so that it cannot answer with them: take other labels, or a "
                "vocabulary with byte_fallback"
            )
        warn_of_unknown(f"inputs of {task.name}", examples.inputs.fraction_of(tokenizer.unknown), console)
        if not task.labels:
            warn_of_unknown(f"answers of {task.name}", examples.answers.fraction_of(tokenizer.unknown), console)


def report_truncation(text: str, truncated: int, count: int, limit: str, console: Console) -> None:
    """Print the text and how many of the examples are truncated: a warning above `TRUNCATION_LIMIT` of them."""
    if truncated:
        text += f"; {truncated:,} ({truncated / count:.0%}) are longer than {limit} and truncated"
    if truncated > TRUNCATION_LIMIT * count:
        console.warning(f"{text}: raise it if the model needs the rest")
    else:
        console.message(text)


class TaskRunData(RunData):
    """Rows of the examples of tasks, and examples to score."""

    objective: Objective = staticmethod(packed_cross_entropy)

    def __init__(self, recipe: TaskRecipe, context: DistributedContext, console: Console) -> None:
        super().__init__(recipe, context, console)
        self.scoring = recipe.scoring
        # A score of each task and suite, their average, and the held-out neg. log perplexity.
        self.num_metrics = len(tasks_of(recipe.tasks)) + len(suites_of(recipe.tasks)) + 2

    @classmethod
    def check(cls, recipe: Any) -> None:
        tasks = tasks_of(recipe.tasks).values()
        reading.check_tasks(tasks, ("train", recipe.scoring.split), recipe.data.folder)
        if not any(reading.has_split(task, "train") for task in tasks):
            names = ", ".join(task.name for task in tasks)
            raise RecipeError(f"tasks: none of {names} has a split to train on: name one that has")

    @classmethod
    def open_inputs(cls, recipe: Any, tokenizer: Tokenizer | None) -> float | None:
        for task in tasks_of(recipe.tasks).values():
            for split in ("train", recipe.scoring.split):
                if reading.has_split(task, split):
                    reading.check_readable(task, split, recipe.data.folder)
        return None

    def build(self, tokenizer: Tokenizer | None) -> TrainData:
        assert tokenizer is not None, "that of the checkpoint that the run starts from"
        recipe, context, console = self._recipe, self._context, self._console
        tasks = tasks_of(recipe.tasks).values()
        lengths = RowLengths(recipe.inputs_length, recipe.targets_length)
        console.message(f"reading tasks: {', '.join(task.name for task in tasks)}")

        def pack_tasks() -> dict[str, tokens.PackedTask]:
            packed: dict[str, tokens.PackedTask] = {}
            for task in tasks:
                if reading.has_split(task, "train"):
                    packed[task.name] = tokens.packed_task(
                        task,
                        recipe.data.folder,
                        tokenizer,
                        lengths,
                        recipe.train.seed,
                        default_cache(),
                        console.track,
                    )
            return packed

        train_tasks = context.main_first(pack_tasks)
        packed_rows = {name: task.packed for name, task in train_tasks.items()}
        source = TaskMixtureSource(packed_rows, recipe.data.mixture, recipe.train.seed, recipe.rows_per_step)
        scored = context.main_first(
            lambda: scored_examples_of(tasks, recipe.data, recipe.scoring, tokenizer, needed=True)
        )
        trained = {f"the training examples of {name}": task.identity for name, task in train_tasks.items()}
        check_same_data({**digests_of(scored, tokenizer), **trained}, context)
        if context.is_main:
            _report_training_tasks(source.rates, train_tasks, tasks, console)
            report_task_sets(tasks, scored, recipe.scoring.split, tokenizer, console)
            _warn_of_trained_inputs(train_tasks, scored, console)
        rows = InterleavedRows([examples.packed for examples in scored if examples.packed.num_rows])
        num_rows = min(recipe.eval.sequences, rows.num_rows)
        held_out = {"": HeldOutText(rows.rows, num_rows, objective=packed_cross_entropy)}
        identity = hashlib.sha256("\n".join(task.identity for task in train_tasks.values()).encode()).hexdigest()
        evaluator = self._evaluator(tokenizer, held_out, scored)
        return TrainData(identity, source, evaluator, _samples(scored[0]))


def _report_training_tasks(
    rates: Mapping[str, float], train_tasks: Mapping[str, tokens.PackedTask], tasks: Collection[Task], console: Console
) -> None:
    """Print the examples, rows, share and truncation of each task that is trained on."""
    for task in tasks:
        if task.name not in train_tasks:
            console.message(f"{task.name}: has no split to train on: it is only scored")
            continue
        packed = train_tasks[task.name].packed
        count = len(packed.example_X)
        text = f"{task.name}: {count:,} training examples packed into {packed.num_rows:,} rows"
        if len(train_tasks) > 1:
            text += f", {rates[task.name]:.1%} of all"
        limit = f"data.inputs_length={packed.lengths.inputs} or data.targets_length={packed.lengths.targets}"
        report_truncation(text, packed.num_truncated, count, limit, console)


def _warn_of_trained_inputs(
    train_tasks: Mapping[str, tokens.PackedTask], scored: Collection[tokens.ScoredExamples], console: Console
) -> None:
    """Print a warning for each task with more than `OVERLAP_LIMIT` of its inputs to score among the training inputs."""
    trained = {hash(ids) for task in train_tasks.values() for ids in task.packed.inputs.documents()}
    for examples in scored:
        count = sum(hash(ids) in trained for ids in examples.inputs.documents())
        if count > OVERLAP_LIMIT * len(examples.examples):
            console.warning(
                f"{examples.task.name}: {count:,} of its {len(examples.examples):,} inputs to score are trained on as "
                "well, so that its score says little of new inputs: take them out of one of the splits"
            )


def _samples(scored: tokens.ScoredExamples) -> Batch:
    """Return the shortest examples of a task, which are the last ones in the order of batches."""
    numbers = next(scored.batches(len(scored.examples)))[-NUM_SAMPLES:]
    return Batch(torch.from_numpy(scored.padded_inputs(numbers)), torch.from_numpy(scored.targets(numbers)))
