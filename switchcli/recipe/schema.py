"""The recipe of each verb: the rooms' specs put together."""

import math
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from switchcli.data.config import DataSpec, TextSpec
from switchcli.errors import RecipeError
from switchcli.model.moe.router import Policy
from switchcli.model.surgery.student import FromTeacherInit
from switchcli.model.trainable import TrainableSet, check
from switchcli.recipe import resolve
from switchcli.recipe.sizes import CUSTOM, SIZES
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.spec import Spec
from switchcli.tasks.config import TaskDataSpec, TaskSpec, names_twice
from switchcli.train.config import Precision, StartSpec, StudentSpec
from switchcli.train.distillation import DistillSpec
from switchcli.train.schedules import Constant, InverseSquareRoot, ScheduleSpec
from switchcli.train.scoring import ScoringSpec


class TextRecipe(TrainingRecipe, ABC):
    """A run on plain text."""

    schedule: ScheduleSpec = InverseSquareRoot()
    """The learning rate of each step, by the schedule's `kind`."""
    data: DataSpec = DataSpec()

    @property
    def inputs_length(self) -> int:
        return self.data.objective.inputs_length

    @property
    def targets_length(self) -> int:
        return self.data.objective.targets_length

    def _text_rules(self) -> Iterator[str]:
        tokenizer, rows = self.data.tokenizer, self.model.vocab_size
        if tokenizer.kind == "train" and tokenizer.vocab_size > rows:
            yield (
                f"data.tokenizer.vocab_size ({tokenizer.vocab_size}) must be at most the {rows} rows of "
                f"model.vocab_size: try model.vocab_size={tokenizer.vocab_size}."
            )
        lanes = self.data.stream_shards
        if self.data.access == "stream" and self.rows_per_step % lanes:
            yield (
                f"data.stream_shards ({lanes}) must divide the {self.rows_per_step} sequences of a step: try "
                f"data.stream_shards={math.gcd(lanes, self.rows_per_step)}."
            )


class TaskRecipe(TrainingRecipe, ABC):
    """A run on text-to-text tasks, scored on them."""

    schedule: ScheduleSpec = Constant()
    """The learning rate of each step, by the schedule's `kind`."""
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    """Names of tasks and suites, or tasks of your own (`kind: files`)."""
    data: TaskDataSpec = TaskDataSpec()
    scoring: ScoringSpec = ScoringSpec()

    @property
    def inputs_length(self) -> int:
        return self.data.inputs_length

    @property
    def targets_length(self) -> int:
        return self.data.targets_length

    def _text_rules(self) -> Iterator[str]:
        evaluate, save = self.eval.every_steps, self.checkpoint.save_every_steps
        if evaluate % save and self.checkpoint.keep_best:
            yield (
                f"eval.every_steps ({evaluate}) must be a multiple of checkpoint.save_every_steps ({save}), so that "
                f"the best checkpoint of each task is there to be kept: try checkpoint.save_every_steps={evaluate}."
            )
        yield from names_twice(self.tasks)


class PretrainRecipe(TextRecipe):
    """One run of `switchcli pretrain`. With a `start`, keys of `model` that it leaves out are the checkpoint's."""

    verb: Literal["pretrain"] = "pretrain"
    """The command that runs this recipe."""
    start: StartSpec | None = None
    """Absent: from scratch."""


class FinetuneRecipe(TaskRecipe):
    """One run of `switchcli finetune`. Keys of `model` that it leaves out are the checkpoint's."""

    verb: Literal["finetune"] = "finetune"
    """The command that runs this recipe."""
    start: StartSpec
    update: TrainableSet = "all"
    """Which weights learn: all, non_expert, expert (with the routers), dense_feed_forward."""

    def _own_rules(self) -> Iterator[str]:
        try:
            check(self.model, self.update)
        except ValueError as error:
            yield f"update ({self.update}): {error}"


class DistillRecipe(TrainingRecipe, ABC):
    """A run of `switchcli distill`. What it leaves out is the teacher's: the text or the tasks, the length of the run,
    batch, optimizer and schedule; of `model` the dense model with the teacher's FLOPs a token."""

    distill: DistillSpec
    student: StudentSpec = FromTeacherInit()
    """What the student starts from, by its `kind`: teacher, fresh, checkpoint."""

    def _own_rules(self) -> Iterator[str]:
        start, steps = self.distill.start_step, self.train.steps
        if start >= steps:
            yield f"distill.start_step ({start}) must be less than train.steps ({steps}): the teacher is never asked."


class DistillTextRecipe(TextRecipe, DistillRecipe):
    """Distillation on plain text, as in pre-training (Tables 6 and 7)."""

    verb: Literal["distill"] = "distill"
    """The command that runs this recipe."""

    def _own_rules(self) -> Iterator[str]:
        yield from super()._own_rules()
        if self.distill.cache is not None and self.data.access == "stream":
            yield (
                "distill.cache: a stream is read once and in order, and answers are asked for before: take "
                "data.access=prepared, or leave them out."
            )


class DistillTasksRecipe(TaskRecipe, DistillRecipe):
    """Distillation on tasks (Table 8)."""

    verb: Literal["distill"] = "distill"
    """The command that runs this recipe."""


class EvalRecipe(Spec):
    """One run of `switchcli eval`: what a checkpoint is measured on, and how it answers.

    Keys that it leaves out are the run's that trained the checkpoint: its tasks or its text, its lengths, its decoding.
    """

    verb: Literal["eval"] = "eval"
    """The command that runs this recipe."""
    description: str = ""
    """One line for `switchcli recipes list`."""
    tasks: tuple[TaskSpec, ...] = ()
    """Names of tasks and suites, or tasks of your own (`kind: files`), which the checkpoint's may be named as well."""
    data: TaskDataSpec = TaskDataSpec()
    text: TextSpec | None = None
    """Text for the held-out neg. log perplexity."""
    scoring: ScoringSpec = ScoringSpec()
    capacities: Annotated[tuple[Policy, ...], Field(min_length=1)] | None = None
    """How the routers count capacity: `paper` by their eval_capacity_factor, `dropless`, or a factor of its own; all is
    measured under each. Absent: tasks by `scoring.capacity`, text as the run measured it."""
    precision: Precision = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if broken := [*names_twice(self.tasks)]:
            raise ValueError(*broken)
        return self


StartedRecipe = PretrainRecipe | FinetuneRecipe
"""The recipes whose key `start` may name a checkpoint to start from."""
RECIPES: Mapping[str, type[Spec]] = MappingProxyType(
    {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "distill": DistillTextRecipe, "eval": EvalRecipe}
)
"""The recipe of each verb that has one; of distill on text."""


def schema_of(tree: Node) -> type[Spec] | None:
    """The recipe of the verb that `tree` is of; None if it may be any, or the verb has none."""
    verb = resolve.verb_of(tree)
    if verb == "distill" and resolve.stated(tree, "tasks") is not None:
        return DistillTasksRecipe
    return RECIPES.get(verb or "")


def resolve_standalone(name: str, overrides: Sequence[str] = ()) -> Spec:
    """The recipe `name` by the verb that it states, without the checkpoint that it may need: any sparse one will do.

    Raises:
        RecipeError: one line for each thing that is wrong.
    """
    tree = resolve.load(name, overrides)
    schema = schema_of(tree) or (EvalRecipe if resolve.stated(tree, "tasks") is not None else PretrainRecipe)
    below: Mapping[str, Any] = {}
    if schema is FinetuneRecipe:
        below = {"start": {"checkpoint": "CHECKPOINT"}, "model": {"num_experts": 8}}
    elif issubclass(schema, DistillRecipe):
        below = {"distill": {"teacher": "CHECKPOINT"}, "train": {"steps": 10**9, "batch_tokens": 2**20}}
    if below:
        tree = resolve.load(name, overrides, resolve.layer(below, name))
    return resolve.validate(tree, schema)


def resolve_text_recipe(name: str, overrides: Sequence[str] = ()) -> TextRecipe:
    """The same of a recipe of plain text.

    Raises:
        RecipeError: one line for each thing that is wrong; or it is one of tasks.
    """
    recipe = resolve_standalone(name, overrides)
    if not isinstance(recipe, TextRecipe):
        raise RecipeError(f"{name}: this recipe reads no plain text: name one of pretrain, or of distill on text")
    return recipe


def editor_schema(verb: str) -> dict[str, Any]:
    """The JSON Schema by which an editor completes a verb's recipe file: with `extends`, the names of the sizes, and no
    key required, since the file that is extended may hold it."""
    if verb != "distill":
        return _editor_schema(RECIPES[verb])
    on_text, on_tasks = (_editor_schema(recipe) for recipe in (DistillTextRecipe, DistillTasksRecipe))
    definitions = on_text.pop("$defs") | on_tasks.pop("$defs")
    return {"$defs": definitions, "anyOf": [on_text, on_tasks]}


def _editor_schema(recipe: type[Spec]) -> dict[str, Any]:
    schema = recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "The recipe that this one changes."}
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    if "ModelSpec" in schema["$defs"]:
        schema["$defs"]["ModelSpec"]["properties"]["size"]["enum"] = [CUSTOM, *SIZES]
    return schema
