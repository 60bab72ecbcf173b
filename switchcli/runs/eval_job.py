"""The job of `switchcli eval`: resolve its command line, measure the checkpoint, and publish the result folder."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from switchcli import publish
from switchcli.data.config import TextSpec
from switchcli.data.prepare.verified import explain_changed_data
from switchcli.errors import CheckpointError, RecipeError, disk_errors
from switchcli.recipe import resolve
from switchcli.recipe.schema import EvalRecipe, TaskRecipe, TextRecipe
from switchcli.report.console import Console
from switchcli.runs.evaluator import TEXT_KEYS, EvalPass, Evaluator
from switchcli.runs.loading import CheckpointHandle, load_model, open_model
from switchcli.runs.mesh_choice import build_context
from switchcli.runs.run_dir import check_ranks_agree, machine_info, run_name
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import tasks_of
from switchcli.tasks.scores import is_right
from switchcli.tasks.task import AnsweredExample
from switchcli.train import memory
from switchcli.user_files import read_regular

MAX_RESULT_BYTES = 2**28


class EvalJob(NamedTuple):
    """The resolved command line of `switchcli eval`."""

    recipe: EvalRecipe
    checkpoint: CheckpointHandle


def resolve_job(checkpoint: Path, name: str | None, overrides: Sequence[str], console: Console) -> EvalJob:
    """Open the checkpoint, and resolve the recipe `name` with `overrides`. The checkpoint's run provides defaults.

    Raises:
        CheckpointError: there is no checkpoint.
        RecipeError: the recipe breaks a rule, there is nothing to measure on, or a package of a metric is missing.
        DataError: `data.folder` lacks files of tasks.
    """
    handle = open_model(checkpoint, console)
    defaults = _defaults(handle)
    tree = resolve.load(name, overrides)
    resolve.check_verb(tree, EvalRecipe)  # before the defaults, whose keys would hide the recipe's own verb
    named_tasks = resolve.stated(tree, "tasks")
    if isinstance(named_tasks, list):
        # A custom task of the checkpoint's run may be named without its definition.
        definitions = {task["name"]: task for task in defaults.get("tasks", ()) if isinstance(task, dict)}
        tasks = [definitions.get(task, task) if isinstance(task, str) else task for task in named_tasks]
        overrides = [*overrides, f"tasks={json.dumps(tasks)}"]
    if named_tasks is not None:
        defaults.pop("text", None)
    tree = resolve.load(name, overrides, resolve.layer(defaults, f"{handle.path}"))
    recipe = resolve.validate(tree, EvalRecipe)
    if not recipe.tasks and recipe.text is None:
        raise RecipeError(
            f"{handle.path}: nothing to measure it on: name tasks (tasks=[rte]) or text (text.corpora=[...]); a "
            "checkpoint of `switchcli pretrain` has its own text, one of `switchcli finetune` its own tasks"
        )
    requested, split = tasks_of(recipe.tasks), recipe.scoring.split
    reading.check_tasks(requested.values(), (split,), recipe.data.folder)
    if recipe.text is None and not any(reading.has_split(task, split) for task in requested.values()):
        raise RecipeError(f"scoring.split ({split}): none of {', '.join(requested)} has such a split")
    return EvalJob(recipe, handle)


def _defaults(handle: CheckpointHandle) -> dict[str, Any]:
    """Return the keys of an evaluation that the recipe of the checkpoint provides."""
    trained = handle.recipe
    if isinstance(trained, TaskRecipe):
        return trained.model_dump(mode="json", include={"tasks", "data", "scoring"})
    lengths = {"inputs_length": trained.inputs_length, "targets_length": trained.targets_length}
    if not handle.has_training_recipe or not isinstance(trained, TextRecipe):
        return {"data": lengths}
    text = TextSpec(**{key: getattr(trained.data, key) for key in TEXT_KEYS}, sequences=trained.eval.sequences)
    return {"data": lengths, "text": text.model_dump(mode="json")}


def default_out(checkpoint: Path) -> Path:
    """Return runs/eval/RUN, or runs/eval/RUN-step-N for one checkpoint of a run."""
    return Path("runs") / "eval" / run_name(checkpoint)


class Evaluation(NamedTuple):
    """The outcome of `switchcli eval`."""

    result: dict[str, Any]
    """The content of result.json."""
    passes: tuple[EvalPass, ...]
    """One for each capacity."""


def measure(job: EvalJob, out: Path, quiet: bool) -> Evaluation | None:
    """Measure the checkpoint on the data of the recipe, and write the result folder. Return None off the main rank.

    Raises:
        CheckpointError: the weights cannot be read, or the disk cannot be written.
        DataError: the tasks or the text cannot be used.
        OutOfMemory: the device has not enough memory.
    """
    recipe, handle = job
    folder = out.resolve()  # if `out` is a link, the folder it points to is replaced, and the link stays
    context = build_context(recipe)
    check_ranks_agree(recipe, context)
    console = Console(quiet=quiet or not context.is_main)
    console.message(f"evaluating {handle.path}")
    context.main_only(lambda: _check_writable(folder))
    with memory.explain_out_of_memory_in_evaluation(context.device):
        evaluator = Evaluator(load_model(handle, context.device), recipe, context, console)
        with explain_changed_data(evaluator.check):
            passes = tuple(evaluator.evaluate(text, tasks) for text, tasks in evaluator.capacities())
        context.on_all_ranks(evaluator.check)  # nothing is written if the data of any rank has changed
    result = {
        "verb": recipe.verb,
        "checkpoint": str(handle.path),
        "step": handle.step,
        "tokenizer": handle.tokenizer.sha256,
        "recipe": recipe.model_dump(mode="json"),
        "passes": [eval_pass.to_json() for eval_pass in passes],
        **machine_info(context),
    }

    def write() -> Evaluation:
        files = {"result.json": json.dumps(result, indent=1) + "\n"}
        for eval_pass in passes:
            subfolder = f"capacity-{eval_pass.capacity['tasks']}/" if len(passes) > 1 else ""
            for examples in evaluator.scored:
                task = examples.task.name
                lines = [json.dumps(line) + "\n" for line in _predictions(examples, eval_pass.answers[task])]
                files[f"{subfolder}predictions/{task}.jsonl"] = "".join(lines)
        archived = _publish(folder, files, result)
        if archived is not None:
            console.message(f"the evaluation that was in {out} is now in {archived}")
        console.message(f"{out} holds result.json" + (" and predictions" if evaluator.tasks else ""))
        return Evaluation(result, passes)

    evaluation = context.main_only(write)
    context.close()
    return evaluation


def _predictions(examples: tokens.ScoredExamples, answered: Sequence[AnsweredExample]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a task's predictions file. `correct` is null for an example without a label."""
    for number, (example, prediction) in zip(examples.numbers, answered, strict=True):
        correct = is_right(examples.task, AnsweredExample(example, prediction)) if example.targets else None
        yield {
            "number": number,
            "input": example.input,
            "target": list(example.targets),
            "prediction": prediction,
            "correct": correct,
        }


def _check_writable(out: Path) -> None:
    """Raise CheckpointError before the measurement if its result could not be written to `out`.

    Making the temporary folder also restores a folder that a killed command was replacing.
    """
    if out.exists() and not (out / "result.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already and holds no evaluation: give another folder by --out")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with publish.temporary_folder(out):
            pass


def _publish(out: Path, files: Mapping[str, str], result: Mapping[str, Any]) -> Path | None:
    """Publish the files as the folder `out`, which replaces a folder of the same evaluation.

    The folder of another evaluation is renamed, and its new path returned.
    """
    archived = None
    with disk_errors(out), publish.temporary_folder(out) as temporary:
        for name, text in files.items():
            path = temporary / "new" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if out.exists() and not _is_same_evaluation(out / "result.json", result):
            names = (out.with_name(f"{out.name}.before-{number}") for number in count(1))
            archived = next(name for name in names if not os.path.lexists(name))
            out.rename(archived)
        publish.publish_folder(temporary / "new", out, replace=True)
    return archived


def _is_same_evaluation(path: Path, result: Mapping[str, Any]) -> bool:
    """Return whether the result at `path` is of the same checkpoint and recipe. No result counts as the same one."""
    if not path.exists():
        return True  # an empty folder
    try:
        existing = json.loads(read_regular(path, MAX_RESULT_BYTES))
    except (OSError, ValueError):
        return False
    keys = ("checkpoint", "step", "recipe")
    return isinstance(existing, dict) and all(existing.get(key) == result[key] for key in keys)
