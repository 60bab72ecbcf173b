"""The base recipe of the training verbs: model, batches, optimizer, schedule, and the rules between them.

A rule within one spec is a validator of that spec. The rules here need several specs, such as a batch that must consist
of full sequences.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from switchcli.data.tokenizer.tokenizer import TokenizerSpec
from switchcli.distributed.parallel_spec import ParallelSpec, batch_problem, check_world, mesh_problems
from switchcli.errors import RecipeError
from switchcli.model.config import ModelSpec, Precision, capacity_rules
from switchcli.spec import Spec, check_rules
from switchcli.training.config import CheckpointSpec, EvalSpec, LogSpec, StartSpec, TrainSpec
from switchcli.training.optimizer_specs import Adafactor, OptimizerSpec
from switchcli.training.schedules import ScheduleSpec

if TYPE_CHECKING:
    from switchcli.data.config import DataSpec
    from switchcli.tasks.task import Task


class TrainingRecipe(Spec, ABC):
    """A run that trains a model on rows of `inputs_length` and `targets_length` tokens. Each verb has a subclass."""

    device_key: ClassVar[str] = "train.device"
    """The key of `device`."""
    verb: str
    """The command that runs this recipe."""
    description: str = ""
    """One line for `switchcli recipes list`."""
    model: ModelSpec = ModelSpec()
    """The shape of the model and its routers."""
    train: TrainSpec
    """Number of steps, batch size, seed, precision and device."""
    optimizer: OptimizerSpec = Adafactor()
    """The optimizer, by its `kind`; the default is T5's."""
    schedule: ScheduleSpec
    """The learning rate of each step, by the schedule's `kind`."""
    log: LogSpec = LogSpec()
    """How often metrics are logged, and to which trackers."""
    eval: EvalSpec = EvalSpec()
    """How often and on how much held-out text the model is evaluated."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """How often checkpoints are saved, and which of them are kept."""
    parallel: ParallelSpec = ParallelSpec()
    """How ranks share the batch, the experts and the weights."""
    start: StartSpec | None = None
    """The checkpoint to start from; absent: initial weights."""

    @property
    @abstractmethod
    def inputs_length(self) -> int:
        """Tokens in a row of encoder inputs."""

    @property
    @abstractmethod
    def targets_length(self) -> int:
        """Tokens in a row of targets."""

    @property
    def text(self) -> "DataSpec | None":
        """The text that the run trains on; None for tasks."""
        return None

    @property
    def named_tasks(self) -> "Mapping[str, Task]":
        """The tasks that the run trains on, by name; none for text."""
        return {}

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        return self.train.device

    @property
    def precision(self) -> Precision:
        return self.train.precision

    @property
    def tokenizer(self) -> TokenizerSpec | None:
        """The tokenizer that the recipe names; None for tasks, which take that of the checkpoint."""
        return None

    @property
    def parent(self) -> StartSpec | None:
        """The checkpoint of the run that this run continues as a branch; None if it is no branch."""
        return self.start if self.start is not None and self.start.keep == "run" else None

    @property
    def rows_per_step(self) -> int:
        return self.train.batch_tokens // self.inputs_length

    def microbatch_rows(self, data_ranks: int) -> int:
        """Return the number of rows in a microbatch of one of `data_ranks` ranks of the data axis.

        Raises:
            RecipeError: the ranks cannot divide the batch.
        """
        length, rows = self.inputs_length, (self.train.microbatch_tokens or 0) // self.inputs_length
        if problem := batch_problem(self.rows_per_step, data_ranks, rows or None, self.model.group_sequences, length):
            raise RecipeError(problem)
        return rows or self.rows_per_step // data_ranks

    def check_ranks(self, ranks: int) -> None:
        """Raise RecipeError if `ranks` ranks cannot form the mesh, or cannot share the batch."""
        check_world(self.parallel, ranks)
        if not self.parallel.auto:
            self.microbatch_rows(ranks // self.parallel.model)

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        check_rules(
            self._batch_rules(),
            capacity_rules(self.model, self.inputs_length, self.targets_length),
            self._parallel_rules(),
            self._schedule_rules(),
            self._data_rules(),
            self._verb_rules(),
        )
        return self

    @abstractmethod
    def _data_rules(self) -> Iterator[str]:
        """Yield an error for each broken rule about the text or the tasks."""

    def _verb_rules(self) -> Iterator[str]:
        """Yield an error for each broken rule that only this verb has."""
        yield from ()

    def _batch_rules(self) -> Iterator[str]:
        """A step must consist of full microbatches, and a microbatch of full sequences and full routing groups."""
        length, train = self.inputs_length, self.train
        sizes = {"train.batch_tokens": train.batch_tokens, "train.microbatch_tokens": train.microbatch_tokens or 0}
        partial = {key: tokens for key, tokens in sizes.items() if tokens % length}
        for key, tokens in partial.items():
            rule = f"must be a multiple of the {length} tokens of one input sequence"
            whole = length * self.model.group_sequences
            yield f"{key} ({tokens}) {rule}: try {(tokens // whole + 1) * whole}."
        if not partial:
            batch, microbatch = (tokens // length for tokens in sizes.values())
            if problem := batch_problem(batch, 1, microbatch or None, self.model.group_sequences, length):
                yield f"{problem}."

    def _parallel_rules(self) -> Iterator[str]:
        """Ranks must be able to divide the experts and the weights evenly."""
        expert_ranks, data_ranks = self.parallel.expert, self.parallel.data
        yield from mesh_problems(self.model, self.parallel.model, expert_ranks)
        if data_ranks is not None and data_ranks % expert_ranks:
            divisor = math.gcd(data_ranks, expert_ranks)
            yield f"parallel.expert ({expert_ranks}) must divide parallel.data ({data_ranks}): try {divisor}."

    def _schedule_rules(self) -> Iterator[str]:
        if problem := self.schedule.incompatibility(self.train.steps):
            yield f"schedule.{problem}"
