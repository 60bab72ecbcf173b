"""The recipe of each verb: the rooms' specs put together, and the rules between them.

A rule within one spec lives in that spec. Here are those that need two, such as a batch in whole sequences.
"""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import model_validator

from switchcli.data.spec import DataSpec
from switchcli.model.spec import STACKS, ModelSpec
from switchcli.recipe.sizes import CUSTOM, SIZES
from switchcli.spec import Spec
from switchcli.train.optimizer import Adafactor, OptimizerSpec
from switchcli.train.schedule import InverseSquareRoot, ScheduleSpec
from switchcli.train.spec import CheckpointSpec, EvalSpec, LogSpec, TrainSpec


class PretrainRecipe(Spec):
    """One run of `switchcli pretrain`."""

    verb: Literal["pretrain"] = "pretrain"
    """The command that runs this recipe."""
    description: str = ""
    """One line for `switchcli recipes list`."""
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    train: TrainSpec
    optimizer: OptimizerSpec = Adafactor()
    """By its `kind`: adafactor, adamw."""
    schedule: ScheduleSpec = InverseSquareRoot()
    """By its `kind`: inverse_square_root, cosine, linear."""
    log: LogSpec = LogSpec()
    eval: EvalSpec = EvalSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if broken := [
            *self._batch_rules(),
            *self._capacity_rules(),
            *self._vocabulary_rules(),
            *self._schedule_rules(),
        ]:
            raise ValueError("\n".join(broken))
        return self

    def _batch_rules(self) -> Iterator[str]:
        length = self.data.span_corruption.inputs_length
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
        spans, experts = self.data.span_corruption, self.model.num_experts
        lengths = {"encoder": spans.inputs_length, "decoder": spans.targets_length}
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

    def _vocabulary_rules(self) -> Iterator[str]:
        tokenizer, rows = self.data.tokenizer, self.model.vocab_size
        if tokenizer.kind == "train" and tokenizer.vocab_size > rows:
            yield (
                f"data.tokenizer.vocab_size ({tokenizer.vocab_size}) must be at most the {rows} rows of "
                f"model.vocab_size: try model.vocab_size={tokenizer.vocab_size}."
            )

    def _schedule_rules(self) -> Iterator[str]:
        schedule, steps = self.schedule, self.train.steps
        # T5's inverse square root may stay in its constant part: its warm-up is no ramp.
        if schedule.kind != "inverse_square_root" and schedule.warmup_steps > steps:
            yield (
                f"schedule.warmup_steps ({schedule.warmup_steps}) must be at most train.steps ({steps}): "
                f"try {steps // 10}."
            )


RECIPES: Mapping[str, type[Spec]] = MappingProxyType({"pretrain": PretrainRecipe})
"""The recipe of each verb that has one."""


def editor_schema(recipe: type[Spec]) -> dict[str, Any]:
    """The JSON Schema by which an editor completes a recipe file: with `extends`, the names of the sizes, and no key
    required, since the file that is extended may hold it."""
    schema = recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "The recipe that this one changes."}
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    schema["$defs"]["ModelSpec"]["properties"]["size"]["enum"] = [CUSTOM, *SIZES]
    return schema


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
