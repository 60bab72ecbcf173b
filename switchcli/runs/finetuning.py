"""Finetuning: the task of `switchcli finetune`, a trained model on text-to-text tasks (section 4.1)."""

import hashlib
from collections.abc import Collection, Mapping

import torch

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.batch import Batch
from switchcli.data.objectives.example_packing import Lengths
from switchcli.data.prepare.cache import default_cache
from switchcli.data.task_mixture import InTurn, TaskStream
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import Runtime
from switchcli.distributed.layout import Weights
from switchcli.errors import RecipeError
from switchcli.recipe.schema import FinetuneRecipe, OnTasks
from switchcli.report.console import Console
from switchcli.runs import warm_start
from switchcli.runs.task_sets import exams_of, tell, tell_of_cut
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

    def __init__(self, job: TrainJob[FinetuneRecipe], folder: RunFolder, runtime: Runtime, console: Console) -> None:
        self._job, self._folder, self._runtime, self._console = job, folder, runtime, console
        self.validation_loss = packed_cross_entropy
        self.update = job.recipe.update
        self.scoring = job.recipe.scoring
        self.num_figures = num_figures(job.recipe)

    def build_data(self) -> TrainData:
        tokenizer = warm_start.tokenizer_of(self._job.start, self._folder, self._runtime)
        return data_of(self._job.recipe, tokenizer, self._runtime, self._console)

    def init_weights(self, weights: Weights, optimizer: Optimizer) -> None:
        warm_start.begin(self._job.recipe.start, self._job.start, weights, optimizer)


def check_tasks(recipe: OnTasks) -> None:
    """Raise a RecipeError where no task can be trained on, a DataError where files lack."""
    tasks = tasks_of(recipe.tasks).values()
    reading.check_there(tasks, ("train", recipe.scoring.split), recipe.data.folder)
    if not any(reading.has(task, "train") for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise RecipeError(f"tasks: none of {names} has a split to train on: name one that has")


def num_figures(recipe: OnTasks) -> int:
    """Count the scores of tasks and suites, their average, and the held-out neg. log perplexity."""
    return len(tasks_of(recipe.tasks)) + len(suites_of(recipe.tasks)) + 2


def data_of(recipe: OnTasks, tokenizer: Tokenizer, runtime: Runtime, console: Console) -> TrainData:
    """Return training rows, held-out rows and scored examples of the recipe's tasks. Raises DataError."""
    tasks = tasks_of(recipe.tasks).values()
    lengths = Lengths(recipe.inputs_length, recipe.targets_length)

    def training() -> dict[str, tokens.Training]:
        ready: dict[str, tokens.Training] = {}
        for task in tasks:
            if reading.has(task, "train"):
                ready[task.name] = tokens.training(
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

    found = runtime.main_first(training)
    stream = TaskStream(
        {name: one.packed for name, one in found.items()}, recipe.data.mixture, recipe.train.seed, recipe.rows_per_step
    )
    exams = runtime.main_first(lambda: exams_of(tasks, recipe.data, recipe.scoring, tokenizer, needed=True))
    if runtime.is_main:
        _tell(stream.rates, found, tasks, console)
        tell(tasks, exams, recipe.scoring.split, console)
    held_out = InTurn([exam.packed for exam in exams if exam.packed.num_rows])
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
    rates: Mapping[str, float], found: Mapping[str, tokens.Training], tasks: Collection[Task], console: Console
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
        tell_of_cut(text, packed.num_cut / count, console)


def _samples(exam: tokens.Scored) -> Batch:
    numbers = next(exam.batches(len(exam.examples)))[-NUM_SAMPLES:]
    return Batch(torch.from_numpy(exam.padded(numbers)), torch.from_numpy(exam.targets(numbers)))
