"""`switchcli finetune`: a trained model on text-to-text tasks (section 4.1)."""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from switchcli.data.batch import Batch
from switchcli.data.objectives.example_packing import Lengths
from switchcli.data.prepare.cache import default_cache
from switchcli.data.task_mixture import InTurn, TaskStream
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import Runtime
from switchcli.errors import DataError, RecipeError
from switchcli.recipe.schema import FinetuneRecipe, OnTasks
from switchcli.report.console import Console
from switchcli.runs import warm_start
from switchcli.runs.data import Text
from switchcli.runs.mesh_choice import runtime_of
from switchcli.runs.run_dir import Options, claim
from switchcli.runs.task_sets import exams_of, tell, tell_of_cut
from switchcli.runs.trainer import NUM_SAMPLES, Training, Verb
from switchcli.runs.warm_start import Starting
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import suites_of, tasks_of
from switchcli.tasks.task import Task
from switchcli.train import memory
from switchcli.train.loss import packed_cross_entropy
from switchcli.train.validation import HeldOutText


def resolved(
    name: str, overrides: Sequence[str], model: str | None, out: Path, resume: bool, warn: Callable[[str], None]
) -> Starting[FinetuneRecipe]:
    """As start.resolved.

    Raises:
        RecipeError: there is nothing to train on, besides.
        DataError: `data.folder` lacks files of tasks.
    """
    starting = warm_start.resolved(name, overrides, model, out, resume, warn, FinetuneRecipe)
    check_tasks(starting.recipe)
    return starting


def check_tasks(recipe: OnTasks) -> None:
    """Raise a RecipeError where no task can be trained on, a DataError where files lack."""
    tasks = tasks_of(recipe.tasks).values()
    reading.check_there(tasks, ("train", recipe.scoring.split), recipe.data.folder)
    if not any(reading.has(task, "train") for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise RecipeError(f"tasks: none of {names} has a split to train on: name one that has")


def finetune(finetuning: Starting[FinetuneRecipe], options: Options) -> dict[str, Any]:
    """Train what is left of the run in `options.out`; its result, also in result.json, or {} off the main rank.

    Raises:
        Interrupted: stopped by a signal, after saving.
        SwitchError: as each part says.
    """
    recipe, opened = finetuning
    runtime = runtime_of(recipe)
    console = Console(quiet=options.quiet or not runtime.is_main)
    with (
        claim(options, recipe, runtime, console) as folder,
        memory.explained(recipe.model, recipe.optimizer, runtime.device, recipe.update),
    ):
        verb = Verb(
            packed_cross_entropy,
            text=lambda: text_of(recipe, warm_start.tokenizer_of(opened, folder, runtime), runtime, console),
            begin=lambda weights, optimizer: warm_start.begin(recipe.start, opened, weights, optimizer),
            update=recipe.update,
            scoring=recipe.scoring,
            num_figures=num_figures(recipe),
        )
        result = Training(recipe, folder, runtime, console, verb).run()
        runtime.close()
    return result


def num_figures(recipe: OnTasks) -> int:
    """Of tasks, of suites; their average, and the held-out neg. log perplexity."""
    return len(tasks_of(recipe.tasks)) + len(suites_of(recipe.tasks)) + 2


def text_of(recipe: OnTasks, tokenizer: Tokenizer, runtime: Runtime, console: Console) -> Text:
    """Training rows, held-out rows and exams of the recipe's tasks. Raises DataError as each part says."""
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

    found = runtime.on_main(training) or training()  # the main rank fills the cache that the others read
    stream = TaskStream(
        {name: one.packed for name, one in found.items()}, recipe.data.mixture, recipe.train.seed, recipe.rows_per_step
    )
    exams = runtime.on_main(lambda: _exams(recipe, tasks, tokenizer)) or _exams(recipe, tasks, tokenizer)
    if runtime.is_main:
        _tell(stream.rates, found, tasks, console)
        tell(tasks, exams, recipe.scoring.split, console.message, console.warning)
    held_out = InTurn([exam.packed for exam in exams if exam.packed.num_rows])

    def check() -> None:
        for one in found.values():
            one.check()

    return Text(
        tokenizer,
        hashlib.sha256("\n".join(one.identity for one in found.values()).encode()).hexdigest(),
        stream.batch,
        {"": HeldOutText(held_out.rows, min(recipe.eval.sequences, held_out.num_rows))},
        _samples(exams[0]),
        exams,
        check=check,
    )


def _exams(recipe: OnTasks, tasks: Collection[Task], tokenizer: Tokenizer) -> tuple[tokens.Scored, ...]:
    exams = exams_of(tasks, recipe.data, recipe.scoring, tokenizer)
    if not any(exam.packed.num_rows for exam in exams):
        split = recipe.scoring.split
        raise DataError(
            f"tasks: no labelled example of {', '.join(task.name for task in tasks)} in {split}: name a task that has "
            f"some, or give {split}: to a task of your own"
        )
    return exams


def _tell(
    rates: Mapping[str, float], found: Mapping[str, tokens.Training], tasks: Collection[Task], console: Console
) -> None:
    """What is trained on."""
    for task in tasks:
        if task.name not in found:
            console.message(f"{task.name}: has no split to train on: it is scored alone")
            continue
        packed = found[task.name].packed
        count = len(packed.example_X)
        cut = f", {packed.num_cut:,} of them longer than a row and cut" if packed.num_cut else ""
        shown = f"{packed.num_rows:,} rows, {rates[task.name]:.1%} of what is shown"
        text = f"{task.name}: {count:,} examples in {shown}{cut}"
        tell_of_cut(text, packed.num_cut / count, console.message, console.warning)


def _samples(exam: tokens.Scored) -> Batch:
    numbers = next(exam.batches(len(exam.examples)))[-NUM_SAMPLES:]
    return Batch(torch.from_numpy(exam.padded(numbers)), torch.from_numpy(exam.targets(numbers)))
