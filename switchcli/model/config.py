"""The architecture settings of a model: T5 (v1.0 and v1.1) with experts in the blocks that the spec names.

Sources: paper sections 2 and 5.6 (Table 9), Appendix A; T5 for the rest. Named sizes are in `switchcli.recipe.sizes`.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from switchcli.model.moe.router import FEW_CHOICES, RouterSpec, SwitchRouter
from switchcli.spec import AUTO, MAX_EXPERTS_IN_ALL, MAX_FEW, MAX_SIZE, VOCAB_SIZE, Few, Size, Spec, check_rules

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16", "selective"]
Stack = Literal["encoder", "decoder"]
STACKS: tuple[Stack, Stack] = ("encoder", "decoder")
CHANGEABLE_MODEL_KEYS = (
    "size",
    "dropout",
    "expert_dropout",
    "router",
    "decoder_router",
    "balance_reduction",
    "init_scale",
)
"""Keys of `model` that may differ from the checkpoint, because no weight's shape or meaning depends on them. Of a
router, the gate may not, and biases must not be lost."""
Reduction = Literal["sum", "mean", "pooled"]
Layers = tuple[Annotated[int, Field(ge=0, le=MAX_FEW)], ...]


def router_dtype(precision: Precision) -> "torch.dtype":
    """Return the dtype that routers compute in."""
    import torch

    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _or_auto(schema: dict[str, Any]) -> None:
    """Add `auto`, which a recipe may have, to the JSON Schema of a number. Resolving the recipe replaces it."""
    number = {key: schema.pop(key) for key in ("type", "minimum", "maximum")}
    schema |= {"anyOf": [number, {"type": "string", "const": AUTO}], "default": AUTO}


class ModelSpec(Spec):
    """The architecture of an encoder-decoder; every number is a count or a width in elements."""

    size: str = "custom"
    """Name of the size that filled in the keys which the recipe does not set; only a label once resolved."""
    vocab_size: int = Field(default=VOCAB_SIZE, ge=1, le=MAX_SIZE, json_schema_extra=_or_auto)
    """Rows of the embedding matrix. `auto` is the size of the tokenizer, rounded up to a multiple of 64, or that of the
    checkpoint which the run starts from."""
    d_model: Size = 512
    """Width of the hidden states; 512 is T5-Small's."""
    d_ff: Size = 2048
    """Hidden units of a feed-forward and of each expert; 2,048 is T5-Small's."""
    d_kv: Size | None = None
    """Width of one attention head; absent: d_model / num_heads, from which the heads of T5-3B and Switch-C differ."""
    num_heads: Size = 8
    """Number of attention heads; 8 is T5-Small's."""
    num_layers: Few = 6
    """Blocks of the encoder, and of the decoder unless `num_decoder_layers` is set."""
    num_decoder_layers: Few | None = None
    """Blocks of the decoder; absent: `num_layers`."""
    activation: Literal["relu", "geglu"] = "relu"
    """Activation of feed-forwards and experts: `relu` (T5 1.0), or `geglu` with a second input projection that goes
    through GELU (T5 1.1)."""
    tie_embeddings: bool = True
    """Whether one matrix serves as embedding and softmax, scaled by d_model**-0.5 as in T5 1.0; otherwise the softmax
    has a matrix of its own."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout rate outside the experts; 0 as in the pre-training of T5 1.1."""
    expert_dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Dropout rate of the experts' hidden vector (paper section 2.4: 0.4 for fine-tuning); absent: `dropout`."""
    layer_norm_epsilon: float = Field(default=1e-6, gt=0.0)
    """Number added to the mean square in RMS norm; 1e-6 is T5's."""
    relative_attention_num_buckets: int = Field(default=32, ge=4, multiple_of=4, le=MAX_SIZE)
    """Buckets of the relative position bias; 32 is T5's."""
    relative_attention_max_distance: int = Field(default=128, ge=2, le=MAX_SIZE)
    """Distance, in positions, from which on all distances share the last bucket; 128 is T5's."""
    init_scale: float = Field(default=0.1, gt=0.0)
    """s in sigma = sqrt(s / fan_in) of the initial weights of feed-forwards, experts and router; 0.1 is the paper's
    (Table 3)."""
    num_experts: Size = 1
    """Experts in each sparse layer; 1 is the dense model, without routers and sparse layers."""
    sparse_every: Few = 2
    """Period of the sparse blocks: block i of a stack, from 0, is sparse if i % sparse_every == sparse_every - 1; 2 is
    the paper's frequency 1/2."""
    sparse_encoder_layers: Layers | None = None
    """The encoder's sparse blocks, counted from 0, instead of `sparse_every`; [] makes none sparse."""
    sparse_decoder_layers: Layers | None = None
    """The decoder's sparse blocks, counted from 0, instead of `sparse_every`; [] makes none sparse."""
    sparse: Literal["feed_forward", "attention", "both"] = "feed_forward"
    """Sublayers with experts in a sparse block: its feed-forward, its self-attention (queries, keys and values,
    Appendix A; its experts have d_ff hidden units too), or both."""
    expert_d_ff: Size | None = None
    """Hidden units of each expert; absent: `d_ff`. Fine-grained experts are g times as many of d_ff / g hidden units,
    with g times as many choices of a token (`router.k`)."""
    shared_d_ff: int = Field(default=0, ge=0, le=MAX_SIZE)
    """Hidden units of a dense feed-forward beside the experts of each sparse feed-forward, for every token; 0: none.
    The FLOPs are those of a dense layer if it and the chosen experts have `d_ff` hidden units together."""
    expert_scale: float | None = Field(default=None, gt=0.0)
    """Factor of the experts' outputs. Absent: sqrt(g) for g = d_ff / expert_d_ff, or 1 / sqrt(g) if gates do not depend
    on the number of experts: the output starts with the root mean square of that of 1/g as many experts of `d_ff`
    hidden units with 1/g as many choices."""
    router: RouterSpec = SwitchRouter()
    """Router of the sparse layers, selected by its `kind`."""
    decoder_router: RouterSpec | None = Field(default=None, json_schema_extra={"same_as": "model.router"})
    """Router of the decoder's sparse layers, with the keys of `model.router`; absent: `model.router`."""
    balance_reduction: Reduction = "sum"
    """How the load-balancing and z-losses of the layers are combined: by their sum (Mesh-TensorFlow), their mean (T5X),
    or pooled over the tokens of a stack's layers (transformers); each needs other coefficients."""

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        check_rules(
            self._heads_divide(),
            self._experts_have_a_layer(),
            self._shared_path_has_experts_beside_it(),
            self._experts_are_bounded(),
            self._routers_fit(),
            self._max_distance_exceeds_exact_buckets(),
        )
        return self

    def _heads_divide(self) -> Iterator[str]:
        if self.d_kv is None and self.d_model % self.num_heads:
            divisors = (heads for heads in range(1, min(self.d_model, 1024) + 1) if self.d_model % heads == 0)
            nearest = min(divisors, key=lambda heads: abs(heads - self.num_heads))
            yield (
                f"num_heads ({self.num_heads}) must divide d_model ({self.d_model}) where d_kv is not set: "
                f"try num_heads: {nearest}, or set d_kv, the width of a head"
            )

    def _experts_have_a_layer(self) -> Iterator[str]:
        for stack in STACKS:
            layers, blocks = self._listed_layers(stack), self.num_blocks(stack)
            if layers is not None and (list(layers) != sorted(set(layers)) or max(layers, default=0) >= blocks):
                yield (
                    f"sparse_{stack}_layers ({list(layers)}) must name blocks from 0 to {blocks - 1} in order, "
                    "once each"
                )
            if self.num_experts > 1 and layers is None and self.sparse_every > blocks:
                yield (
                    f"sparse_every ({self.sparse_every}) is more than the {blocks} blocks of a stack, so no layer "
                    f"would be sparse: set sparse_every <= {blocks}, name the layers, or num_experts: 1 for a dense "
                    "model"
                )
        if self.num_experts > 1 and all(self._listed_layers(stack) == () for stack in STACKS):
            yield (
                "sparse_encoder_layers and sparse_decoder_layers name no block: set num_experts: 1 for a dense model"
            )

    def _shared_path_has_experts_beside_it(self) -> Iterator[str]:
        if self.shared_d_ff and self.sparse == "attention":
            yield (
                f"shared_d_ff ({self.shared_d_ff}) stands beside the experts of feed-forwards, and sparse: attention "
                "has none: leave it out, or set sparse: feed_forward or both"
            )

    def _experts_are_bounded(self) -> Iterator[str]:
        layers = sum(len(self.sparse_layers(stack)) for stack in STACKS)
        total, max_total = layers * self.num_experts, MAX_EXPERTS_IN_ALL
        if total > max_total:
            yield (
                f"num_experts ({self.num_experts}) in {layers} sparse layers is {total:,} in all, and at most "
                f"{max_total:,} are allowed: set {max_total // layers} or fewer"
            )

    def _routers_fit(self) -> Iterator[str]:
        for stack in STACKS:
            router = self.router_of(stack)
            key = "decoder_router" if stack == "decoder" and self.decoder_router else "router"
            if self.sparse_layers(stack) and (reason := router.incompatibility(self.num_experts)):
                yield f"{key}.{reason}"
        reason = self.router_of("decoder").causality_violation()
        if self.sparse_layers("decoder") and reason:
            yield (
                f"the decoder is causal, and {reason}: set decoder_router: {{kind: switch}}, or "
                "sparse_decoder_layers: [] to have experts in the encoder only"
            )

    def _max_distance_exceeds_exact_buckets(self) -> Iterator[str]:
        num_exact = self.relative_attention_num_buckets // 2  # the decoder's buckets of one distance each
        if self.relative_attention_max_distance <= num_exact:
            yield (
                f"relative_attention_max_distance ({self.relative_attention_max_distance}) must be more than "
                f"{num_exact}, half of relative_attention_num_buckets ({self.relative_attention_num_buckets}): try "
                f"{4 * num_exact}"
            )

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers or self.num_layers

    @property
    def head_width(self) -> int:
        return self.d_kv or self.d_model // self.num_heads

    @property
    def expert_width(self) -> int:
        """Hidden units of each expert."""
        return self.expert_d_ff or self.d_ff

    def uncommon_experts(self) -> str | None:
        """Return the keys by which experts are not feed-forwards of `d_ff` hidden units alone; None if they are."""
        scales = {self.scale_of_experts(stack) for stack in self.sparse_stacks}
        uncommon = {
            "expert_d_ff": self.expert_width != self.d_ff,
            "shared_d_ff": self.shared_d_ff > 0,
            "expert_scale": not scales <= {1.0},
        }
        return ", ".join(f"{key} ({getattr(self, key)})" for key, differs in uncommon.items() if differs) or None

    def scale_of_experts(self, stack: Stack) -> float:
        """Return the factor of the experts' outputs.

        An expert's output starts with the same root mean square r whatever its width, because the variance of its last
        matrix is 1 / width. k of E experts with gates 1 / E add up to sqrt(k) r / E, and g k of g E to 1 / sqrt(g) of
        that; likewise with gates 1 / k. With gates of 1 / 2, g k experts add up to sqrt(g) times that of k.
        """
        if self.expert_scale is not None:
            return self.expert_scale
        scale = math.sqrt(self.d_ff / self.expert_width)
        return 1 / scale if self.router_of(stack).gates_are_independent else scale

    @property
    def experts_dropout(self) -> float:
        return self.dropout if self.expert_dropout is None else self.expert_dropout

    def router_of(self, stack: Stack) -> RouterSpec:
        return self.decoder_router or self.router if stack == "decoder" else self.router

    def router_key(self, stack: Stack) -> str:
        """Return the key of a stack's router in a recipe."""
        return "model.decoder_router" if stack == "decoder" and self.decoder_router else "model.router"

    @property
    def group_sequences(self) -> int:
        """The number of sequences of a batch must be a multiple of this, so that it has whole groups in all routers."""
        return math.lcm(*(self.router_of(stack).group_sequences for stack in self.sparse_stacks))

    def num_blocks(self, stack: Stack) -> int:
        return self.num_layers if stack == "encoder" else self.decoder_layers

    def sparse_layers(self, stack: Stack) -> tuple[int, ...]:
        """Return the blocks of a stack that have experts, counted from 0."""
        if self.num_experts == 1:
            return ()
        layers = self._listed_layers(stack)
        if layers is None:
            layers = tuple(range(self.sparse_every - 1, self.num_blocks(stack), self.sparse_every))
        return layers

    @property
    def sparse_stacks(self) -> tuple[Stack, ...]:
        """The stacks that have experts."""
        return tuple(stack for stack in STACKS if self.sparse_layers(stack))

    def is_sparse(self, stack: Stack, layer: int, sublayer: Literal["feed_forward", "attention"]) -> bool:
        """Return whether that sublayer of block `layer` has experts."""
        return self.sparse in (sublayer, "both") and layer in self.sparse_layers(stack)

    def sparse_layer_names(self) -> tuple[str, ...]:
        """Return the name of each sparse layer, in the order of the model's `router_stats`.

        It is the name of the sublayer: `decoder.blocks.0.feed_forward`, or `.self_attention` with experts of attention.
        """
        sublayers = {"attention": "self_attention", "feed_forward": "feed_forward"}
        routed = [name for sublayer, name in sublayers.items() if self.sparse in (sublayer, "both")]
        names = []
        for stack in STACKS:
            for layer in self.sparse_layers(stack):
                names += [f"{stack}.blocks.{layer}.{name}" for name in routed]
        return tuple(names)

    def _listed_layers(self, stack: Stack) -> tuple[int, ...] | None:
        return self.sparse_encoder_layers if stack == "encoder" else self.sparse_decoder_layers


def capacity_rules(model: ModelSpec, inputs_length: int, targets_length: int) -> Iterator[str]:
    """Yield an error for each broken rule of capacity.

    A routing group must have at least one token, and by its capacity factors at least one slot, per expert.
    """
    lengths: dict[Stack, int] = {"encoder": inputs_length, "decoder": targets_length}
    for stack in model.sparse_stacks:
        length, experts, router, key = (
            lengths[stack],
            model.num_experts,
            model.router_of(stack),
            model.router_key(stack),
        )
        group = router.group_sequences * length
        if group < experts:
            yield (
                f"{key}.group_sequences ({router.group_sequences}): a group of the {stack} has {group} tokens for "
                f"{experts} experts: try {key}.group_sequences={-(-experts // length)} or more."
            )
            continue
        factors = {"capacity_factor": router.capacity_factor, "eval_capacity_factor": router.eval_capacity_factor}
        for name, factor in factors.items():
            if not isinstance(factor, str) and group * factor < experts:
                min_factor = math.ceil(1000 * experts / group) / 1000  # rounded up to three decimals
                yield (
                    f"{key}.{name} ({factor}) gives each of {experts} experts {group * factor / experts:.2g} slots "
                    f"in a group of {group} tokens of the {stack}: take {min_factor:g} or more, for at "
                    "least one."
                )
            elif not isinstance(factor, str) and factor < router.experts_per_token > FEW_CHOICES:
                yield (
                    f"{key}.{name} ({factor:g}) has slots for {factor:g} of the {router.experts_per_token} experts "
                    f"that a token chooses: take {1.25 * router.experts_per_token:g}, or dropless."
                )
