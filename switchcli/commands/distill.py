"""`switchcli distill`: a student from a teacher, on text or on tasks (section 4.2): what a command line comes to."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.commands import finetune, huggingface, run
from switchcli.commands.load import Opened, open_model
from switchcli.commands.start import check_outside, check_shape, check_tokenizer, is_within, recipe_of_run
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.count import count
from switchcli.model.inherit import FromCheckpoint, FromTeacher, Inheritance, other_dimensions, plan
from switchcli.model.spec import STACKS, ModelSpec
from switchcli.recipe import resolve
from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe, Distils, OnTasks, OnText
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.text import Node
from switchcli.train.saver import logical_tensors

TEACHER, STUDENT = "distill.teacher", "student.path"
HOW_LONG = {"train", "optimizer", "schedule", "eval", "checkpoint"}
"""What a recipe may leave out where the teacher was trained on the like."""

Recipe = DistillTextRecipe | DistillTasksRecipe
Warn = Callable[[str], None]


class Options(NamedTuple):
    """The command line's own names for keys of the recipe."""

    teacher: str | None = None
    student: str | None = None
    """A size, or a checkpoint."""
    baseline: str | None = None
    """A checkpoint, or a figure."""


class Distilling(NamedTuple):
    """What a command line comes to."""

    recipe: Recipe
    teacher: Opened
    student: Opened | None
    """The checkpoint that the student starts from, if it does and has not begun."""
    baseline: Opened | None


def default_out(recipe: str | None, teacher: str | None) -> Path:
    """As of every verb; of a command without a recipe runs/distill/ and the teacher's place below runs/."""
    return run.default_out(recipe) if recipe is not None else Path("runs") / "distill" / run.place(Path(teacher or "."))


def resolved(
    name: str | None, overrides: Sequence[str], options: Options, out: Path, resume: bool, warn: Warn
) -> Distilling:
    """The recipe with what the teacher says of the keys that it leaves out.

    A run that has begun keeps teacher and student, even if the folders that are named have newer checkpoints by now.

    Raises:
        RecipeError: no teacher is named, or the student cannot be its student.
        CheckpointError: a checkpoint is not there.
        DataError: of the tasks.
    """
    tree = resolve.load(name, overrides)
    if resolve.stated(tree, "verb") is not None:  # one that does not say may be that of a pre-training too
        resolve.check_verb(tree, DistillTextRecipe)
    begun = recipe_of_run(out) if resume else None
    said = _said(options.teacher, tree, TEACHER, "name the model to learn from by --teacher CHECKPOINT")
    if isinstance(begun, Distils) and is_within(begun.distill.teacher, said):
        said = begun.distill.teacher
    teacher = _open(TEACHER, said, out, warn)
    overrides = [*overrides, f"{TEACHER}={json.dumps(str(teacher.path))}"]
    if options.baseline is not None:
        overrides.append(f"distill.baseline={json.dumps(_figure(options.baseline))}")

    spec, student = dense(teacher.recipe.model), None
    if options.student in SIZES:
        overrides.append(f"model.size={options.student}")
    elif (path := options.student or resolve.stated(tree, STUDENT)) is not None:
        if isinstance(begun, Distils) and isinstance(begun.student, FromCheckpoint):
            path = begun.student.path if is_within(begun.student.path, path) else path
        student = _open("--student" if options.student else STUDENT, path, out, warn)
        spec = student.recipe.model
        overrides += ["student.kind=checkpoint", f"{STUDENT}={json.dumps(str(student.path))}"]
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
    opened = _open("--baseline", baseline, out, warn) if isinstance(baseline, str) else None
    distilling = Distilling(recipe, teacher, student, opened)
    _check(distilling)
    return distilling


def dense(teacher: ModelSpec) -> ModelSpec:
    """The dense model with the FLOPs a token of a sparse one."""
    return teacher.model_copy(
        update={"size": "custom", "num_experts": 1, "sparse_encoder_layers": None, "sparse_decoder_layers": None}
    )


def inheritance(recipe: Recipe, teacher: ModelSpec) -> Inheritance | None:
    """What the student takes of its teacher's weights; None where it starts from something else."""
    if not isinstance(recipe.student, FromTeacher):
        return None
    return plan(huggingface.empty(recipe.model), huggingface.empty(teacher), recipe.student)


def _said(option: str | None, tree: Node, key: str, way_out: str) -> str:
    said = option or resolve.stated(tree, key)
    if not isinstance(said, str):
        raise RecipeError(f"{key}: missing: {way_out}")
    return said


def _figure(said: str) -> float | str:
    try:
        return float(said)
    except ValueError:
        return said


def _open(key: str, path: str, out: Path, warn: Warn) -> Opened:
    try:
        opened = open_model(Path(path), warn)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    check_outside(key, opened.path, out)
    return opened


def _defaults(teacher: Opened, student: ModelSpec, tree: Node) -> dict[str, Any]:
    """What the teacher says of the keys that the recipe `tree` leaves out."""
    own = teacher.recipe
    on_tasks = resolve.stated(tree, "tasks") is not None
    on_text = resolve.stated(tree, "data.corpora") is not None
    below: dict[str, Any] = {"model": student.model_dump(mode="json")}
    if teacher.is_of_a_run and isinstance(own, OnTasks) and not on_text:
        below |= own.model_dump(mode="json", include={*HOW_LONG, "tasks", "data", "scoring"})
    elif teacher.is_of_a_run and isinstance(own, OnText) and not on_tasks:
        below |= own.model_dump(mode="json", include={*HOW_LONG, "data"})
    elif on_tasks:
        below["data"] = {"inputs_length": own.inputs_length, "targets_length": own.targets_length}
    below.get("train", {}).pop("device", None)  # of the machine that the teacher was trained on
    if "tasks" not in below and not on_tasks:
        below.setdefault("data", {})["tokenizer"] = {"kind": "file", "path": _tokenizer(teacher)}
    return below


def _tokenizer(teacher: Opened) -> str:
    return str((teacher.path / "tokenizer.json").absolute())


def _check(distilling: Distilling) -> None:
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
            "one vocabulary say nothing of another: leave it out"
        )
    if theirs.num_experts == 1 and ours == dense(theirs):
        raise RecipeError(
            f"--teacher {teacher.path}: a dense model (num_experts: 1), of which the dense student is a copy: name a "
            "sparse teacher, or a smaller student by --student"
        )
    if theirs.num_experts == 1 and isinstance(recipe.student, FromTeacher) and recipe.student.experts != "fresh":
        raise RecipeError(
            f"student.experts ({recipe.student.experts}): the teacher {teacher.path} is dense (num_experts: 1) and has "
            "none: leave it out, or name a sparse teacher"
        )
    larger, smaller = count(ours).parameters, count(theirs).parameters
    if larger > smaller:
        raise RecipeError(
            f"model: a student of {larger:,} parameters is larger than its teacher {teacher.path}, of {smaller:,}: "
            "take a smaller --student"
        )
    _check_inheritance(recipe, teacher)
    _check_groups(recipe, teacher)
    if isinstance(recipe, DistillTasksRecipe):
        finetune.check_tasks(recipe)


def _check_inheritance(recipe: Recipe, teacher: Opened) -> None:
    if not isinstance(recipe.student, FromTeacher) or recipe.student.unfit == "fresh":
        return
    unlike = other_dimensions(recipe.model, teacher.recipe.model)
    if unlike:
        said = ", ".join(f"{name} {ours} (the teacher's is {theirs})" for name, ours, theirs in unlike)
        raise RecipeError(
            f"model: the teacher's weights do not fit a student of {said}: student.unfit=fresh copies those that do, "
            "student.kind=fresh starts from initial weights"
        )


def _check_groups(recipe: Recipe, teacher: Opened) -> None:
    """The teacher's groups must be whole in what it is asked about at a time."""
    spec, settings = teacher.recipe.model, recipe.distill
    mode = "training" if settings.mode == "training" else settings.capacity
    stacks = [stack for stack in STACKS if spec.sparse_layers(stack)]
    group = math.lcm(*(spec.router_of(stack).together(mode) for stack in stacks))
    rows = (recipe.train.microbatch_tokens or recipe.train.batch_tokens) // recipe.inputs_length
    if rows % group:
        raise RecipeError(
            f"distill.capacity ({settings.capacity}): the teacher counts it over {group} sequences, and a microbatch "
            f"of {rows} does not hold whole groups: take distill.capacity=dropless, or a multiple of "
            f"{group * recipe.inputs_length} tokens"
        )


def names_of(plan: Inheritance, teacher: ModelSpec) -> list[str]:
    """The logical names of the teacher's tensors that a student takes."""
    wanted = {*plan.copied, *plan.from_experts.values()}
    logical = logical_tensors(huggingface.empty(teacher))
    stacked = {name: name.replace(".experts.", ".experts.{}.") for name in wanted if ".experts." in name}
    each = {one.format(expert) for one in stacked.values() for expert in range(teacher.num_experts)}
    return [name for name in logical if name in wanted or name in each]


def facts(distilling: Distilling, text: str, batches: str) -> Mapping[str, str | int | float]:
    """What a teacher's kept answers depend on."""
    recipe = distilling.recipe
    settings = recipe.distill
    assert settings.answers is not None
    return {
        "format": 1,
        "teacher": distilling.teacher.identity(),
        "text": text,
        "batches": batches,
        "rows_per_step": recipe.rows_per_step,
        "targets_length": recipe.targets_length,
        "top_k": min(settings.answers.top_k, recipe.model.vocab_size),
        "precision": settings.answers.precision,
        "temperature": settings.temperature,
        "capacity": settings.capacity,
    }
