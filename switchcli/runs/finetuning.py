"""Finetuning: the task of `switchcli finetune`, a trained model on text-to-text tasks (section 4.1)."""

import hashlib
from collections.abc import Collection, Mapping

import torch

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.batch import Batch
from switchcli.data.objectives.example_packing import RowLengths
from switchcli.data.prepare.cache import default_cache
from switchcli.data.task_mixture import InterleavedRows, TaskMixtureSource
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import RecipeError
from switchcli.recipe.schema import FinetuneRecipe, TaskRecipe
from switchcli.report.console import Console
from switchcli.runs import warm_start
from switchcli.runs.task_sets import report_task_sets, report_truncation, scored_examples_of
from switchcli.runs.train_data import NUM_SAMPLES, TrainData
from switchcli.runs.training_task import TrainingTask
from switchcli.runs.warm_start import TrainJob
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import suites_of, tasks_of
from switchcli.tasks.task import Task
from switchcli.train.loss import packed_cross_entropy
from switchcli.train.optimizers import Optimizer
from switchcli.train.validation import HeldOutText


class Finetuning(TrainingTask):
    """Train a model that is there on a mixture of tasks."""

    def __init__(
        self, job: TrainJob[FinetuneRecipe], folder: RunFolder, context: DistributedContext, console: Console
    ) -> None:
        self._job, self._folder, self._context, self._console = job, folder, context, console
        self.validation_loss = packed_cross_entropy
        self.update = job.recipe.update
        self.scoring = job.recipe.scoring
        self.num_figures = num_figures(job.recipe)

    def build_data(self) -> TrainData:
        tokenizer = warm_start.start_tokenizer(self._job.start, self._folder, self._context)
        return build_task_data(self._job.recipe, tokenizer, self._context, self._console)

    def init_weights(self, weights: ModelWeights, optimizer: Optimizer) -> None:
        warm_start.load_start(self._job.recipe.start, self._job.start, weights, optimizer)


def check_tasks(recipe: TaskRecipe) -> None:
    """Raise a RecipeError where no task can be trained on, a DataError where files lack."""
    tasks = tasks_of(recipe.tasks).values()
    reading.check_files(tasks, ("train", recipe.scoring.split), recipe.data.folder)
    if not any(reading.has_split(task, "train") for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise RecipeError(f"tasks: none of {names} has a split to train on: name one that has")


def num_figures(recipe: TaskRecipe) -> int:
    """Count the scores of tasks and suites, their average, and the held-out neg. log perplexity."""
    return len(tasks_of(recipe.tasks)) + len(suites_of(recipe.tasks)) + 2


def build_task_data(
    recipe: TaskRecipe, tokenizer: Tokenizer, context: DistributedContext, console: Console
) -> TrainData:
    """Return training rows, held-out rows and scored examples of the recipe's tasks. Raises DataError."""
    tasks = tasks_of(recipe.tasks).values()
    lengths = RowLengths(recipe.inputs_length, recipe.targets_length)

    def training() -> dict[str, tokens.PackedTask]:
        ready: dict[str, tokens.PackedTask] = {}
        for task in tasks:
            if reading.has_split(task, "train"):
                ready[task.name] = tokens.packed_task(
                    task,
                    recipe.data.folder,
                    tokenizer,
                    lengths,
                    recipe.train.seed,
                    default_cache(),
                    console.track,
                    console.warning,
                    before=sum(one.num_bytes for one in ready.values()),
                )
        return ready

    found = context.main_first(training)
    stream = TaskMixtureSource(
        {name: one.packed for name, one in found.items()}, recipe.data.mixture, recipe.train.seed, recipe.rows_per_step
    )
    exams = context.main_first(lambda: scored_examples_of(tasks, recipe.data, recipe.scoring, tokenizer, needed=True))
    if context.is_main:
        _tell(stream.rates, found, tasks, console)
        report_task_sets(tasks, exams, recipe.scoring.split, console)
    held_out = InterleavedRows([exam.packed for exam in exams if exam.packed.num_rows])
    return TrainData(
        tokenizer,
        hashlib.sha256("\n".join(one.identity for one in found.values()).encode()).hexdigest(),
        stream,
        {"": HeldOutText(held_out.rows, min(recipe.eval.sequences, held_out.num_rows))},
        _samples(exams[0]),
        exams,
        checked=tuple(found.values()),
    )


def _tell(
    rates: Mapping[str, float], found: Mapping[str, tokens.PackedTask], tasks: Collection[Task], console: Console
) -> None:
    """Print what is trained on."""
    for task in tasks:
        if task.name not in found:
            console.message(f"{task.name}: has no split to train on: it is scored alone")
            continue
        packed = found[task.name].packed
        count = len(packed.example_X)
        cut = f", {packed.num_cut:,} of them longer than a row and cut" if packed.num_cut else ""
        shown = f"{packed.num_rows:,} rows, {rates[task.name]:.1%} of what is shown"
        text = f"{task.name}: {count:,} examples in {shown}{cut}"
        report_truncation(text, packed.num_cut / count, console)


def _samples(exam: tokens.ScoredExamples) -> Batch:
    numbers = next(exam.batches(len(exam.examples)))[-NUM_SAMPLES:]
    return Batch(torch.from_numpy(exam.padded(numbers)), torch.from_numpy(exam.targets(numbers)))
