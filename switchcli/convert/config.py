"""config.json of T5 and SwitchTransformers into a `ModelSpec`, by what transformers does with each key.

The way back is in `express`; weights are read in `files`. The facts are those of transformers 5.24, which
keeps the keys of version 4. A key that changes what the model computes, and has a value that we cannot build, is
refused; keys without effect are passed over.

transformers counts `expert_capacity` slots of an expert in each sequence, whatever its length. Ours is a share of the
group; the two are equal with one sequence a group, `min_capacity` = `expert_capacity`, and a capacity factor that gives
no more than that up to the longest sequence.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationError

from switchcli.convert.weight_names import Kind
from switchcli.errors import CheckpointError
from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.moe.router import SwitchRouter
from switchcli.spec import EOS, MOST, PAD, Spec
from switchcli.user_files import read_regular

NAME: Final = "config.json"
_MAX_BYTES: Final = 1 << 20
_SIZES: Final = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "num_experts",
    "expert_capacity",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
"""The keys of config.json that `bound` checks; other keys of the file, such as a trainer's `seed`, are ignored."""
_CLASSES: Final[Mapping[str, Kind]] = {
    "T5ForConditionalGeneration": "t5",
    "T5WithLMHeadModel": "t5",
    "SwitchTransformersForConditionalGeneration": "switch_transformers",
}


class StackLengths(NamedTuple):
    """Tokens of the longest sequence of each stack for which capacities are to agree."""

    encoder: int
    decoder: int


class _Shape(Spec):
    """What both kinds have. Keys that every `save_pretrained` writes are required: their defaults differ by kind."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: int = Field(ge=1)
    d_model: int = Field(ge=1)
    d_kv: int = Field(ge=1)
    d_ff: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_decoder_layers: int | None = Field(default=None, ge=1)
    relative_attention_num_buckets: int = Field(default=32, ge=4, multiple_of=4)
    relative_attention_max_distance: int = Field(default=128, ge=2)
    dropout_rate: float = Field(default=0.1, ge=0.0, lt=1.0)
    layer_norm_epsilon: float = Field(default=1e-6, gt=0.0)
    tie_word_embeddings: bool = True
    is_encoder_decoder: Literal[True] = True
    pad_token_id: Literal[0] = 0
    eos_token_id: Literal[1] = 1
    decoder_start_token_id: Literal[0] | None = None
    quantization_config: None = None

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers or self.num_layers

    def _spec(self, scaled: bool, **more: Any) -> ModelSpec:
        return ModelSpec(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            d_ff=self.d_ff,
            d_kv=self.d_kv,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            num_decoder_layers=None if self.decoder_layers == self.num_layers else self.decoder_layers,
            tie_embeddings=scaled,
            dropout=self.dropout_rate,
            layer_norm_epsilon=self.layer_norm_epsilon,
            relative_attention_num_buckets=self.relative_attention_num_buckets,
            relative_attention_max_distance=self.relative_attention_max_distance,
            **more,
        )


class T5Config(_Shape):
    """The dense model: 1.0 (relu, tied) and 1.1 (gated-gelu, with a softmax matrix of its own)."""

    model_type: Literal["t5"] = "t5"
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"
    dense_act_fn: Literal["relu", "gelu_new"] | None = None
    scale_decoder_outputs: bool | None = None
    """Version 5's: it ties the matrices whatever `tie_word_embeddings` said, and keeps here what that meant."""

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj == "gated-gelu"

    @property
    def num_experts(self) -> int:
        return 1

    def spec(self, lengths: StackLengths) -> ModelSpec:
        """The same model in our words. A `ValueError` says what is wrong with it."""
        if self.dense_act_fn not in (None, "gelu_new" if self.gated else "relu"):
            raise ValueError(f"dense_act_fn ({self.dense_act_fn}) is not that of {self.feed_forward_proj}")
        scaled = self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs
        return self._spec(scaled, activation="geglu" if self.gated else "relu")


class SwitchConfig(_Shape):
    """The sparse model: relu, top-1 routing."""

    model_type: Literal["switch_transformers"] = "switch_transformers"
    num_experts: int = Field(ge=2)
    expert_capacity: int = Field(ge=1)
    num_sparse_encoder_layers: int = Field(ge=0)
    num_sparse_decoder_layers: int = Field(ge=0)
    encoder_sparse_step: int | None = Field(default=None, ge=0)
    decoder_sparse_step: int | None = Field(default=None, ge=0)
    router_jitter_noise: float = Field(default=0.01, ge=0.0, lt=1.0)
    router_dtype: Literal["float32"] = "float32"
    """In bfloat16 transformers chooses by probabilities rounded to 8 bits, some of them equal; we choose by logits."""
    router_z_loss_coef: float = Field(default=0.001, ge=0.0)
    router_aux_loss_coef: float = Field(default=0.001, ge=0.0)
    router_bias: Literal[False] = False
    router_type: Literal["tokens_masked"] = "tokens_masked"
    num_selected_experts: Literal[1] = 1
    dense_act_fn: Literal["relu"] = "relu"

    @property
    def gated(self) -> bool:
        return False

    def sparse_layers(self, stack: Stack) -> tuple[int, ...]:
        """Where transformers puts experts. A step that the file states counts, not the number that it came from."""
        if stack == "encoder":
            blocks, number, step = self.num_layers, self.num_sparse_encoder_layers, self.encoder_sparse_step
        else:
            blocks, number, step = self.decoder_layers, self.num_sparse_decoder_layers, self.decoder_sparse_step
        return sparse_blocks(blocks, sparse_step(blocks, number) if step is None else step)

    def spec(self, lengths: StackLengths) -> ModelSpec:
        """The same model in our words, its capacities equal for sequences of up to `lengths`."""
        encoder, decoder = map(self.sparse_layers, STACKS)
        if not encoder and not decoder:
            return self._spec(self.tie_word_embeddings)
        blocks = (self.num_layers, self.decoder_layers)
        every = next((n for n in range(1, min(blocks) + 1) if (encoder, decoder) == _every(n, blocks)), None)
        where: dict[str, Any] = (
            {"sparse_every": every} if every else {"sparse_encoder_layers": encoder, "sparse_decoder_layers": decoder}
        )
        # One router serves both stacks unless that would leave the shorter one less than a slot by the factor alone.
        shared = self.expert_capacity * min(lengths) >= max(lengths)
        return self._spec(
            self.tie_word_embeddings,
            num_experts=self.num_experts,
            router=self._router(max(lengths) if shared else lengths.encoder),
            decoder_router=None if shared else self._router(lengths.decoder),
            balance_reduction="pooled",
            **where,
        )

    def _router(self, length: int) -> SwitchRouter:
        factor = self.expert_capacity * self.num_experts / length
        if length * factor < self.num_experts:  # by rounding: one slot must stay one
            factor = math.nextafter(factor, math.inf)
        return SwitchRouter(
            capacity_factor=factor,
            eval_capacity_factor=factor,
            min_capacity=self.expert_capacity,
            jitter=self.router_jitter_noise,
            z_loss_coef=self.router_z_loss_coef,
            balance_loss_coef=self.router_aux_loss_coef,
        )


Config = T5Config | SwitchConfig


def read_json(path: Path) -> dict[str, Any]:
    """What is in the file `path`; nothing where it is no mapping. Raises CheckpointError when it cannot be read."""
    try:
        found = json.loads(read_regular(path, _MAX_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): take a folder of save_pretrained") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: take the file that save_pretrained wrote") from error
    return found if isinstance(found, dict) else {}


def check_sizes(found: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError where the sizes in `found`, of the file `path`, are far beyond any model."""
    sizes = {key: value for key in _SIZES if type(value := found.get(key)) is int}
    for key, size in sizes.items():
        if not 1 <= size <= MOST[key]:
            raise CheckpointError(
                f"{path}: {key}: from 1 to {MOST[key]:,} (got {reprlib.repr(size)}): take the file that "
                "save_pretrained wrote"
            )
    blocks = sizes.get("num_layers", 0)
    blocks += sizes.get("num_decoder_layers", blocks)
    if blocks * sizes.get("num_experts", 1) > MOST["experts_in_all"]:
        raise CheckpointError(
            f"{path}: num_experts ({sizes['num_experts']}) in {blocks} blocks: at most {MOST['experts_in_all']:,} in "
            "all: take the file that save_pretrained wrote"
        )


def read_config(path: Path) -> Config:
    """The configuration in the file `path`. Raises CheckpointError for what is no model of ours."""
    found = read_json(path)
    kind, names = found.get("model_type"), found.get("architectures")
    names = names if isinstance(names, list) else []
    named = [_CLASSES[name] for name in names if isinstance(name, str) and name in _CLASSES] if names else [kind]
    if kind not in _CLASSES.values() or kind not in named:
        raise CheckpointError(
            f"{path}: model_type {kind!r} with architectures {names!r}: switchcli reads "
            "T5ForConditionalGeneration (t5) and SwitchTransformersForConditionalGeneration (switch_transformers)"
        )
    check_sizes(found, path)
    try:
        return T5Config.model_validate(found) if kind == "t5" else SwitchConfig.model_validate(found)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first(error)}") from error


def to_model_spec(config: Config, lengths: StackLengths, path: Path) -> ModelSpec:
    """`config.spec(lengths)`. Raises CheckpointError, naming the file `path`, where our model has rules of its own."""
    try:
        return config.spec(lengths)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    key, rule = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{key}: missing: take the file that save_pretrained wrote"
    got = f" (got {reprlib.repr(first['input'])})" if key else ""
    return f"{key}: {rule}{got}: switchcli can build no such model".removeprefix(": ")


def config_json(config: Config) -> bytes:
    """The text of config.json."""
    name = next(name for name, kind in _CLASSES.items() if kind == config.model_type)
    keys = {key: value for key, value in config.model_dump().items() if value is not None}
    return (json.dumps({"architectures": [name], **keys, "dtype": "float32"}, indent=2) + "\n").encode()


def generation_config_json() -> bytes:
    """The text of generation_config.json: the ids by which transformers' `generate` begins and ends."""
    ids = {"decoder_start_token_id": PAD, "eos_token_id": EOS, "pad_token_id": PAD}
    return (json.dumps(ids, indent=2) + "\n").encode()


def sparse_step(blocks: int, number: int) -> int:
    """transformers' step between sparse blocks: 0 is for none, which `number` = 0 is not."""
    return blocks // number if number else blocks


def sparse_blocks(blocks: int, step: int) -> tuple[int, ...]:
    """The sparse blocks that transformers makes of a step."""
    return tuple(block for block in range(blocks) if step and (step == 1 or block % step == 1))


def _every(step: int, blocks: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sparse blocks of both stacks that our `sparse_every` makes."""
    encoder, decoder = (tuple(range(step - 1, number, step)) for number in blocks)
    return encoder, decoder
