"""The recipe of each verb, composed of the specs of other packages."""

import math
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from switchcli.data.config import DataSpec, TextSpec
from switchcli.data.tokenizer.tokenizer import TokenizerSpec
from switchcli.distributed.parallel_spec import ALONE, ParallelSpec
from switchcli.errors import RecipeError
from switchcli.model.config import Precision
from switchcli.model.moe.router import Policy
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.model.trainable_sets import TrainableSet, check
from switchcli.recipe import library, resolve
from switchcli.recipe.sizes import CUSTOM, SIZES
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.spec import VOCAB_SIZE, Spec, check_rules
from switchcli.tasks.config import TaskDataSpec, TaskSpec, duplicate_names, tasks_of
from switchcli.tasks.task import Task
from switchcli.training.config import DistillSpec, ScoringSpec, StartSpec, StudentSpec
from switchcli.training.schedules import Constant, InverseSquareRoot, ScheduleSpec


class TextRecipe(TrainingRecipe, ABC):
    """A run that trains on plain text."""

    schedule: ScheduleSpec = InverseSquareRoot()
    """The learning rate of each step, by the schedule's `kind`; the default is T5's for pre-training."""
    data: DataSpec = DataSpec()
    """The text to train on, the tokenizer and the objective."""

    @property
    def text(self) -> DataSpec:
        return self.data

    @property
    def tokenizer(self) -> TokenizerSpec:
        return self.data.tokenizer

    @property
    def inputs_length(self) -> int:
        return self.data.objective.inputs_length

    @property
    def targets_length(self) -> int:
        return self.data.objective.targets_length

    def _data_rules(self) -> Iterator[str]:
        tokenizer, model_vocab_size = self.data.tokenizer, self.model.vocab_size
        if tokenizer.kind == "train" and tokenizer.vocab_size > model_vocab_size:
            yield (
                f"data.tokenizer.vocab_size ({tokenizer.vocab_size}) must be at most the {model_vocab_size} rows of "
                f"model.vocab_size: take at most {model_vocab_size}, or leave model.vocab_size out of a run from "
                "scratch."
            )
        shards = self.data.stream_shards
        if self.data.access == "stream" and self.rows_per_step % shards:
            yield (
                f"data.stream_shards ({shards}) must divide the {self.rows_per_step} sequences of a step: try "
                f"data.stream_shards={math.gcd(shards, self.rows_per_step)}."
            )


class TaskRecipe(TrainingRecipe, ABC):
    """A run that trains on text-to-text tasks and is scored on them."""

    schedule: ScheduleSpec = Constant()
    """The learning rate of each step, by the schedule's `kind`; the default is T5's for fine-tuning."""
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    """Names of tasks and suites, or tasks of your own (`kind: files`)."""
    data: TaskDataSpec = TaskDataSpec()
    """Where the examples are, the lengths of rows in tokens, and the mixture of the tasks."""
    scoring: ScoringSpec = ScoringSpec()
    """How answers are generated and scored, on how many examples."""

    @property
    def named_tasks(self) -> Mapping[str, Task]:
        return tasks_of(self.tasks)

    @property
    def inputs_length(self) -> int:
        return self.data.inputs_length

    @property
    def targets_length(self) -> int:
        return self.data.targets_length

    def _data_rules(self) -> Iterator[str]:
        eval_steps, save_steps = self.eval.every_steps, self.checkpoint.save_every_steps
        if eval_steps % save_steps and self.checkpoint.keep_best:
            yield (
                f"eval.every_steps ({eval_steps}) must be a multiple of checkpoint.save_every_steps ({save_steps}), so "
                "that the best checkpoint of each task exists and can be kept: try "
                f"checkpoint.save_every_steps={eval_steps}."
            )
        yield from duplicate_names(self.tasks)
        yield from _label_rules(self.tasks, self.scoring)


class PretrainRecipe(TextRecipe):
    """A run of `switchcli pretrain`. With `start`, keys of `model` that are left out come from the checkpoint."""

    verb: Literal["pretrain"] = "pretrain"
    """The command that runs this recipe."""


class FinetuneRecipe(TaskRecipe):
    """A run of `switchcli finetune`. Keys of `model` that are left out come from the checkpoint."""

    verb: Literal["finetune"] = "finetune"
    """The command that runs this recipe."""
    start: StartSpec
    """The checkpoint to start from."""
    update: TrainableSet = "all"
    """Which weights are trained: all, non_expert, expert (with the routers) or dense_feed_forward."""

    def _verb_rules(self) -> Iterator[str]:
        try:
            check(self.model, self.update)
        except ValueError as error:
            yield f"update ({self.update}): {error}"


class DistillRecipe(TrainingRecipe, ABC):
    """A run of `switchcli distill`.

    Keys that are left out come from the teacher's run: the text or the tasks, the number of steps, batch, optimizer and
    schedule. The default `model` is the dense model of the teacher's shape.
    """

    distill: DistillSpec
    """The teacher, and how the student learns from it."""
    student: StudentSpec = FromTeacherInit()
    """The initial weights of the student, by `kind`: teacher, random_init or checkpoint."""

    def _verb_rules(self) -> Iterator[str]:
        if self.start is not None and self.start.keep != "run":
            yield (
                f"start.keep ({self.start.keep}): `student` says what a student begins with: take start.keep=run to "
                "continue a distillation, or student.kind=checkpoint"
            )


class DistillTextRecipe(TextRecipe, DistillRecipe):
    """Distillation on plain text, as in pre-training (Tables 6 and 7)."""

    verb: Literal["distill"] = "distill"
    """The command that runs this recipe."""

    def _verb_rules(self) -> Iterator[str]:
        yield from super()._verb_rules()
        if self.distill.targets != "data":
            yield (
                f"distill.targets ({self.distill.targets}): the spans of plain text are no answers to generate: take "
                "distill.targets=data, or distill on tasks."
            )


class DistillTasksRecipe(TaskRecipe, DistillRecipe):
    """Distillation on tasks (Table 8)."""

    verb: Literal["distill"] = "distill"
    """The command that runs this recipe."""


class CapacitySpec(Spec):
    """With which capacity of the experts a checkpoint is evaluated."""

    capacity: Policy | Annotated[tuple[Policy, ...], Field(min_length=1)] | None = None
    """How routers count capacity: `paper` is the router's eval_capacity_factor, `dropless` a slot for every token, a
    number replaces the factor; of several values each is taken in turn. Absent: that of the run, and without one
    `paper` for text, `dropless` for answers and prune, and for losses on tasks of a model that no run trained."""

    @property
    def capacities(self) -> tuple[Policy, ...]:
        """The values to take in turn; none if the key is absent."""
        if self.capacity is None:
            return ()
        return self.capacity if isinstance(self.capacity, tuple) else (self.capacity,)


class EvalRecipe(Spec):
    """A run of `switchcli eval`: what a checkpoint is evaluated on, and how its answers are decoded.

    Keys that are left out come from the run that trained the checkpoint: tasks or text, lengths, decoding.
    """

    device_key: ClassVar[str] = "device"
    parallel: ClassVar[ParallelSpec] = ALONE
    """Ranks share the batches, and nothing else."""
    verb: Literal["eval"] = "eval"
    """The command that runs this recipe."""
    description: str = ""
    """One line for `switchcli recipes list`."""
    tasks: tuple[TaskSpec, ...] = ()
    """Names of tasks and suites, tasks of your own (`kind: files`), or names of the checkpoint's own tasks."""
    data: TaskDataSpec = TaskDataSpec()
    """Where the examples are, the lengths of rows in tokens, and the mixture of the tasks."""
    text: TextSpec | None = None
    """Held-out text to measure the loss on; absent: if `tasks` is too, the text of the run."""
    scoring: ScoringSpec = ScoringSpec()
    """How answers are generated and scored, on how many examples."""
    eval: CapacitySpec = CapacitySpec()
    """With which capacity of the experts the checkpoint is evaluated."""
    precision: Precision = "float32"
    """Precision of the matrix products; the default is the most accurate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device; `auto` takes a GPU if there is one."""

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        check_rules(duplicate_names(self.tasks), _label_rules(self.tasks, self.scoring))
        return self


def _label_rules(specs: Sequence[TaskSpec], scoring: ScoringSpec) -> Iterator[str]:
    """Yield an error if answers are to be chosen among labels that some tasks do not have."""
    tasks = tasks_of(specs).values()
    without = [task.name for task in tasks if not task.labels]
    if scoring.by == "likelihood" and without:
        others = [task.name for task in tasks if task.labels]
        fix = f"score only those that have (tasks=[{', '.join(others)}])" if others else "give a task of your own some"
        yield (
            f"scoring.by (likelihood) chooses among the labels of a task, and {', '.join(without)} has none: {fix}, or "
            "take scoring.by=generation"
        )


RECIPES: Mapping[str, type[Spec]] = MappingProxyType(
    {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "distill": DistillTextRecipe, "eval": EvalRecipe}
)
"""The recipe of each verb that takes one. For distill it is the one on text."""
resolve.SCHEMAS.extend([*RECIPES.values(), DistillTasksRecipe])


def schema_of(tree: Node) -> type[Spec] | None:
    """Return the recipe class for the verb of `tree`, or None if the verb is not clear or takes no recipe."""
    verb = library.verb_of(tree)
    if verb == "distill" and tree.stated("tasks") is not None:
        return DistillTasksRecipe
    return RECIPES.get(verb or "")


def resolve_standalone(name: str | None, overrides: Sequence[str] = ()) -> Spec:
    """Return the recipe `name`, or the overrides alone, as its verb resolves it without the checkpoint it may need.

    In place of the checkpoint's keys there are stand-ins: 8 experts, T5's vocabulary, and a long run for a student.

    Raises:
        RecipeError: one line for each error.
    """
    return validate_standalone(resolve.read(name, overrides), name or "the checkpoint")


def validate_standalone(source: resolve.Source, where: str) -> Spec:
    """Validate a recipe that was read, like `resolve_standalone`. `where` is the source of the stand-ins in errors."""
    tree = source.merge()
    schema = schema_of(tree) or (EvalRecipe if tree.stated("tasks") is not None else PretrainRecipe)
    checkpoint_keys: Mapping[str, Any] = {}
    if schema is FinetuneRecipe:
        checkpoint_keys = {"start": {"checkpoint": "CHECKPOINT"}, "model": {"num_experts": 8}}
    elif issubclass(schema, DistillRecipe):
        checkpoint_keys = {"distill": {"teacher": "CHECKPOINT"}, "train": {"steps": 10**9, "batch_tokens": 2**20}}
    if checkpoint_keys:
        stand_ins = {
            part: {key: value for key, value in keys.items() if tree.find(f"{part}.{key}") is None}
            for part, keys in checkpoint_keys.items()
        }
        tree = source.merge(resolve.layer(stand_ins, where))
    return resolve.validate(tree, schema, VOCAB_SIZE if checkpoint_keys else None)


def validate_text_recipe(source: resolve.Source, name: str) -> TextRecipe:
    """Return `validate_standalone(source, name)` if that recipe trains on plain text.

    Raises:
        RecipeError: one line for each error; or the recipe trains on tasks.
    """
    recipe = validate_standalone(source, name)
    if not isinstance(recipe, TextRecipe):
        raise RecipeError(f"{name}: this recipe reads no plain text: name one of pretrain, or of distill on text")
    return recipe


def editor_schema(verb: str) -> dict[str, Any]:
    """Return the JSON Schema with which an editor completes recipe files of a verb.

    It has `extends` and the names of the sizes. No key is required, as the extended recipe may have it.
    """
    if verb != "distill":
        return _editor_schema(RECIPES[verb])
    on_text, on_tasks = (_editor_schema(recipe) for recipe in (DistillTextRecipe, DistillTasksRecipe))
    definitions = on_text.pop("$defs") | on_tasks.pop("$defs")
    return {"$defs": definitions, "anyOf": [on_text, on_tasks]}


def _editor_schema(recipe: type[Spec]) -> dict[str, Any]:
    schema = recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "The recipe that this one changes."}
    for definition in (schema, *schema["$defs"].values()):
        definition.pop("required", None)
    if "ModelSpec" in schema["$defs"]:
        schema["$defs"]["ModelSpec"]["properties"]["size"]["enum"] = [CUSTOM, *SIZES]
    return schema
