"""Resolve the command line of `switchcli distill`: its recipe, with the teacher, the student and the baseline."""

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
from switchcli.model.surgery.student import differing_dimensions
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.recipe import resolve
from switchcli.recipe.schema import DistillRecipe, DistillTasksRecipe, DistillTextRecipe, TaskRecipe, TextRecipe
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.report.console import Console
from switchcli.runs import branching, finetuning, warm_start
from switchcli.runs.distilling import DistillJob, Recipe
from switchcli.runs.loading import CheckpointHandle, open_model
from switchcli.runs.warm_start import check_outside, check_shape, check_tokenizer, is_within, run_recipe
from switchcli.training.config import FromCheckpoint

_TEACHER_KEY, _STUDENT_KEY = "distill.teacher", "student.path"
_TRAINING_SECTIONS = {"train", "optimizer", "schedule", "eval", "checkpoint"}
"""Sections that a recipe may leave out if the teacher was trained on the same type of data. The teacher's are taken."""


class Models(NamedTuple):
    """The models that the command line names."""

    teacher: str | None = None
    """A checkpoint."""
    student: str | None = None
    """A size or a checkpoint."""
    baseline: str | None = None
    """A checkpoint or a number."""


def resolve_job(
    name: str | None,
    overrides: Sequence[str],
    models: Models,
    out: Path,
    resume: bool,
    console: Console,
    branch_from: str | None = None,
) -> DistillJob:
    """Resolve the recipe, and open the models. The teacher provides defaults for keys that the recipe leaves out.

    A run in `out` that has begun keeps its teacher and student, even if the named folders have newer checkpoints now.
    So does a branch of a run, which `branch_from` names as RUN or RUN@STEP.

    Raises:
        RecipeError: no teacher is named, or the student cannot learn from it.
        CheckpointError: a checkpoint does not exist or cannot be used.
        DataError: files of the tasks are missing.
    """
    tree = resolve.load(name, overrides)
    _check_no_contradiction(models, resolve.load(None, overrides))
    if resolve.stated(tree, "verb") is not None:  # a recipe without a verb may also be one of pretrain or finetune
        resolve.check_verb(tree, DistillTextRecipe)
    named_teacher = models.teacher or resolve.stated_path(tree, _TEACHER_KEY)
    if not isinstance(named_teacher, str):
        raise RecipeError(f"{_TEACHER_KEY}: missing: name the model to learn from by --teacher CHECKPOINT")
    resumed = run_recipe(out) if resume else None
    named_start = branching.named_start(None, branch_from, tree)
    branch = branching.find("distill", named_start, resumed, out, console)
    begun = _with_teacher(resumed if branch is None else branch.recipe, named_teacher, out)
    teacher_path = named_teacher if begun is None else begun.distill.teacher
    teacher = _open(_TEACHER_KEY, teacher_path, out, console)
    overrides = [*overrides, resolve.override(_TEACHER_KEY, str(teacher.path)), *branching.overrides(branch)]
    if models.baseline is not None:
        overrides.append(resolve.override("distill.baseline", _parse_baseline(models.baseline)))

    student = None
    spec = dense_spec(teacher.recipe.model)
    student_path = resolve.stated_path(tree, _STUDENT_KEY)
    if models.student in SIZES:
        if student_path is not None:
            raise RecipeError(
                f"--student {models.student}: a size, and the recipe's {_STUDENT_KEY} is a checkpoint: leave one out"
            )
        overrides.append(f"model.size={models.student}")
    elif (student_path := models.student or student_path) is not None:
        begun_student = None if begun is None else begun.student
        if isinstance(begun_student, FromCheckpoint) and is_within(begun_student.path, student_path):
            assert begun is not None
            spec, student_path = begun.model, begun_student.path
        else:
            student = _open_student(models.student, student_path, out, console)
            spec, student_path = student.recipe.model, str(student.path)
        overrides += ["student.kind=checkpoint", resolve.override(_STUDENT_KEY, student_path)]
    if resolve.stated(tree, "data.tokenizer.kind") == "train":  # a student shares the vocabulary of its teacher
        _check_trained_tokenizer(tree, teacher)
        tokenizer = {"kind": "file", "path": _tokenizer_path(teacher)}
        overrides.append(resolve.override("data.tokenizer", tokenizer))

    defaults = resolve.layer(_defaults(teacher, spec, tree), f"the teacher {teacher.path}")
    tree = resolve.load(name, overrides, defaults)
    recipe: Recipe
    if resolve.stated(tree, "tasks") is None:
        recipe = resolve.validate(tree, DistillTextRecipe, spec.vocab_size)
    else:
        recipe = resolve.validate(tree, DistillTasksRecipe, spec.vocab_size)
    baseline = recipe.distill.baseline
    baseline_handle = _open("--baseline", baseline, out, console) if isinstance(baseline, str) else None
    warm_start.check_branch(branch, recipe)
    job = DistillJob(recipe, teacher, student, baseline_handle, branch and branch.handle)
    _check(job)
    return job


def dense_spec(teacher: ModelSpec) -> ModelSpec:
    """Return the dense model of a sparse one's shape. With top-1 feed-forwards both have the same FLOPs per token."""
    return teacher.model_copy(
        update={"size": "custom", "num_experts": 1, "sparse_encoder_layers": None, "sparse_decoder_layers": None}
    )


def _with_teacher(begun: TrainingRecipe | None, teacher: str, out: Path) -> DistillRecipe | None:
    """Return the recipe of a run that has begun if its teacher is within `teacher`, else None.

    Raises:
        CheckpointError: the teacher of that run no longer exists.
    """
    if not isinstance(begun, DistillRecipe) or not is_within(begun.distill.teacher, teacher):
        return None
    if not Path(begun.distill.teacher).exists():
        raise CheckpointError(
            f"{out}: this run began with the teacher {begun.distill.teacher}, which is gone (a run keeps its last "
            "checkpoint.keep_last): bring it back, or --no-resume to start over"
        )
    return begun


def _check_no_contradiction(models: Models, overrides: Node) -> None:
    """Raise RecipeError if options and overrides of the command line both set the teacher or the student."""
    if models.teacher is not None and resolve.stated(overrides, _TEACHER_KEY) is not None:
        raise RecipeError(f"{_TEACHER_KEY}: there is --teacher too: leave one out")
    kind = resolve.stated(overrides, "student.kind")
    if models.student is not None and models.student not in SIZES and kind not in (None, "checkpoint"):
        raise RecipeError(
            f"student.kind ({kind}): --student {models.student} is a checkpoint to start from: leave one out"
        )


def _parse_baseline(baseline: str) -> float | str:
    """Return the number that `--baseline` gives, or the path of a checkpoint."""
    try:
        value = float(baseline)
    except ValueError:
        return baseline
    if not math.isfinite(value):
        raise RecipeError(f"--baseline ({baseline}): must be a checkpoint, or a finite number")
    return value


def _open(key: str, path: str, out: Path, console: Console) -> CheckpointHandle:
    """Open a checkpoint outside of the run's own folder. `key` names the option or the key of `path` in errors."""
    try:
        handle = open_model(Path(path), console)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    check_outside(key, handle.path, out)
    return handle


def _open_student(option: str | None, path: str, out: Path, console: Console) -> CheckpointHandle:
    """Open the checkpoint of the student, which the option or the recipe names. The option may be a misspelled size."""
    if option is not None and not Path(path).exists() and (close := difflib.get_close_matches(path, SIZES, n=1)):
        raise RecipeError(f"--student {path}: no checkpoint there, and no size of that name. Did you mean {close[0]}?")
    return _open(_STUDENT_KEY if option is None else "--student", path, out, console)


def _defaults(teacher: CheckpointHandle, student: ModelSpec, tree: Node) -> dict[str, Any]:
    """Return the values for keys that the recipe `tree` leaves out: the student's shape, and the teacher's training."""
    trained = teacher.recipe
    on_tasks = resolve.stated(tree, "tasks") is not None
    on_text = resolve.stated(tree, "data.corpora") is not None
    if not (teacher.has_training_recipe or on_tasks or on_text):
        raise RecipeError(
            f"{_TEACHER_KEY} ({teacher.path}): has no record of its training: name a RECIPE, or what to train on "
            "(data.corpora=[...] or tasks=[...]) with train.steps and train.batch_tokens"
        )
    defaults: dict[str, Any] = {"model": student.model_dump(mode="json")}
    if teacher.has_training_recipe and isinstance(trained, TaskRecipe) and not on_text:
        defaults |= trained.model_dump(mode="json", include={*_TRAINING_SECTIONS, "tasks", "data", "scoring"})
    elif teacher.has_training_recipe and isinstance(trained, TextRecipe) and not on_tasks:
        defaults |= trained.model_dump(mode="json", include={*_TRAINING_SECTIONS, "data"})
    elif on_tasks:
        defaults["data"] = {"inputs_length": trained.inputs_length, "targets_length": trained.targets_length}
    defaults.get("train", {}).pop("device", None)  # belongs to the machine that trained the teacher
    if "tasks" not in defaults and not on_tasks:
        defaults.setdefault("data", {})["tokenizer"] = {"kind": "file", "path": _tokenizer_path(teacher)}
    return defaults


def _check_trained_tokenizer(tree: Node, teacher: CheckpointHandle) -> None:
    """Raise RecipeError if the vocabulary that the recipe `tree` would train certainly differs from the teacher's."""
    tokenizer = teacher.tokenizer
    properties = {
        "vocab_size": tokenizer.vocab_size,
        "num_sentinels": len(tokenizer.sentinels),
        "byte_fallback": bool(tokenizer.is_byte_V.any()),
    }
    for name, value in properties.items():
        key = f"data.tokenizer.{name}"
        if (named := resolve.stated(tree, key)) not in (None, value):
            raise RecipeError(
                f"{key} ({json.dumps(named)}): a student shares the tokenizer of its teacher {teacher.path}: "
                f"leave {key} out, or take {key}={json.dumps(value)}"
            )


def _tokenizer_path(teacher: CheckpointHandle) -> str:
    return str((find_tokenizer(teacher.path) or teacher.path / "tokenizer.json").absolute())


def _check(job: DistillJob) -> None:
    """Check that the student can learn from the teacher, and be compared with the baseline.

    Raises:
        RecipeError: their vocabularies differ, or the student is larger than or equal to the teacher.
        DataError: files of the tasks are missing.
    """
    recipe, teacher, student, baseline, _ = job
    check_tokenizer(recipe, teacher.tokenizer)
    student_spec, teacher_spec = recipe.model, teacher.recipe.model
    if student is not None:
        check_shape(student.recipe.model, student_spec, str(student.path))
    for option, other in (("student", student), ("baseline", baseline)):
        if other is not None and other.tokenizer.sha256 != teacher.tokenizer.sha256:
            raise RecipeError(
                f"--{option} {other.path}: has another tokenizer than the teacher {teacher.path}, so their "
                "probabilities cannot be compared: take models that were trained with the same tokenizer.json"
            )
    if student_spec.vocab_size != teacher_spec.vocab_size:
        raise RecipeError(
            f"model.vocab_size: the student has {student_spec.vocab_size}, its teacher {teacher_spec.vocab_size}: "
            "probabilities of different vocabularies cannot be compared: leave it out, or take a --student of that "
            "many rows"
        )
    both_dense = teacher_spec.num_experts == student_spec.num_experts == 1
    if both_dense and not differing_dimensions(student_spec, teacher_spec):
        raise RecipeError(
            f"--teacher {teacher.path}: a dense model (num_experts: 1), of which the dense student is a copy: name a "
            "sparse teacher, or a smaller student by --student"
        )
    student_parameters, teacher_parameters = count(student_spec).parameters, count(teacher_spec).parameters
    if student_parameters > teacher_parameters:
        raise RecipeError(
            f"model: a student of {student_parameters:,} parameters is larger than its teacher {teacher.path}, of "
            f"{teacher_parameters:,}: take a smaller --student, or a smaller model.num_experts"
        )
    _check_student_init(recipe, teacher)
    if isinstance(recipe, DistillTasksRecipe):
        finetuning.check_tasks(recipe)


def _check_student_init(recipe: Recipe, teacher: CheckpointHandle) -> None:
    """Raise RecipeError if the student is to copy weights that the teacher does not have."""
    student, student_spec, teacher_spec = recipe.student, recipe.model, teacher.recipe.model
    if not isinstance(student, FromTeacherInit):
        return
    if teacher_spec.num_experts == 1 and student.experts != "random_init":
        raise RecipeError(
            f"student.experts ({student.experts}): the teacher {teacher.path} is dense (num_experts: 1) and has none: "
            "leave it out, or name a sparse teacher"
        )
    if student.experts == "most_used" and student_spec.num_experts > teacher_spec.num_experts:
        raise RecipeError(
            f"model.num_experts: a student of {student_spec.num_experts} cannot take the most used of "
            f"{teacher_spec.num_experts}: take fewer, or student.experts=mean"
        )
    differing = differing_dimensions(student_spec, teacher_spec)
    if differing and student.on_shape_mismatch == "error":
        dimensions = ", ".join(f"{name} {own} (the teacher's is {other})" for name, own, other in differing)
        raise RecipeError(
            f"model: the teacher's weights do not fit a student of {dimensions}: "
            "student.on_shape_mismatch=random_init copies those that do, "
            "student.kind=random_init starts from initial weights"
        )
