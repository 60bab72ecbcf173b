"""Finetuning: the training task of `switchcli finetune` (section 4.1), and functions that all runs on tasks share."""

import hashlib
from collections.abc import Collection, Mapping

import torch

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.batch import Batch
from switchcli.data.objectives.example_packing import RowLengths
from switchcli.data.prepare.cache import default_cache
from switchcli.data.task_batches import InterleavedRows, TaskMixtureSource
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import RecipeError
from switchcli.recipe.schema import FinetuneRecipe, TaskRecipe
from switchcli.report.console import Console
from switchcli.runs import warm_start
from switchcli.runs.task_sets import digests_of, report_task_sets, report_truncation, scored_examples_of
from switchcli.runs.train_data import NUM_SAMPLES, TrainData, check_same_data
from switchcli.runs.training_task import TrainingTask
from switchcli.runs.warm_start import TrainJob
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import suites_of, tasks_of
from switchcli.tasks.task import Task
from switchcli.training.loss import packed_cross_entropy
from switchcli.training.optimizers import Optimizer
from switchcli.training.validation import HeldOutText


class Finetuning(TrainingTask):
    """Train a model from a checkpoint on a mixture of text-to-text tasks."""

    def __init__(
        self, job: TrainJob[FinetuneRecipe], folder: RunFolder, context: DistributedContext, console: Console
    ) -> None:
        self._job, self._folder, self._context, self._console = job, folder, context, console
        self.validation_loss = packed_cross_entropy
        self.update = job.recipe.update
        self.scoring = job.recipe.scoring
        self.num_metrics = num_metrics(job.recipe)

    @classmethod
    def check_recipe(cls, recipe: TaskRecipe) -> None:
        check_tasks(recipe)

    def build_data(self) -> TrainData:
        tokenizer = warm_start.start_tokenizer(self._job, self._folder)
        return build_task_data(self._job.recipe, tokenizer, self._context, self._console)

    def init_weights(self, weights: ModelWeights, optimizer: Optimizer) -> None:
        warm_start.load_start(self._job.recipe.start, self._job.start, weights, optimizer, self._console)


def check_tasks(recipe: TaskRecipe) -> None:
    """Check the tasks and their files.

    Raises:
        RecipeError: no task has a split to train on, or the package of a metric is not installed.
        DataError: files are missing.
    """
    tasks = tasks_of(recipe.tasks).values()
    reading.check_tasks(tasks, ("train", recipe.scoring.split), recipe.data.folder)
    if not any(reading.has_split(task, "train") for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise RecipeError(f"tasks: none of {names} has a split to train on: name one that has")


def num_metrics(recipe: TaskRecipe) -> int:
    """Return the number of scores of tasks and suites, plus their average and the held-out neg. log perplexity."""
    return len(tasks_of(recipe.tasks)) + len(suites_of(recipe.tasks)) + 2


def build_task_data(
    recipe: TaskRecipe, tokenizer: Tokenizer, context: DistributedContext, console: Console
) -> TrainData:
    """Return the training rows, held-out rows and scored examples of the recipe's tasks.

    Raises:
        DataError: a task's examples cannot be read, none has a label, or the ranks read different examples.
    """
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
                    console.warning,
                )
        return packed

    train_tasks = context.main_first(pack_tasks)
    packed_rows = {name: task.packed for name, task in train_tasks.items()}
    source = TaskMixtureSource(packed_rows, recipe.data.mixture, recipe.train.seed, recipe.rows_per_step)
    scored = context.main_first(lambda: scored_examples_of(tasks, recipe.data, recipe.scoring, tokenizer, needed=True))
    trained = {f"the training examples of {name}": task.identity for name, task in train_tasks.items()}
    check_same_data({**digests_of(scored, tokenizer), **trained}, context)
    if context.is_main:
        _report_training_tasks(source.rates, train_tasks, tasks, console)
        report_task_sets(tasks, scored, recipe.scoring.split, tokenizer, console)
    held_out = InterleavedRows([examples.packed for examples in scored if examples.packed.num_rows])
    return TrainData(
        tokenizer,
        hashlib.sha256("\n".join(task.identity for task in train_tasks.values()).encode()).hexdigest(),
        source,
        {"": HeldOutText(held_out.rows, min(recipe.eval.sequences, held_out.num_rows))},
        _samples(scored[0]),
        scored,
    )


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
        truncated = (
            f", {packed.num_truncated:,} of the examples longer than a row and cut" if packed.num_truncated else ""
        )
        rows = f"{packed.num_rows:,} rows, {rates[task.name]:.1%} of the training examples"
        report_truncation(
            f"{task.name}: {count:,} examples in {rows}{truncated}", packed.num_truncated / count, console
        )


def _samples(scored: tokens.ScoredExamples) -> Batch:
    """Return the shortest examples of a task, which are the last ones in the order of batches."""
    numbers = next(scored.batches(len(scored.examples)))[-NUM_SAMPLES:]
    return Batch(torch.from_numpy(scored.padded(numbers)), torch.from_numpy(scored.targets(numbers)))
