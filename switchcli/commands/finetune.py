"""`switchcli finetune`: a trained model on text-to-text tasks (section 4.1)."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from switchcli.commands.exams import exams_of, tell, tell_of_cut
from switchcli.commands.load import Opened, documents, open_model, saved_recipe
from switchcli.commands.run import Options, claim
from switchcli.commands.training import NUM_SAMPLES, Text, Training, Verb
from switchcli.data.batch import Batch
from switchcli.data.mixture import InTurn, TaskStream
from switchcli.data.packing import Lengths
from switchcli.data.prepare import default_cache
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import CheckpointError, DataError, RecipeError
from switchcli.model.spec import ModelSpec
from switchcli.model.transformer import SwitchTransformer
from switchcli.parallel.runtime import Runtime
from switchcli.recipe import resolve
from switchcli.recipe.compare import differences
from switchcli.recipe.schema import FinetuneRecipe
from switchcli.recipe.text import Node
from switchcli.report.console import Console
from switchcli.tasks import reading, tokens
from switchcli.tasks.spec import suites_of, tasks_of
from switchcli.tasks.task import Task
from switchcli.train import checkpoint, memory
from switchcli.train.objective import packed_cross_entropy
from switchcli.train.optimizer import Optimizer
from switchcli.train.run_folder import RunFolder
from switchcli.train.saver import carry_over, fill

START = "start.checkpoint"
NEW = ("size", "dropout", "expert_dropout", "router", "decoder_router", "balance_reduction", "init_scale")
"""Keys of `model` that a fine-tuning may set anew: the weights are the same whatever they say."""


class Finetuning(NamedTuple):
    """What a command line comes to."""

    recipe: FinetuneRecipe
    start: Opened | None
    """None: the run in the folder has begun, and goes on with its own checkpoints."""


def resolved(
    name: str, overrides: Sequence[str], model: str | None, out: Path, resume: bool, warn: Callable[[str], None]
) -> Finetuning:
    """The recipe with what the checkpoint that it starts from says of the model.

    A run that has begun keeps its start, even if the folder that `model` names has newer checkpoints by now.

    Raises:
        RecipeError: no checkpoint to start from is named, the recipe would change the shape of its weights, or there is
            nothing to train on.
        CheckpointError: there is no such checkpoint, or no optimizer state in it to carry over.
        DataError: `data.folder` lacks files of tasks.
    """
    tree = resolve.load(name, overrides)
    said = model or resolve.stated(tree, START)
    if not isinstance(said, str):
        raise RecipeError(f"{START}: missing: name the model to fine-tune by --model CHECKPOINT")
    begun = _begun(out, said) if resume else None
    if begun is not None:
        spec, path, start = begun.model, begun.start.checkpoint, None
    else:
        start = _start(said, None if model else tree, warn)
        spec, path = start.recipe.model, str(start.path)
        if start.path.resolve().is_relative_to(out.resolve()):
            raise RecipeError(f"{START} ({path}): lies within the run's own folder {out}: give another folder by --out")
    below = resolve.layer({"model": spec.model_dump(mode="json")}, f"the checkpoint {path}")
    tree = resolve.load(name, [*overrides, f"{START}={json.dumps(path)}"], below)
    recipe = resolve.validate(tree, FinetuneRecipe)
    _check_shape(spec, recipe.model, path)
    tasks = tasks_of(recipe.tasks).values()
    reading.check_there(tasks, ("train", recipe.scoring.split), recipe.data.folder)
    if not any(reading.has(task, "train") for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise RecipeError(f"tasks: none of {names} has a split to train on: name one that has")
    if start is not None and start.own is None and recipe.start.optimizer == "carry":
        raise CheckpointError(
            f"{path}: holds no optimizer state to carry over: start.optimizer=reset begins with a new one"
        )
    return Finetuning(recipe, start)


def finetune(finetuning: Finetuning, options: Options) -> dict[str, Any]:
    """Train what is left of the run in `options.out`; its result, also in result.json, or {} off the main rank.

    Raises:
        Interrupted: stopped by a signal, after saving.
        SwitchError: as each part says.
    """
    recipe, start = finetuning
    runtime = Runtime(recipe.train.device, recipe.train.precision)
    console = Console(quiet=options.quiet or not runtime.is_main)
    with (
        claim(options, recipe, runtime, console) as folder,
        memory.explained(recipe.model, recipe.optimizer, runtime.device, recipe.update),
    ):
        verb = Verb(
            packed_cross_entropy,
            text=lambda: _text(recipe, start, folder, runtime, console),
            begin=lambda model, optimizer: _begin(recipe, start, model, optimizer),
            update=recipe.update,
            scoring=recipe.scoring,
            # Of tasks, of suites; their average, and the held-out neg. log perplexity.
            num_figures=len(tasks_of(recipe.tasks)) + len(suites_of(recipe.tasks)) + 2,
        )
        result = Training(recipe, folder, runtime, console, verb).run()
        runtime.close()
    return result


def _start(said: str, tree: Node | None, warn: Callable[[str], None]) -> Opened:
    """The checkpoint to start from; `tree` is the recipe that names it, if the command line does not."""
    try:
        return open_model(Path(said), warn)
    except CheckpointError as error:
        if tree is None:
            raise
        raise CheckpointError(f"{START} of the recipe: {error}; or name another by --model CHECKPOINT") from error


def _begun(out: Path, said: str) -> FinetuneRecipe | None:
    """The recipe of the run in `out`, if it has saved something and `said` names what it started from."""
    found = checkpoint.find(out / "checkpoints", warn=lambda damage: None)
    recipe = None if found is None else saved_recipe(found)
    if not isinstance(recipe, FinetuneRecipe):
        return None
    began = Path(recipe.start.checkpoint).resolve()
    return recipe if began.is_relative_to(Path(said).resolve()) else None


def _check_shape(before: ModelSpec, after: ModelSpec, path: str) -> None:
    for key, old, new in differences(before, after):
        if key.split(".")[0] not in NEW:
            raise RecipeError(
                f"model.{key}: the recipe says {new}, the weights of {path} are of {old}: leave it out; of the model a "
                f"fine-tuning may change {', '.join(NEW[1:])}"
            )


def _begin(recipe: FinetuneRecipe, start: Opened | None, model: SwitchTransformer, optimizer: Optimizer) -> None:
    assert start is not None, "a run that has begun restores its own"
    fill(model, start.weights())
    if recipe.start.optimizer == "reset":
        return
    assert start.own is not None, "refused when the recipe was resolved"
    carry_over(optimizer, start.own, model.spec.num_experts)


def _text(recipe: FinetuneRecipe, start: Opened | None, folder: RunFolder, runtime: Runtime, console: Console) -> Text:
    tokenizer = _tokenizer(start, folder, runtime)
    tasks = tasks_of(recipe.tasks).values()
    lengths = Lengths(recipe.inputs_length, recipe.targets_length)

    def training() -> dict[str, tokens.Training]:
        return {
            task.name: tokens.training(
                task, recipe.data.folder, tokenizer, lengths, recipe.train.seed, default_cache(), console.track
            )
            for task in tasks
            if reading.has(task, "train")
        }

    found = runtime.on_main(training) or training()  # the main rank fills the cache that the others read
    stream = TaskStream(
        {name: one.packed for name, one in found.items()}, recipe.data.mixture, recipe.train.seed, recipe.rows_per_step
    )
    exams = runtime.on_main(lambda: _exams(recipe, tasks, tokenizer)) or _exams(recipe, tasks, tokenizer)
    if runtime.is_main:
        _tell(stream.rates, found, tasks, console)
        tell(tasks, exams, recipe.scoring.split, console.message, console.warning)
    held_out = InTurn([exam.packed for exam in exams if exam.packed.num_rows])
    return Text(
        tokenizer,
        hashlib.sha256("\n".join(one.identity for one in found.values()).encode()).hexdigest(),
        stream.batch,
        held_out.rows,
        held_out.num_rows,
        _samples(exams[0]),
        exams,
    )


def _tokenizer(start: Opened | None, folder: RunFolder, runtime: Runtime) -> Tokenizer:
    """That of the checkpoint which the run starts from; each checkpoint of the run has it again."""
    if start is None:
        found = checkpoint.find(folder.checkpoints, warn=lambda damage: None)
        assert found is not None, "the run had begun when its recipe was resolved"
        return documents(found)[1]
    runtime.on_main(lambda: folder.write_tokenizer(start.tokenizer.to_json()))
    return start.tokenizer


def _exams(recipe: FinetuneRecipe, tasks: Collection[Task], tokenizer: Tokenizer) -> tuple[tokens.Scored, ...]:
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
