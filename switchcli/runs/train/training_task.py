"""TrainingTask: the part of a run that differs between training verbs. The common part is in trainer.py.

Its class methods resolve the recipe, before there is a run. `Pretraining` and `Finetuning` (section 4.1) are here,
distillation in distilling.py.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.model_weights import load_weights
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import CheckpointError, RecipeError
from switchcli.metric_names import TASKS_AVERAGE
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.init import initial_weights
from switchcli.model.trainable_sets import TrainableSet
from switchcli.recipe import resolve
from switchcli.recipe.schema import RECIPES, PretrainRecipe, TaskRecipe
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.devices.costs import planner_of
from switchcli.runs.inputs.loading import read_tokenizer
from switchcli.runs.inputs.task_data import TaskRunData
from switchcli.runs.inputs.text_data import TextRunData
from switchcli.runs.inputs.train_data import RunData, TrainData
from switchcli.runs.job.job import Job
from switchcli.runs.job.pins import START, Pin, PinFinder
from switchcli.runs.job.same_model import check_num_experts, check_shape, check_tokenizer, check_trained_tokenizer
from switchcli.runs.train import branching
from switchcli.spec import Spec
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import shell_words
from switchcli.training.checkpointer import load_optimizer_state
from switchcli.training.loss import Objective
from switchcli.training.measure import Evaluator
from switchcli.training.optimizers import Optimizer

if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer


class TrainingTask:
    """The data, the initial weights and the loss of a run, and additions to its result.

    By default, a run starts from the checkpoint that `start` names.
    """

    verb: ClassVar[str]
    """The command."""
    update: TrainableSet = "all"
    """The weights that are trained."""
    teacher: ModelSpec | None = None
    """The model whose forward pass is part of every step, if there is one."""

    # The recipe

    @classmethod
    def resolve_job(cls, source: resolve.Source, finder: PinFinder) -> Job:
        """Resolve a recipe that was read.

        1. Merge it.
        2. Pin each key that names a checkpoint to one step (`pins`).
        3. Add what these checkpoints define for keys that the recipe leaves out (`defaults`).
        4. Validate it, and refuse what cannot run (`check`).

        Raises:
            RecipeError: the recipe breaks a rule, or does not name a checkpoint that the verb needs.
            CheckpointError: a checkpoint does not exist or cannot be used.
            DataError: files that the recipe names are missing or cannot be read.
        """
        tree = source.merge()
        cls.check_verb(tree)
        try:
            pins = cls.pins(tree, finder)
        except CheckpointError as error:
            if unknown := resolve.unknown_keys(tree, cls.schema(tree)):
                raise RecipeError(*unknown, *error.lines) from error
            raise
        fixed = {**{key: pin.path for key, pin in pins.items()}, **cls.fixed(tree, pins)}
        source = source.overridden(*(resolve.override(key, value) for key, value in fixed.items()))
        tree = source.merge(cls.defaults(tree, pins))
        recipe = resolve.validate(tree, cls.schema(tree), cls.vocab_size(tree, pins, finder))
        cls.check(recipe, pins)
        return Job(recipe, {key: pin.handle for key, pin in pins.items() if pin.handle is not None})

    @classmethod
    def check_verb(cls, tree: Node) -> None:
        """Raise RecipeError if the recipe is of another verb."""
        resolve.check_verb(tree, RECIPES[cls.verb])

    @classmethod
    def pins(cls, tree: Node, finder: PinFinder) -> dict[str, Pin]:
        """Return the checkpoints that the recipe names, by key."""
        start = finder.start(tree, cls.verb)
        if start is None:
            if RECIPES[cls.verb].model_fields["start"].is_required():
                raise RecipeError(f"{START}: missing: name the model to start from by --model CHECKPOINT")
            return {}
        return {START: start}

    @classmethod
    def fixed(cls, tree: Node, pins: Mapping[str, Pin]) -> Mapping[str, Any]:
        """Return values that replace those of the recipe, by dotted key."""
        if START in pins:
            check_num_experts(tree, pins[START].model.num_experts, pins[START].path)
            if (handle := pins[START].handle) is not None:
                check_trained_tokenizer(tree, handle)
        return {}

    @classmethod
    def defaults(cls, tree: Node, pins: Mapping[str, Pin]) -> Node | None:
        """Return a layer of values for keys that the recipe may leave out: the model that the run starts from."""
        if START not in pins:
            return None
        start = pins[START]
        keys = {"model": start.model.model_dump(mode="json"), "start": {"keep": start.keep}}
        return resolve.layer(keys, f"the checkpoint {start.path}")

    @classmethod
    def schema(cls, tree: Node) -> type[Spec]:
        """Return the class of the recipe, which by now has all its layers."""
        return RECIPES[cls.verb]

    @classmethod
    def vocab_size(cls, tree: Node, pins: Mapping[str, Pin], finder: PinFinder) -> int | None:
        """Return the number for `model.vocab_size: auto`; None where the recipe itself says it."""
        return pins[START].model.vocab_size if START in pins else None

    @classmethod
    def check(cls, recipe: Any, pins: Mapping[str, Pin]) -> None:
        """Raise an error if the job cannot run."""
        if START in pins:
            _check_start(recipe, pins[START])
        data_type(recipe).check(recipe)

    @classmethod
    def open_inputs(cls, job: Job) -> float | None:
        """Open what the recipe names besides checkpoints, for a dry run. Returns and raises like `RunData`'s."""
        handle = next(iter(job.handles.values()), None)
        return data_type(job.recipe).open_inputs(job.recipe, handle and handle.tokenizer)

    # The run

    def __init__(self, job: Job, folder: RunFolder, context: DistributedContext, console: Console) -> None:
        """`folder` is the folder of the run."""
        self.job, self.folder, self.context, self.console = job, folder, context, console
        self.run_data = data_type(job.recipe)(job.recipe, context, console)

    @property
    def flops_per_step(self) -> int:
        """The FLOPs of a step over all ranks: of the model, and of a teacher's forward pass.

        What activation checkpointing computes again does not count.
        """
        recipe: TrainingRecipe = self.job.recipe
        flops = planner_of(recipe).flops_per_step
        if self.teacher is not None:
            flops += recipe.rows_per_step * count(self.teacher, recipe.inputs_length, recipe.targets_length).flops
        return flops

    def build_data(self) -> TrainData:
        """Return the data of the run. This may take hours, so the trainer checks everything else first."""
        return self.run_data.build(self.tokenizer())

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the checkpoint that the run starts from, or resumes; None if there is neither.

        A vocabulary that is trained again may differ.
        """
        if (start := self.job.handles.get(START)) is not None:
            return start.tokenizer
        return None if self.folder.newest is None else read_tokenizer(self.folder.newest, self.job.recipe.model)

    def init_weights(self, weights: ModelWeights, optimizer: Optimizer, evaluator: Evaluator) -> None:
        """Initialize the weights, and with `keep: optimizer` the optimizer state, of a new run.

        `evaluator` measures models on the data of the run.

        Raises:
            CheckpointError: as `load_optimizer_state` says.
        """
        start = self.job.handles[START]  # a run that has begun restores its own checkpoint
        without = "" if start.native else ", which holds no optimizer state: start.keep is weights"
        self.console.message(f"starting from {start.path}{without}")
        load_weights(weights, start.weights())
        if self.job.recipe.start.keep == "optimizer":
            assert start.native is not None, "refused when the recipe was resolved"
            load_optimizer_state(optimizer, start.native, weights.experts)

    def training_loss(self) -> Objective:
        """Return the loss that a step minimizes. By default it is that of held-out data."""
        return self.run_data.objective

    def results(self, trainer: "Trainer") -> dict[str, Any]:
        """Return additional keys of result.json, after training. Called on every rank."""
        return {}

    def show(self, result: Mapping[str, Any]) -> None:
        """Print the additional keys of `result`. Called on the main rank."""

    def next_commands(self, trainer: "Trainer", result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield the purpose of commands that the user may run on the model, and their words. Called on the main rank.

        By default: how to distill a sparse model.
        """
        if trainer.recipe.model.num_experts > 1:
            out = trainer.folder.path
            distill = shell_words("distill", "--teacher", out, "--out", f"{out}-student")
            yield "make a dense student of it that answers faster", distill


def data_type(recipe: TrainingRecipe) -> type[RunData]:
    """Return the type of data that a recipe trains on: the one place that tells tasks from plain text."""
    return TaskRunData if isinstance(recipe, TaskRecipe) else TextRunData


def _check_start(recipe: TrainingRecipe, start: Pin) -> None:
    """Check that a run of `recipe` can start from the checkpoint.

    Raises:
        RecipeError: the shape of the model or the tokenizer is another, or no step is left for a branch.
        CheckpointError: there is no optimizer state to carry over.
        DataError: the tokenizer that the recipe names cannot be read.
    """
    assert recipe.start is not None
    check_shape(start.model, recipe.model, start.path)
    if start.handle is None:
        return
    if recipe.start.keep == "run":
        branching.check(start.handle, recipe)
    check_tokenizer(recipe, start.handle.tokenizer)
    has_optimizer_state = start.handle.native is not None and start.handle.native.tensor_specs("optimizer")
    if recipe.start.keep == "optimizer" and not has_optimizer_state:
        raise CheckpointError(
            f"{start.path}: holds no optimizer state to carry over: start.keep=weights begins with a new one"
        )


if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer


class Pretraining(TrainingTask):
    """Train on plain text, from scratch or from a checkpoint."""

    verb = "pretrain"

    @classmethod
    def vocab_size(cls, tree: Node, pins: Mapping[str, Pin], finder: PinFinder) -> int | None:
        """Return the number of the checkpoint, of the run that goes on, or of a tokenizer that is not to be trained."""
        if START in pins or not resolve.has_auto_vocab_size(tree):
            return super().vocab_size(tree, pins, finder)
        begun = finder.begun
        if begun is None and tree.stated("data.tokenizer.kind") in (None, "train"):
            return None
        tokenizer = resolve.validate(tree, PretrainRecipe).data.tokenizer
        if begun is not None and begun.tokenizer == tokenizer:
            return begun.model.vocab_size
        return None if tokenizer.kind == "train" else resolve.padded_vocab_size(tokenizer.load().vocab_size)

    def init_weights(self, weights: ModelWeights, optimizer: Optimizer, evaluator: Evaluator) -> None:
        if self.job.recipe.start is None:
            weights.load_full(initial_weights(self.job.recipe.model, self.job.recipe.train.seed, weights.experts))
        else:
            super().init_weights(weights, optimizer, evaluator)

    def next_commands(self, trainer: "Trainer", result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        out = trainer.folder.path
        finetune = shell_words("finetune", "quickstart/finetune", "--model", out, "--out", f"{out}-finetune")
        yield "teach it two tasks that need no download", finetune
        yield from super().next_commands(trainer, result)


if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer


class Finetuning(TrainingTask):
    """Train a model from a checkpoint on a mixture of text-to-text tasks."""

    verb = "finetune"

    def __init__(self, job: Job, folder: RunFolder, context: DistributedContext, console: Console) -> None:
        super().__init__(job, folder, context, console)
        self.update = job.recipe.update

    def next_commands(self, trainer: "Trainer", result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        folder, best = trainer.folder, trainer.state.best.get(TASKS_AVERAGE)
        if best is None or best.step == trainer.state.step or not trainer.recipe.checkpoint.keep_best:
            yield "score it again", shell_words("eval", folder.path)
        else:
            path = checkpoint.checkpoint_path(folder.checkpoints, best.step)
            yield "score its best checkpoint", shell_words("eval", path)
        yield from super().next_commands(trainer, result)
