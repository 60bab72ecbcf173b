"""The recipe of `switchcli distill`: the teacher provides what it leaves out, and the student must fit the teacher."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from switchcli.convert.tokenizer_files import find_tokenizer
from switchcli.errors import RecipeError
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.surgery.student import differing_dimensions, num_joined
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.inputs.trained_recipe import trained_recipe
from switchcli.runs.job.pins import BASELINE, OPTIONS, STUDENT, TEACHER, Pin
from switchcli.runs.job.same_model import check_shape, check_tokenizer

Recipe = DistillTextRecipe | DistillTasksRecipe
_TRAINING_SECTIONS = {"train", "optimizer", "schedule", "eval", "checkpoint"}
"""Sections that a recipe may leave out if the teacher was trained on the same type of data. The teacher's are taken."""


def teacher_of(pins: Mapping[str, Pin]) -> CheckpointHandle:
    """Return the open checkpoint of the teacher."""
    teacher = pins[TEACHER].handle
    assert teacher is not None, "it is needed whether or not the run has begun"
    return teacher


def dense_spec(teacher: ModelSpec) -> ModelSpec:
    """Return the dense model of a sparse one's shape. With top-1 feed-forwards both have the same FLOPs per token."""
    unset = ("sparse_encoder_layers", "sparse_decoder_layers", "expert_d_ff", "expert_scale")
    return teacher.model_copy(update={"size": "custom", "num_experts": 1, "shared_d_ff": 0, **dict.fromkeys(unset)})


def defaults(teacher: CheckpointHandle, student: ModelSpec, tree: Node) -> dict[str, Any]:
    """Return the values for keys that the recipe `tree` leaves out: the student's shape, and the teacher's training."""
    trained, file = trained_recipe(teacher), teacher.model_file
    is_tasks_named = tree.stated("tasks") is not None
    is_text_named = tree.stated("data.corpora") is not None
    if trained is None and not (is_tasks_named or is_text_named):
        raise RecipeError(
            f"{TEACHER} ({teacher.path}): has no record of its training: name a RECIPE, or what to train on "
            "(data.corpora=[...] or tasks=[...]) with train.steps and train.batch_tokens"
        )
    values: dict[str, Any] = {"model": student.model_dump(mode="json")}
    if trained is not None and not (is_text_named if trained.named_tasks else is_tasks_named):
        # A recipe on text has no tasks and no scoring.
        values |= trained.model_dump(mode="json", include={*_TRAINING_SECTIONS, "tasks", "data", "scoring"})
    elif is_tasks_named:
        values["data"] = {"inputs_length": file.inputs_length, "targets_length": file.targets_length}
    values.get("train", {}).pop("device", None)  # belongs to the machine that trained the teacher
    if "tasks" not in values and not is_tasks_named:
        values.setdefault("data", {})["tokenizer"] = {"kind": "file", "path": tokenizer_path(teacher)}
    return values


def tokenizer_path(teacher: CheckpointHandle) -> str:
    """Return the path of the tokenizer of the teacher."""
    return str((find_tokenizer(teacher.path) or teacher.path / "tokenizer.json").absolute())


def check_models(recipe: Recipe, pins: Mapping[str, Pin]) -> None:
    """Check that the student can learn from the teacher, and be compared with the baseline.

    Raises:
        RecipeError: their vocabularies differ, or the student is larger than or equal to the teacher.
    """
    teacher = teacher_of(pins)
    check_tokenizer(recipe, teacher.tokenizer)
    student_spec, teacher_spec = recipe.model, teacher.spec
    others = {key: pin.handle for key, pin in pins.items() if key in (STUDENT, BASELINE) and pin.handle is not None}
    if (student := others.get(STUDENT)) is not None:
        check_shape(student.spec, student_spec, str(student.path))
    for key, other in others.items():
        if other.tokenizer.sha256 != teacher.tokenizer.sha256:
            raise RecipeError(
                f"{OPTIONS[key]} {other.path}: has another tokenizer than the teacher {teacher.path}, so their "
                "probabilities cannot be compared: take models that were trained with the same tokenizer.json"
            )
    if student_spec.vocab_size != teacher_spec.vocab_size:
        raise RecipeError(
            f"model.vocab_size: the student has {student_spec.vocab_size}, its teacher {teacher_spec.vocab_size}: "
            "probabilities of different vocabularies cannot be compared: leave it out, or take a --student of that "
            "many rows"
        )
    if isinstance(recipe.student, FromTeacherInit) and recipe.student.experts == "concat":
        _check_concat(student_spec, teacher_spec, teacher.path)
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
    baseline = recipe.distill.baseline
    if isinstance(recipe, DistillTextRecipe) and isinstance(baseline, float) and baseline > 0:
        raise RecipeError(
            f"{OPTIONS[BASELINE]} {baseline:g}: on text it is the neg. log perplexity, which is minus the loss: take "
            f"{-baseline:g}"
        )


def _check_concat(student: ModelSpec, teacher: ModelSpec, path: Path) -> None:
    """Raise RecipeError unless some of the teacher's experts fill a feed-forward of the student."""
    key = "student.experts (concat)"
    if student.num_experts > 1:
        raise RecipeError(
            f"{key}: fills dense feed-forwards, and the student has {student.num_experts} experts: set "
            "model.num_experts=1, or take most_used"
        )
    if teacher.num_experts == 1 or teacher.sparse == "attention":
        raise RecipeError(f"{key}: the feed-forwards of {path} have no experts: leave it out, or name another teacher")
    if student.d_model != teacher.d_model:
        raise RecipeError(
            f"model.d_model ({student.d_model}): with {key} it is that of the experts of {path}, {teacher.d_model}"
        )
    joined, rest = num_joined(student, teacher)
    fitting = teacher.shared_d_ff + teacher.expert_width * min(max(joined, 1), teacher.num_experts)
    if joined < 1 or rest:
        beside = f"{teacher.shared_d_ff} and " if teacher.shared_d_ff else ""
        raise RecipeError(
            f"model.d_ff ({student.d_ff}): with {key} it is {beside}a multiple of the {teacher.expert_width} hidden "
            f"units of an expert of {path}: try {fitting}"
        )
    if joined > teacher.num_experts:
        raise RecipeError(
            f"model.d_ff ({student.d_ff}): has room for {joined} experts side by side, and {path} has "
            f"{teacher.num_experts} in a layer: take {fitting} or less"
        )


def _check_student_init(recipe: Recipe, teacher: CheckpointHandle) -> None:
    """Raise RecipeError if the student is to copy weights that the teacher does not have."""
    student, student_spec, teacher_spec = recipe.student, recipe.model, teacher.spec
    if not isinstance(student, FromTeacherInit):
        return
    if teacher_spec.num_experts == 1 and student.experts != "random_init":
        raise RecipeError(
            f"student.experts ({student.experts}): the teacher {teacher.path} is dense (num_experts: 1) and has none: "
            "leave it out, or name a sparse teacher"
        )
    if student.experts in ("mean", "most_used") and student_spec.expert_width != teacher_spec.expert_width:
        raise RecipeError(
            f"student.experts ({student.experts}): the teacher's experts have {teacher_spec.expert_width} hidden "
            f"units, and what they are to fill has {student_spec.expert_width}: leave it out, or set model.d_ff or "
            "model.expert_d_ff"
        )
    if student.experts in ("mean", "most_used") and teacher_spec.shared_d_ff and student_spec.num_experts == 1:
        raise RecipeError(
            f"student.experts ({student.experts}): leaves out the dense path of {teacher_spec.shared_d_ff} hidden "
            f"units beside the experts of {teacher.path}: take student.experts=concat, which has both"
        )
    if student.experts == "most_used" and student_spec.num_experts > teacher_spec.num_experts:
        raise RecipeError(
            f"model.num_experts: a student of {student_spec.num_experts} cannot take the most used of "
            f"{teacher_spec.num_experts}: take fewer, or student.experts=mean"
        )
    differing = differing_dimensions(student_spec, teacher_spec)
    has_dense = any(len(teacher_spec.sparse_layers(stack)) < teacher_spec.num_blocks(stack) for stack in STACKS)
    if student.experts == "concat" and (student_spec.d_ff > teacher_spec.d_ff or not has_dense):
        # A wider dense feed-forward begins with the teacher's; without dense ones, only experts have to fit.
        differing = [dimension for dimension in differing if dimension[0] != "d_ff"]
    if differing:
        dimensions = ", ".join(f"{name} {own} (the teacher's is {other})" for name, own, other in differing)
        raise RecipeError(
            f"model: the teacher's weights do not fit a student of {dimensions}: student.kind=random_init starts from "
            "initial weights"
        )


def check_microbatch_rows(recipe: Recipe, teacher: ModelSpec, dp_size: int) -> None:
    """Raise RecipeError if the teacher cannot divide the rows of a microbatch into whole routing groups."""
    rows, capacity = recipe.microbatch_rows(dp_size), recipe.eval.capacity or "dropless"
    # Encoder and decoder may have groups of different sizes. The rows must be a multiple of both.
    group, free = (
        math.lcm(*(teacher.router_of(stack).group_size(by) for stack in teacher.sparse_stacks))
        for by in (capacity, "dropless")
    )
    if recipe.distill.soft_fraction and rows % group:
        # Experts that choose their tokens count in groups in any mode.
        fix = "take eval.capacity=dropless, or" if rows % free == 0 else "take"
        raise RecipeError(
            f"eval.capacity ({capacity}): the teacher's routers count capacity over {group} sequences, and a "
            f"microbatch on {dp_size} ranks has {rows}: {fix} microbatches of a multiple of "
            f"{group * recipe.inputs_length} tokens"
        )
