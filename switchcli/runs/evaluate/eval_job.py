"""The job of `switchcli eval`: resolve its command line, measure the checkpoint, and publish the result folder."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.checkpoint.documents import DATA, TEXT
from switchcli.errors import CheckpointError, RecipeError, disk_errors
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe import resolve
from switchcli.recipe.schema import EvalRecipe
from switchcli.runs.devices.machine_info import machine_info
from switchcli.runs.devices.mesh_choice import build_eval_context
from switchcli.runs.evaluate.eval_data import build_eval_data, training_identity
from switchcli.runs.evaluate.score_tables import explain_scores
from switchcli.runs.inputs.loading import CheckpointHandle, load_model
from switchcli.runs.inputs.trained_recipe import trained_recipe
from switchcli.runs.job.job import Job, resolve_on_main
from switchcli.runs.job.run_dir import run_name
from switchcli.system import publish
from switchcli.tasks import reading, tokens
from switchcli.tasks.config import tasks_of
from switchcli.tasks.registry import SUITES, TASKS
from switchcli.tasks.scores import Scores, is_right
from switchcli.tasks.task import AnsweredExample
from switchcli.terminal.console import Console
from switchcli.terminal.metrics_file import read_object, to_json
from switchcli.terminal.safe_text import command_words
from switchcli.training import memory
from switchcli.training.measure import Measurement

CHECKPOINT = "checkpoint"
"""The key of the checkpoint to evaluate in a job. It is no key of the recipe."""


def resolve_job(handle: CheckpointHandle, source: resolve.Source) -> Job:
    """Return the recipe and the checkpoint of an evaluation, resolved on rank 0. Raises like `resolve_recipe`."""
    return resolve_on_main(source.merge(), lambda: Job(resolve_recipe(handle, source), {CHECKPOINT: handle}))


def resolve_recipe(handle: CheckpointHandle, source: resolve.Source) -> EvalRecipe:
    """Resolve a recipe for an open checkpoint, whose run provides what is left out.

    Raises:
        RecipeError: the recipe breaks a rule, there is nothing to measure on, or a package of a metric is missing.
        DataError: `data.folder` lacks files of tasks.
    """
    defaults, tree = _defaults(handle), source.merge()
    resolve.check_verb(tree, EvalRecipe)
    if isinstance(named := tree.stated("tasks"), list):
        assert isinstance(tree.value, dict), "it states tasks"
        # The recipe may name tasks that the checkpoint's run defines.
        own = {task["name"]: task for task in defaults.get("tasks", ()) if isinstance(task, dict)}
        _check_names(named, [*own], tree.value["tasks"].where)
        tasks = [own.get(task, task) if isinstance(task, str) else task for task in named]
        source = source.overridden(resolve.override("tasks", tasks))
    if named is not None:
        defaults.pop("text", None)
    recipe = resolve.validate(source.merge(resolve.layer(defaults, str(handle.path))), EvalRecipe)
    _check(recipe, handle.path)
    return recipe


def _check(recipe: EvalRecipe, path: Path) -> None:
    """Raise an error unless there is something to measure the checkpoint at `path` on."""
    if not recipe.tasks and recipe.text is None:
        raise RecipeError(
            f"{path}: nothing to measure it on: name tasks (tasks=[rte]) or text (text.corpora=[...]); a "
            "checkpoint of `switchcli pretrain` has its own text, one of `switchcli finetune` its own tasks"
        )
    requested, split = tasks_of(recipe.tasks), recipe.scoring.split
    reading.check_tasks(requested.values(), (split,), recipe.data.folder)
    if recipe.text is None and not any(reading.has_split(task, split) for task in requested.values()):
        raise RecipeError(f"scoring.split ({split}): none of {', '.join(requested)} has such a split")


def _check_names(tasks: Sequence[Any], own: Sequence[str], where: str) -> None:
    """Raise RecipeError for a name that is neither that of a task in the checkpoint's run (`own`) nor one that ships.

    Without tasks of the run, the schema of the recipe checks the names.
    """
    known = [*own, *TASKS, *SUITES]
    for index, name in enumerate(tasks if own else ()):
        if isinstance(name, str) and name not in known:
            similar = difflib.get_close_matches(name, known, n=3)
            hint = f". Did you mean {' or '.join(similar)}?" if similar else ""
            own_tasks = f"the run's own are {', '.join(own)}"
            raise RecipeError(f"{where}: tasks.{index}.name ({name}): no such task or suite; {own_tasks}{hint}")


def _defaults(handle: CheckpointHandle) -> dict[str, Any]:
    """Return the keys of an evaluation that the recipe of the checkpoint provides."""
    trained, file = trained_recipe(handle), handle.model_file
    lengths = {"inputs_length": file.inputs_length, "targets_length": file.targets_length}
    if trained is None:
        return {"data": lengths}
    defaults: dict[str, Any] = {"eval": {"capacity": trained.eval.capacity}, "data": lengths}
    if trained.named_tasks:
        return {**defaults, **trained.model_dump(mode="json", include={"tasks", "data", "scoring"})}
    if trained.text is not None:
        text = trained.text.model_dump(mode="json", include={"corpora", "held_out_fraction"})
        defaults["text"] = {**text, "sequences": trained.eval.sequences}
    return defaults


def only_capacity(recipe: EvalRecipe, default: Policy) -> Policy:
    """Return the one capacity to measure with, `default` if the recipe has none. Raises RecipeError for several."""
    capacities = recipe.eval.capacities or (default,)
    if len(capacities) > 1:
        raise RecipeError(f"eval.capacity ({', '.join(map(str, capacities))}): only one can be used here: name one")
    return capacities[0]


def default_out(checkpoint: Path) -> Path:
    """Return runs/eval/RUN, or runs/eval/RUN-step-N for one checkpoint of a run."""
    return Path("runs") / "eval" / run_name(checkpoint)


class Evaluation(NamedTuple):
    """The result of `switchcli eval` or `Model.evaluate`."""

    result: dict[str, Any]
    """The content of result.json, as plain values."""
    passes: tuple[Measurement, ...]
    """Everything that was measured, once for each capacity of the experts. By default there is one."""

    @property
    def scores(self) -> Mapping[str, Scores]:
        """The scores of each task under the first capacity, by task. Values go up to 100."""
        return self.passes[0].scores

    @property
    def held_out(self) -> dict[str, dict[str, Any]]:
        """Metrics on held-out text under the first capacity, by text: `text` is all of it, and others are labels.

        Neg. log perplexity is in nats per target token.
        """
        return self.passes[0].held_out()

    @property
    def targets(self) -> dict[str, dict[str, Any]]:
        """Metrics on the labeled targets of each task under the first capacity, by task."""
        return self.passes[0].target_records()


def measure(job: Job, out: Path | None, quiet: bool, model: SwitchTransformer | None = None) -> Evaluation:
    """Measure the checkpoint on the data of the recipe, and write the result folder `out` unless it is None.

    `model` is the checkpoint's model where it is loaded already. It stays on its device, whose type `device: auto` then
    means.

    Raises:
        RecipeError: the recipe names another type of device than that of `model`.
        CheckpointError: the weights cannot be read, or the disk cannot be written.
        DataError: the tasks or the text cannot be used.
        OutOfMemory: the device has not enough memory.
    """
    recipe, handle = job.recipe, job.handles[CHECKPOINT]
    context = build_eval_context(recipe if model is None else _on_device_of(recipe, model))
    console = Console(quiet=quiet or not context.is_main)
    console.message(f"evaluating {handle.path}")
    if out is not None:
        context.main_only(lambda: _check_writable(out.resolve()))
    with memory.explain_out_of_memory_in_evaluation(context.device):
        if model is None:
            model = load_model(handle, context.device)
        found, device = model.embedding.device, context.device
        if (found.type, found.index or 0) != (device.type, device.index or 0):  # without a number: the first one
            raise RecipeError(f"the model is on {found}, and this process computes on {device}: move it there")
        data = build_eval_data(handle, recipe, context, console)
        trained_text = training_identity(handle, recipe, data.prepared)
        context.main_only(lambda: _warn_about_other_text(handle, trained_text, console))
        passes = tuple(evaluator.with_intervals(evaluator(model)) for evaluator in data.evaluators)
        scored = data.evaluators[0].tasks
        for measured in passes:
            explain_scores(console, scored, measured.scores, measured.answers)
    result = {
        "verb": recipe.verb,
        "command": command_words(),
        "checkpoint": str(handle.path),
        "step": handle.step,
        "tokenizer": handle.tokenizer.sha256,
        "recipe": recipe.model_dump(mode="json"),
        "passes": [measured.to_json() for measured in passes],
        **machine_info(context),
    }

    if out is not None:
        context.main_only(lambda: _write(out, result, passes, scored, console))
    context.close()
    return Evaluation(result, passes)


def _warn_about_other_text(handle: CheckpointHandle, identity: str | None, console: Console) -> None:
    """Print a warning if the text to measure on is not the text that the checkpoint was trained on."""
    try:
        document = handle.native.document(DATA) if handle.native and handle.recipe else None
    except CheckpointError:  # its run has removed the checkpoint since the weights were read
        return
    if identity is not None and document is not None and json.loads(document).get(TEXT) != identity:
        console.warning(
            f"the text is not the one that {handle.path} was trained on: it has changed, and rows that are held out "
            "now may have been trained on"
        )


def _on_device_of(recipe: EvalRecipe, model: SwitchTransformer) -> EvalRecipe:
    """Return the recipe with the type of the model's device. Raises RecipeError if it names another one."""
    device = model.embedding.device.type
    if recipe.device not in ("auto", device):
        raise RecipeError(f"device ({recipe.device}): the model is on {device}: leave it out, or load the model there")
    return recipe.model_copy(update={"device": device})


def _write(
    out: Path,
    result: Mapping[str, Any],
    passes: Sequence[Measurement],
    scored: Sequence[tokens.ScoredExamples],
    console: Console,
) -> None:
    """Write the result and the predictions of an evaluation as the folder `out`."""
    files = {"result.json": to_json(result, indent=1) + "\n"}
    for measured in passes:
        subfolder = f"capacity-{measured.capacity['tasks']}/" if len(passes) > 1 else ""
        for examples in scored:
            task = examples.task.name
            lines = [to_json(line) + "\n" for line in _predictions(examples, measured.answers[task])]
            files[f"{subfolder}predictions/{task}.jsonl"] = "".join(lines)
    # If `out` is a link, the folder that it points to is replaced, and the link stays.
    archived = _publish(out.resolve(), files, result)
    if archived is not None:
        console.message(f"the evaluation that was in {out} is now in {archived}")
    console.message(f"{out} holds result.json" + (" and predictions" if scored else ""))


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
    is_empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_empty and (read_object(out / "result.json") or {}).get("verb") != "eval":
        raise CheckpointError(f"{out}: is there already and holds no evaluation: give another folder by --out")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with publish.temporary_folder(out):
            pass


def _publish(out: Path, files: Mapping[str, str], result: Mapping[str, Any]) -> Path | None:
    """Publish the files as the folder `out`, which replaces a folder of the same evaluation.

    The folder of another evaluation, or with files that no evaluation wrote, is renamed, and its new path returned.
    """
    archived = None
    with disk_errors(out), publish.temporary_folder(out) as temporary:
        for name, text in files.items():
            path = temporary / "new" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        existing = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
        if existing and (existing - files.keys() or not _is_same_evaluation(out / "result.json", result)):
            archived = publish.archive_name(out)
            out.rename(archived)
        publish.publish_folder(temporary / "new", out, replace=True)
    return archived


def _is_same_evaluation(path: Path, result: Mapping[str, Any]) -> bool:
    """Return whether the result at `path` is of the same checkpoint and recipe."""
    existing = read_object(path) or {}
    return all(existing.get(key) == result[key] for key in ("checkpoint", "step", "recipe"))
