"""The job of `switchcli distill`: the recipe that its command line comes to, with teacher, student and baseline."""

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.convert.tokenizer_files import find_tokenizer
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.surgery.student import FromTeacherInit, differing_dimensions
from switchcli.recipe import resolve
from switchcli.recipe.schema import DistillRecipe, DistillTasksRecipe, DistillTextRecipe, TaskRecipe, TextRecipe
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.yaml_nodes import Node
from switchcli.report.console import Console
from switchcli.runs import finetuning
from switchcli.runs.distilling import DistillJob, Recipe
from switchcli.runs.loading import CheckpointHandle, open_model
from switchcli.runs.warm_start import check_outside, check_shape, check_tokenizer, is_within, run_recipe
from switchcli.train.config import FromCheckpoint

TEACHER, STUDENT = "distill.teacher", "student.path"
HOW_LONG = {"train", "optimizer", "schedule", "eval", "checkpoint"}
"""What a recipe may leave out where the teacher was trained on the like."""


class Models(NamedTuple):
    """The models that the command line names, each as a key of the recipe."""

    teacher: str | None = None
    student: str | None = None
    """A size, or a checkpoint."""
    baseline: str | None = None
    """A checkpoint, or a figure."""


def resolve_job(
    name: str | None, overrides: Sequence[str], models: Models, out: Path, resume: bool, console: Console
) -> DistillJob:
    """Resolve the recipe, with what the teacher says of the keys that it leaves out.

    A run that has begun keeps teacher and student, even if the folders that are named have newer checkpoints by now.

    Raises:
        RecipeError: no teacher is named, or the student cannot be its student.
        CheckpointError: a checkpoint is not there.
        DataError: of the tasks.
    """
    tree, typed = resolve.load(name, overrides), resolve.load(None, overrides)
    _check_said_once(models, typed)
    if resolve.stated(tree, "verb") is not None:  # one that does not say may be that of a pre-training too
        resolve.check_verb(tree, DistillTextRecipe)
    begun = run_recipe(out) if resume else None
    said = _said(models.teacher, tree, TEACHER, "name the model to learn from by --teacher CHECKPOINT")
    begun = begun if isinstance(begun, DistillRecipe) and is_within(begun.distill.teacher, said) else None
    if begun is not None and not Path(begun.distill.teacher).exists():
        raise CheckpointError(
            f"{out}: this run began with the teacher {begun.distill.teacher}, which is gone (a run keeps its last "
            "checkpoint.keep_last): bring it back, or --no-resume to begin anew"
        )
    teacher = _open(TEACHER, said if begun is None else begun.distill.teacher, out, console)
    overrides = [*overrides, f"{TEACHER}={json.dumps(str(teacher.path))}"]
    if models.baseline is not None:
        overrides.append(f"distill.baseline={json.dumps(_figure(models.baseline))}")

    spec, student = dense(teacher.recipe.model), None
    path = resolve.stated_place(tree, STUDENT)
    if models.student in SIZES:
        if path is not None:
            raise RecipeError(
                f"--student {models.student}: a size, and the recipe's {STUDENT} is a checkpoint: leave one out"
            )
        overrides.append(f"model.size={models.student}")
    elif (path := models.student or path) is not None:
        if begun is not None and isinstance(begun.student, FromCheckpoint) and is_within(begun.student.path, path):
            spec, path = begun.model, begun.student.path
        else:
            student = _open_student(models.student, path, out, console)
            spec, path = student.recipe.model, str(student.path)
        overrides += ["student.kind=checkpoint", f"{STUDENT}={json.dumps(path)}"]
    if resolve.stated(tree, "data.tokenizer.kind") == "train":  # a student reads by the vocabulary of its teacher
        overrides.append(f"data.tokenizer={json.dumps({'kind': 'file', 'path': _tokenizer(teacher)})}")
    below = resolve.layer(_defaults(teacher, spec, tree), f"the teacher {teacher.path}")
    tree = resolve.load(name, overrides, below)
    recipe: Recipe
    if resolve.stated(tree, "tasks") is None:
        recipe = resolve.validate(tree, DistillTextRecipe)
    else:
        recipe = resolve.validate(tree, DistillTasksRecipe)
    baseline = recipe.distill.baseline
    opened = _open("--baseline", baseline, out, console) if isinstance(baseline, str) else None
    distilling = DistillJob(recipe, teacher, student, opened)
    _check(distilling)
    return distilling


def dense(teacher: ModelSpec) -> ModelSpec:
    """Return the dense model of a sparse one's shape. With top-1 feed-forwards both have the same FLOPs a token."""
    return teacher.model_copy(
        update={"size": "custom", "num_experts": 1, "sparse_encoder_layers": None, "sparse_decoder_layers": None}
    )


def _check_said_once(models: Models, typed: Node) -> None:
    """Raise a RecipeError where the command line says two things of teacher or student."""
    if models.teacher is not None and resolve.stated(typed, TEACHER) is not None:
        raise RecipeError(f"{TEACHER}: there is --teacher too: leave one out")
    kind = resolve.stated(typed, "student.kind")
    if models.student is not None and models.student not in SIZES and kind not in (None, "checkpoint"):
        raise RecipeError(
            f"student.kind ({kind}): --student {models.student} is a checkpoint to start from: leave one out"
        )


def _said(option: str | None, tree: Node, key: str, way_out: str) -> str:
    said = option or resolve.stated_place(tree, key)
    if not isinstance(said, str):
        raise RecipeError(f"{key}: missing: {way_out}")
    return said


def _figure(said: str) -> float | str:
    try:
        figure = float(said)
    except ValueError:
        return said
    if not math.isfinite(figure):
        raise RecipeError(f"--baseline ({said}): must be a checkpoint, or a finite figure")
    return figure


def _open(key: str, path: str, out: Path, console: Console) -> CheckpointHandle:
    try:
        opened = open_model(Path(path), console)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    check_outside(key, opened.path, out)
    return opened


def _open_student(option: str | None, path: str, out: Path, console: Console) -> CheckpointHandle:
    if option is not None and not Path(path).exists() and (near := difflib.get_close_matches(path, SIZES, n=1)):
        raise RecipeError(f"--student {path}: no checkpoint there, and no size of that name. Did you mean {near[0]}?")
    return _open(STUDENT if option is None else "--student", path, out, console)


def _defaults(teacher: CheckpointHandle, student: ModelSpec, tree: Node) -> dict[str, Any]:
    """Return what the teacher says of the keys that the recipe `tree` leaves out."""
    own = teacher.recipe
    on_tasks = resolve.stated(tree, "tasks") is not None
    on_text = resolve.stated(tree, "data.corpora") is not None
    if not (teacher.has_training_recipe or on_tasks or on_text):
        raise RecipeError(
            f"{TEACHER} ({teacher.path}): says nothing of how it was trained: name a RECIPE, or what to train on "
            "(data.corpora=[...] or tasks=[...]) with train.steps and train.batch_tokens"
        )
    below: dict[str, Any] = {"model": student.model_dump(mode="json")}
    if teacher.has_training_recipe and isinstance(own, TaskRecipe) and not on_text:
        below |= own.model_dump(mode="json", include={*HOW_LONG, "tasks", "data", "scoring"})
    elif teacher.has_training_recipe and isinstance(own, TextRecipe) and not on_tasks:
        below |= own.model_dump(mode="json", include={*HOW_LONG, "data"})
    elif on_tasks:
        below["data"] = {"inputs_length": own.inputs_length, "targets_length": own.targets_length}
    below.get("train", {}).pop("device", None)  # of the machine that the teacher was trained on
    if "tasks" not in below and not on_tasks:
        below.setdefault("data", {})["tokenizer"] = {"kind": "file", "path": _tokenizer(teacher)}
    return below


def _tokenizer(teacher: CheckpointHandle) -> str:
    return str((find_tokenizer(teacher.path) or teacher.path / "tokenizer.json").absolute())


def _check(distilling: DistillJob) -> None:
    """Raise a RecipeError where the student cannot learn from such a teacher."""
    recipe, teacher, student, baseline = distilling
    check_tokenizer(recipe, teacher.tokenizer)
    ours, theirs = recipe.model, teacher.recipe.model
    if student is not None:
        check_shape(student.recipe.model, ours, str(student.path))
    for what, other in (("student", student), ("baseline", baseline)):
        if other is not None and other.tokenizer.sha256 != teacher.tokenizer.sha256:
            raise RecipeError(
                f"--{what} {other.path}: reads by another tokenizer than the teacher {teacher.path}, so that the one's "
                "probabilities say nothing to the other: take models that were trained with the same tokenizer.json"
            )
    if ours.vocab_size != theirs.vocab_size:
        raise RecipeError(
            f"model.vocab_size: the student has {ours.vocab_size}, its teacher {theirs.vocab_size}: probabilities of "
            "one vocabulary say nothing of another: leave it out, or take a --student of that many rows"
        )
    if theirs.num_experts == ours.num_experts == 1 and not differing_dimensions(ours, theirs):
        raise RecipeError(
            f"--teacher {teacher.path}: a dense model (num_experts: 1), of which the dense student is a copy: name a "
            "sparse teacher, or a smaller student by --student"
        )
    larger, smaller = count(ours).parameters, count(theirs).parameters
    if larger > smaller:
        raise RecipeError(
            f"model: a student of {larger:,} parameters is larger than its teacher {teacher.path}, of {smaller:,}: "
            "take a smaller --student, or a smaller model.num_experts"
        )
    _check_inheritance(recipe, teacher)
    if isinstance(recipe, DistillTasksRecipe):
        finetuning.check_tasks(recipe)


def _check_inheritance(recipe: Recipe, teacher: CheckpointHandle) -> None:
    """Raise a RecipeError where the teacher has not what the student is to take."""
    student, ours, theirs = recipe.student, recipe.model, teacher.recipe.model
    if not isinstance(student, FromTeacherInit):
        return
    if theirs.num_experts == 1 and student.experts != "random_init":
        raise RecipeError(
            f"student.experts ({student.experts}): the teacher {teacher.path} is dense (num_experts: 1) and has none: "
            "leave it out, or name a sparse teacher"
        )
    if student.experts == "most_used" and ours.num_experts > theirs.num_experts:
        raise RecipeError(
            f"model.num_experts: a student of {ours.num_experts} cannot take the most used of {theirs.num_experts}: "
            "take fewer, or student.experts=mean"
        )
    unlike = differing_dimensions(ours, theirs)
    if unlike and student.on_shape_mismatch == "error":
        said = ", ".join(f"{name} {own} (the teacher's is {his})" for name, own, his in unlike)
        raise RecipeError(
            f"model: the teacher's weights do not fit a student of {said}: "
            "student.on_shape_mismatch=random_init copies those that do, "
            "student.kind=random_init starts from initial weights"
        )
