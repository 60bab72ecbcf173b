"""What the recipes of the training verbs share: model, batches, optimizer, schedule, and the rules between them.

A rule within one spec lives in that spec. Here are those that need two, such as a batch in whole sequences.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

from pydantic import model_validator

from switchcli.distributed.mesh import ParallelSpec, divides_experts, indivisible_sizes
from switchcli.model.config import STACKS, ModelSpec
from switchcli.spec import Spec
from switchcli.train.config import CheckpointSpec, EvalSpec, LogSpec, TrainSpec
from switchcli.train.optimizers import Adafactor, OptimizerSpec
from switchcli.train.schedules import ScheduleSpec


class TrainingRecipe(Spec, ABC):
    """A run that trains a model on rows of `inputs_length` and `targets_length` tokens. Each verb's own is final."""

    verb: str
    """The command that runs this recipe."""
    description: str = ""
    """One line for `switchcli recipes list`."""
    model: ModelSpec = ModelSpec()
    train: TrainSpec
    optimizer: OptimizerSpec = Adafactor()
    """The optimizer, by its `kind`."""
    schedule: ScheduleSpec
    """The learning rate of each step, by the schedule's `kind`."""
    log: LogSpec = LogSpec()
    eval: EvalSpec = EvalSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    parallel: ParallelSpec = ParallelSpec()

    @property
    @abstractmethod
    def inputs_length(self) -> int:
        """Tokens of a row of the encoder's inputs."""

    @property
    @abstractmethod
    def targets_length(self) -> int:
        """Tokens of a row of targets."""

    @property
    def rows_per_step(self) -> int:
        return self.train.batch_tokens // self.inputs_length

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        rules = (
            self._batch_rules,
            self._capacity_rules,
            self._parallel_rules,
            self._schedule_rules,
            self._text_rules,
            self._own_rules,
        )
        if broken := [line for rule in rules for line in rule()]:
            raise ValueError(*broken)
        return self

    @abstractmethod
    def _text_rules(self) -> Iterator[str]:
        """The rules of what is trained on."""

    def _own_rules(self) -> Iterator[str]:
        """The rules that only this verb has."""
        yield from ()

    def _batch_rules(self) -> Iterator[str]:
        length = self.inputs_length
        batch, microbatch = self.train.batch_tokens, self.train.microbatch_tokens or self.train.batch_tokens
        key = "train.microbatch_tokens" if self.train.microbatch_tokens else "train.batch_tokens"
        for name, tokens in {"train.batch_tokens": batch, key: microbatch}.items():
            if tokens % length:
                rule = f"must be a multiple of the {length} tokens of one input sequence"
                yield f"{name} ({tokens}) {rule}: try {_round_up(tokens, length)}."
        if batch % length or microbatch % length:
            return
        if batch % microbatch:
            sequences = next(n for n in range(microbatch // length, 0, -1) if batch // length % n == 0)
            yield f"{key} ({microbatch}) must divide train.batch_tokens ({batch}): try {sequences * length}."
        group = self.model.group_sequences * length
        if microbatch % group:
            rule = f"must be a multiple of the {group} tokens that model.router.group_sequences puts into one group"
            yield f"{key} ({microbatch}) {rule}: try {_round_up(microbatch, group)}."

    def _capacity_rules(self) -> Iterator[str]:
        """A group must hold a token for each expert, and an even share of it at least one slot."""
        experts = self.model.num_experts
        lengths = {"encoder": self.inputs_length, "decoder": self.targets_length}
        for stack in STACKS:
            router, own = self.model.router_of(stack), stack == "decoder" and self.model.decoder_router is not None
            key, group = "model.decoder_router" if own else "model.router", router.group_sequences * lengths[stack]
            if not self.model.sparse_layers(stack):
                continue
            if group < experts:
                yield (
                    f"{key}.group_sequences ({router.group_sequences}): a group of the {stack} has {group} tokens for "
                    f"{experts} experts: try {key}.group_sequences={-(-experts // lengths[stack])} or more."
                )
                continue
            factors = {"capacity_factor": router.capacity_factor, "eval_capacity_factor": router.eval_capacity_factor}
            for name, factor in factors.items():
                if not isinstance(factor, str) and group * factor < experts:
                    least = math.ceil(1000 * experts / group) / 1000
                    yield (
                        f"{key}.{name} ({factor}) gives each of {experts} experts {group * factor / experts:.2g} slots "
                        f"in a group of {group} tokens of the {stack}: take {least:g} or more, for at "
                        "least one."
                    )

    def _parallel_rules(self) -> Iterator[str]:
        experts, ranks, data = self.model.num_experts, self.parallel.expert, self.parallel.data
        if experts == 1 < ranks:
            yield f"parallel.expert ({ranks}): the model is dense (model.num_experts: 1): leave it out."
        elif experts % ranks:
            rule = f"must divide the {experts} experts of a layer (model.num_experts)"
            fitting = ", ".join(str(number) for number in range(1, experts + 1) if experts % number == 0)
            yield f"parallel.expert ({ranks}) {rule}: take one of {fitting}."
        model = self.parallel.model
        for key, size in indivisible_sizes(self.model, model):
            yield f"{key} ({size}) must be a multiple of parallel.model ({model}): try {math.gcd(size, model)}."
        if not divides_experts(self.model, model):
            yield f"parallel.model ({model}) does not divide the experts of an attention (model.sparse): leave it out."
        if self.parallel.reduction == "ordered" and self.train.microbatch_tokens is None:
            yield (
                "parallel.reduction: ordered adds up the microbatches of train.microbatch_tokens, which are the same "
                f"on any number of ranks: set it, to {self.model.group_sequences * self.inputs_length} or a multiple."
            )
        if data is not None and data % ranks:
            yield f"parallel.expert ({ranks}) must divide parallel.data ({data}): try {math.gcd(data, ranks)}."

    def _schedule_rules(self) -> Iterator[str]:
        if misfit := self.schedule.incompatibility(self.train.steps):
            yield f"schedule.{misfit}"


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
