"""The job of `switchcli eval`: what its command line asks for, the measurement, and the folder of its result."""

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
    """What a command line comes to."""

    recipe: EvalRecipe
    checkpoint: CheckpointHandle


def resolve_job(checkpoint: Path, name: str | None, overrides: Sequence[str], console: Console) -> EvalJob:
    """Return the checkpoint, and the recipe `name` with `overrides`; the checkpoint's run says what both leave out.

    Raises:
        CheckpointError: there is none.
        RecipeError: of the recipe, or there is nothing to measure.
        DataError: `data.folder` lacks files of tasks.
    """
    opened = open_model(checkpoint, console)
    below = _defaults(opened)
    tree = resolve.load(name, overrides)
    resolve.check_verb(tree, EvalRecipe)  # before the checkpoint's tasks lie beneath it
    said = resolve.stated(tree, "tasks")
    if isinstance(said, list):  # a task of the run's own may be named
        named = {task["name"]: task for task in below.get("tasks", ()) if isinstance(task, dict)}
        tasks = [named.get(task, task) if isinstance(task, str) else task for task in said]
        overrides = [*overrides, f"tasks={json.dumps(tasks)}"]
    if said is not None:
        below.pop("text", None)
    recipe = resolve.validate(resolve.load(name, overrides, resolve.layer(below, f"{opened.path}")), EvalRecipe)
    if not recipe.tasks and recipe.text is None:
        raise RecipeError(
            f"{opened.path}: nothing to measure it on: name tasks (tasks=[rte]) or text (text.corpora=[...]); a "
            "checkpoint of `switchcli pretrain` has its own text, one of `switchcli finetune` its own tasks"
        )
    asked, part = tasks_of(recipe.tasks), recipe.scoring.split
    reading.check_files(asked.values(), (part,), recipe.data.folder)
    if recipe.text is None and not any(reading.has_split(task, part) for task in asked.values()):
        raise RecipeError(f"scoring.split ({part}): none of {', '.join(asked)} has such a split")
    return EvalJob(recipe, opened)


def _defaults(opened: CheckpointHandle) -> dict[str, Any]:
    """What the checkpoint's run says of the keys of an evaluation."""
    own = opened.recipe
    lengths = {"inputs_length": own.inputs_length, "targets_length": own.targets_length}
    if isinstance(own, TaskRecipe):
        return own.model_dump(mode="json", include={"tasks", "data", "scoring"})
    if not opened.has_training_recipe or not isinstance(own, TextRecipe):
        return {"data": lengths}
    text = TextSpec(**{key: getattr(own.data, key) for key in TEXT_KEYS}, sequences=own.eval.sequences)
    return {"data": lengths, "text": text.model_dump(mode="json")}


def default_out(checkpoint: Path) -> Path:
    """runs/eval/RUN, or runs/eval/RUN-step-N for one checkpoint of it."""
    return Path("runs") / "eval" / run_name(checkpoint)


class Evaluation(NamedTuple):
    """What `switchcli eval` found."""

    result: dict[str, Any]
    passes: tuple[EvalPass, ...]


def measure(job: EvalJob, out: Path, quiet: bool) -> Evaluation | None:
    """Measure the checkpoint on what the recipe names, and write it down; None off the main rank.

    Raises:
        CheckpointError: its weights cannot be read, or the disk refuses.
        DataError: of the tasks or the text.
        OutOfMemory: the device has no room.
    """
    recipe, opened = job
    folder = out.resolve()  # of a link the folder that it names is replaced, not the link
    context = build_context(recipe)
    check_ranks_agree(recipe, context)
    console = Console(quiet=quiet or not context.is_main)
    console.message(f"evaluator {opened.path}")
    context.main_only(lambda: _probe(folder))
    with memory.explain_out_of_memory_in_evaluation(context.device):
        evaluator = Evaluator(load_model(opened, context.device), recipe, context, console)
        with explain_changed_data(evaluator.check):
            passes = tuple(evaluator.evaluate(*each) for each in evaluator.capacities())
        context.on_all_ranks(evaluator.check)  # no rank's share was measured on changed data, or nothing is written
    result = {
        "verb": recipe.verb,
        "checkpoint": str(opened.path),
        "step": opened.step,
        "tokenizer": opened.tokenizer.sha256,
        "recipe": recipe.model_dump(mode="json"),
        "passes": [one.to_json() for one in passes],
        **machine_info(context),
    }

    def write() -> Evaluation:
        files = {"result.json": json.dumps(result, indent=1) + "\n"}
        for one in passes:
            part = f"capacity-{one.capacity['tasks']}/" if len(passes) > 1 else ""
            for exam in evaluator.scored:
                lines = (json.dumps(line) + "\n" for line in _lines(exam, one.answers[exam.task.name]))
                files[f"{part}predictions/{exam.task.name}.jsonl"] = "".join(lines)
        aside = _place(folder, files, result)
        if aside is not None:
            console.message(f"the evaluation that was in {out} is now in {aside}")
        console.message(f"{out} holds result.json" + (" and predictions" if evaluator.tasks else ""))
        return Evaluation(result, passes)

    evaluation = context.main_only(write)
    context.close()
    return evaluation


def _lines(exam: tokens.ScoredExamples, answered: Sequence[AnsweredExample]) -> Iterator[dict[str, Any]]:
    for number, (example, prediction) in zip(exam.numbers, answered, strict=True):
        correct = is_right(exam.task, AnsweredExample(example, prediction)) if example.targets else None
        line = {"input": example.input, "target": list(example.targets), "prediction": prediction, "correct": correct}
        yield {"number": number, **line}


def _probe(out: Path) -> None:
    """Raise a CheckpointError now where the outcome could not be written later; restore what a killed one replaced."""
    if out.exists() and not (out / "result.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already and holds no evaluation: give another folder by --out")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with publish.temporary_folder(out):
            pass


def _place(out: Path, files: Mapping[str, str], result: Mapping[str, Any]) -> Path | None:
    """Publish the files as `out`. Another evaluation's folder is set aside, and its new name is returned; one of the
    same evaluation is replaced."""
    aside = None
    with disk_errors(out), publish.temporary_folder(out) as temporary:
        for name, text in files.items():
            path = temporary / "new" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if out.exists() and not _is_the_same(out / "result.json", result):
            names = (out.with_name(f"{out.name}.before-{number}") for number in count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            out.rename(aside)
        publish.publish_folder(temporary / "new", out, replace=True)
    return aside


def _is_the_same(path: Path, result: Mapping[str, Any]) -> bool:
    """Whether a result is of the same checkpoint, measured the same way."""
    if not path.exists():
        return True  # an empty folder
    try:
        before = json.loads(read_regular(path, MAX_RESULT_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(before, dict) and all(before.get(key) == result[key] for key in ("checkpoint", "step", "recipe"))
