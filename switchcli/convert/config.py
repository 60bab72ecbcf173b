"""Read config.json of T5, mT5 and Switch into a `ModelSpec`, with the meaning that transformers gives each key.

to_transformers.py is the inverse, and weight_files.py reads the weights. The keys are those of transformers 4 and 5;
their meaning was checked with version 5.24. A value that changes what the model computes, and that switchcli cannot
build, is refused. Keys without effect are ignored.

transformers gives an expert `expert_capacity` slots per sequence, whatever its length. In switchcli the capacity is a
fraction of the tokens of a group. The two are equal with one sequence per group, `min_capacity` = `expert_capacity`,
and a capacity factor that gives at most that for all lengths up to the longest sequence.
"""

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationError

from switchcli.errors import CheckpointError
from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.moe.router import SwitchRouter
from switchcli.spec import EOS, MAX_EXPERTS_IN_ALL, MAX_FEW, MAX_SIZE, PAD, Spec
from switchcli.system.user_files import read_regular

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
"""The keys of config.json that `_check_sizes` checks. Others with a bound, such as a trainer's `seed`, are ignored."""
ModelType = Literal["t5", "mt5", "switch_transformers"]
"""The `model_type` of transformers."""
_CLASSES: Final[Mapping[str, ModelType]] = {
    "T5ForConditionalGeneration": "t5",
    "T5WithLMHeadModel": "t5",
    "MT5ForConditionalGeneration": "mt5",
    "SwitchTransformersForConditionalGeneration": "switch_transformers",
}


class StackLengths(NamedTuple):
    """The length in tokens, per stack, of the longest sequence for which expert capacities must agree."""

    encoder: int
    decoder: int


class _CommonConfig(Spec):
    """Keys of both model types. Keys that `save_pretrained` always writes are required: defaults differ by type."""

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

    def _model_spec(self, tie_embeddings: bool, **kwargs: Any) -> ModelSpec:
        """Return the ModelSpec with the common keys. `kwargs` are fields of ModelSpec that differ by model type."""
        return ModelSpec(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            d_ff=self.d_ff,
            d_kv=self.d_kv,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            num_decoder_layers=None if self.decoder_layers == self.num_layers else self.decoder_layers,
            tie_embeddings=tie_embeddings,
            dropout=self.dropout_rate,
            layer_norm_epsilon=self.layer_norm_epsilon,
            relative_attention_num_buckets=self.relative_attention_num_buckets,
            relative_attention_max_distance=self.relative_attention_max_distance,
            **kwargs,
        )


class T5Config(_CommonConfig):
    """config.json of a dense T5: version 1.0 (relu, tied embeddings) or 1.1 (gated-gelu, untied); or of an mT5."""

    model_type: Literal["t5", "mt5"] = "t5"
    feed_forward_proj: Literal["relu", "gated-gelu"] | None = None
    """Absent: relu in T5, gated-gelu in mT5."""
    dense_act_fn: Literal["relu", "gelu_new"] | None = None
    scale_decoder_outputs: bool | None = None
    """Key of transformers 5, which always ties the matrices. It says what `tie_word_embeddings` says in version 4."""

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj == "gated-gelu" or (self.feed_forward_proj is None and self.model_type == "mt5")

    @property
    def num_experts(self) -> int:
        return 1

    def spec(self, lengths: StackLengths) -> ModelSpec:
        """Return the model as a ModelSpec. Raises ValueError (or ValidationError) if it cannot be built."""
        if self.dense_act_fn not in (None, "gelu_new" if self.gated else "relu"):
            raise ValueError(f"dense_act_fn ({self.dense_act_fn}) is not that of {self.feed_forward_proj}")
        tied = self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs
        # Tied matrices of ours are scaled, and mT5 never scales its logits. Its `tie_word_embeddings` says nothing: the
        # published files have false, version 5 writes true, and both have two matrices.
        tied = tied and self.model_type != "mt5"
        return self._model_spec(tied, activation="geglu" if self.gated else "relu")


class SwitchConfig(_CommonConfig):
    """config.json of a Switch Transformer: relu, top-1 routing."""

    model_type: Literal["switch_transformers"] = "switch_transformers"
    num_experts: int = Field(ge=2)
    expert_capacity: int = Field(ge=1)
    num_sparse_encoder_layers: int = Field(ge=0)
    num_sparse_decoder_layers: int = Field(ge=0)
    encoder_sparse_step: int | None = Field(default=None, ge=0)
    decoder_sparse_step: int | None = Field(default=None, ge=0)
    router_jitter_noise: float = Field(default=0.01, ge=0.0, lt=1.0)
    router_dtype: Literal["float32"] = "float32"
    """In bfloat16 transformers selects experts by rounded probabilities, some of them equal; switchcli by logits."""
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
        """Return the blocks of a stack in which transformers puts experts.

        A `*_sparse_step` in the file takes precedence over the `num_sparse_*_layers` from which it was computed.
        """
        if stack == "encoder":
            num_blocks, num_sparse, step = self.num_layers, self.num_sparse_encoder_layers, self.encoder_sparse_step
        else:
            num_blocks, num_sparse, step = self.decoder_layers, self.num_sparse_decoder_layers, self.decoder_sparse_step
        return sparse_blocks(num_blocks, sparse_step(num_blocks, num_sparse) if step is None else step)

    def spec(self, lengths: StackLengths) -> ModelSpec:
        """Return the model as a ModelSpec with equal capacities for sequences of up to `lengths` tokens."""
        encoder, decoder = map(self.sparse_layers, STACKS)
        if not encoder and not decoder:
            return self._model_spec(self.tie_word_embeddings)
        # `sparse_every` says which blocks are sparse if one step gives those of both stacks. Example: of six blocks 1,
        # 3 and 5 are every second. A `*_sparse_step` of 3 gives the blocks 1 and 4, where `sparse_every` would give 2
        # and 5: these are listed.
        num_blocks = (self.num_layers, self.decoder_layers)
        layers: dict[str, Any] = {"sparse_encoder_layers": encoder, "sparse_decoder_layers": decoder}
        for step in range(1, min(num_blocks) + 1):
            if [encoder, decoder] == [tuple(range(step - 1, number, step)) for number in num_blocks]:
                layers = {"sparse_every": step}
                break
        # Both stacks share a router with the factor expert_capacity * E / max(lengths). In the shorter stack that gives
        # an expert expert_capacity * min(lengths) / max(lengths) slots. If that is less than one, each has its own.
        # Example: 64 slots and 8 experts, for 512 and 114 tokens. The factor 64 * 8 / 512 = 1 gives 64 slots for 512
        # tokens and 14 for 114, which `min_capacity` raises to 64. With 4 slots the factor is 1 / 16, which gives 0.9
        # slots for 114 tokens: the decoder has a router of its own, with the factor 4 * 8 / 114.
        shared = self.expert_capacity * min(lengths) >= max(lengths)
        return self._model_spec(
            self.tie_word_embeddings,
            num_experts=self.num_experts,
            router=self._router(max(lengths) if shared else lengths.encoder),
            decoder_router=None if shared else self._router(lengths.decoder),
            balance_reduction="pooled",
            **layers,
        )

    def _router(self, length: int) -> SwitchRouter:
        """Return the router whose capacity for `length` tokens is `expert_capacity` slots per expert."""
        # capacity = length * factor / E
        factor = self.expert_capacity * self.num_experts / length
        if length * factor < self.num_experts:  # rounded to less than one slot
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
    """Return the JSON object in a file, empty if it holds another value. Raises CheckpointError if it is unreadable."""
    try:
        content = json.loads(read_regular(path, _MAX_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): take a folder of save_pretrained") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: take the file that save_pretrained wrote") from error
    return content if isinstance(content, dict) else {}


def _check_sizes(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if a size in `config`, the content of the file `path`, is far above any known model."""
    sizes = {key: value for key in _SIZES if type(value := config.get(key)) is int}
    for key, size in sizes.items():
        largest = MAX_FEW if key in ("num_layers", "num_decoder_layers") else MAX_SIZE
        if not 1 <= size <= largest:
            raise CheckpointError(
                f"{path}: {key}: from 1 to {largest:,} (got {reprlib.repr(size)}): take the file that "
                "save_pretrained wrote"
            )
    encoder_blocks = sizes.get("num_layers", 0)
    blocks = encoder_blocks + sizes.get("num_decoder_layers", encoder_blocks)
    if blocks * sizes.get("num_experts", 1) > MAX_EXPERTS_IN_ALL:
        raise CheckpointError(
            f"{path}: num_experts ({sizes['num_experts']}) in {blocks} blocks: at most {MAX_EXPERTS_IN_ALL:,} in "
            "all: take the file that save_pretrained wrote"
        )


def read_config(path: Path) -> Config:
    """Return the configuration in the file `path`. Raises CheckpointError if switchcli has no such model."""
    content = read_json(path)
    model_type, classes = content.get("model_type"), content.get("architectures")
    classes = classes if isinstance(classes, list) else []
    if model_type == "umt5":
        raise CheckpointError(
            f"{path}: model_type 'umt5': it has a position bias in every layer, where a model of switchcli has one in "
            "each stack: take an mT5, such as google/mt5-small"
        )
    types = [_CLASSES[name] for name in classes if isinstance(name, str) and name in _CLASSES]
    if model_type not in _CLASSES.values() or (classes and model_type not in types):
        raise CheckpointError(
            f"{path}: model_type {model_type!r} with architectures {classes!r}: switchcli reads "
            "T5ForConditionalGeneration (t5), MT5ForConditionalGeneration (mt5) and "
            "SwitchTransformersForConditionalGeneration (switch_transformers)"
        )
    _check_sizes(content, path)
    try:
        schema = SwitchConfig if model_type == "switch_transformers" else T5Config
        return schema.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_problem(error)}") from error


def to_model_spec(config: Config, lengths: StackLengths, path: Path) -> ModelSpec:
    """Return `config.spec(lengths)`. Raises CheckpointError, naming the file `path`, if it is no valid ModelSpec."""
    try:
        return config.spec(lengths)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {_first_problem(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found, in one line."""
    first = error.errors()[0]
    key, rule = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{key}: missing: take the file that save_pretrained wrote"
    got = f" (got {reprlib.repr(first['input'])})" if key else ""
    return f"{key}: {rule}{got}: switchcli has no such model".removeprefix(": ")


def config_json(config: Config) -> bytes:
    """Return the text of config.json."""
    name = next(name for name, model_type in _CLASSES.items() if model_type == config.model_type)
    keys = {key: value for key, value in config.model_dump().items() if value is not None}
    return (json.dumps({"architectures": [name], **keys, "dtype": "float32"}, indent=2) + "\n").encode()


def generation_config_json() -> bytes:
    """Return the text of generation_config.json: the token IDs with which transformers' `generate` starts and ends."""
    ids = {"decoder_start_token_id": PAD, "eos_token_id": EOS, "pad_token_id": PAD}
    return (json.dumps(ids, indent=2) + "\n").encode()


def sparse_step(num_blocks: int, num_sparse: int) -> int:
    """Return the `*_sparse_step` that transformers computes from `num_sparse_*_layers`, as it does.

    For `num_sparse` = 0 it is `num_blocks`, which makes one sparse block. It is 0, for none, only if `num_sparse` is
    larger than `num_blocks`.
    """
    return num_blocks // num_sparse if num_sparse else num_blocks


def sparse_blocks(num_blocks: int, step: int) -> tuple[int, ...]:
    """Return the blocks that transformers makes sparse: 1, 1 + step, 1 + 2 step, ...; all if step = 1, none if 0."""
    return tuple(block for block in range(num_blocks) if step and (step == 1 or block % step == 1))
