"""The shape of a model: T5 (v1.0 and v1.1) with experts in the blocks that the spec names.

Sources: paper sections 2 and 5.6 (Table 9), Appendix A; T5 for the rest. Sizes by name are in `switchcli.recipe.sizes`.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from switchcli.model.moe.losses import Reduction
from switchcli.model.moe.router import RouterSpec, SwitchRouter
from switchcli.spec import MOST, Spec

Stack = Literal["encoder", "decoder"]
STACKS: tuple[Stack, Stack] = ("encoder", "decoder")
Layers = tuple[Annotated[int, Field(ge=0, le=MOST["num_layers"])], ...]


class ModelSpec(Spec):
    """An encoder-decoder with `num_layers` blocks in each stack; every number is a count or a width in elements."""

    size: str = "custom"
    """The named size that filled the keys which the recipe does not set; a label once resolved."""
    vocab_size: int = Field(default=32128, ge=1, le=MOST["vocab_size"])
    """Rows of the embedding: at least the tokenizer's pieces; T5 pads 32,100 to 32,128."""
    d_model: int = Field(default=512, ge=1, le=MOST["d_model"])
    d_ff: int = Field(default=2048, ge=1, le=MOST["d_ff"])
    d_kv: int | None = Field(default=None, ge=1, le=MOST["d_kv"])
    """Width of one attention head; absent: d_model / num_heads. Given, it may differ: T5-3B's and Switch-C's heads
    do not multiply to d_model."""
    num_heads: int = Field(default=8, ge=1, le=MOST["num_heads"])
    num_layers: int = Field(default=6, ge=1, le=MOST["num_layers"])
    """Blocks of the encoder, and of the decoder unless `num_decoder_layers` says otherwise."""
    num_decoder_layers: int | None = Field(default=None, ge=1, le=MOST["num_decoder_layers"])
    activation: Literal["relu", "geglu"] = "relu"
    """`relu` is T5 1.0's; `geglu` (T5 1.1) has two input projections, one through GELU."""
    tie_embeddings: bool = True
    """One matrix for input and softmax, with the d_model**-0.5 of T5 1.0; else a softmax matrix of its own."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    expert_dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Dropout of the experts' hidden vector (section 2.4 of the paper: 0.4 for fine-tuning); `dropout` when absent."""
    layer_norm_epsilon: float = Field(default=1e-6, gt=0.0)
    relative_attention_num_buckets: int = Field(
        default=32, ge=4, multiple_of=4, le=MOST["relative_attention_num_buckets"]
    )
    relative_attention_max_distance: int = Field(default=128, ge=2, le=MOST["relative_attention_max_distance"])
    init_scale: float = Field(default=0.1, gt=0.0)
    """s in sigma = sqrt(s / fan_in) of the feed-forwards, experts and router (Table 3)."""
    num_experts: int = Field(default=1, ge=1, le=MOST["num_experts"])
    """Experts in each sparse layer; 1 is the dense model: no router, no sparse layer."""
    sparse_every: int = Field(default=2, ge=1, le=MOST["num_layers"])
    """Block i of a stack is sparse when i % sparse_every == sparse_every - 1: 2 is the paper's frequency 1/2."""
    sparse_encoder_layers: Layers | None = None
    """The encoder's sparse blocks, counted from 0, instead of `sparse_every`; [] for none."""
    sparse_decoder_layers: Layers | None = None
    """The same for the decoder."""
    sparse: Literal["feed_forward", "attention", "both"] = "feed_forward"
    """What a sparse block routes: its feed-forward, the queries, keys and values of its self-attention (Appendix A), or
    both. Experts of an attention have d_ff hidden units too."""
    router: RouterSpec = SwitchRouter()
    """The router of the sparse layers, by its `kind`."""
    decoder_router: RouterSpec | None = None
    """The decoder's; absent: `router`."""
    balance_reduction: Reduction = "sum"
    """How the balance and z-losses of the layers become one: their sum (Mesh-TensorFlow), mean (T5X), or pooled over
    the tokens of a stack's layers (transformers). The same coefficient means something else in each."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_kv is None and self.d_model % self.num_heads:
            near = max(self.num_heads, round(self.d_model / self.num_heads) * self.num_heads)
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of num_heads ({self.num_heads}) where d_kv is not given: "
                f"try d_model: {near}, or give d_kv, the width of a head"
            )
        return self

    @model_validator(mode="after")
    def _experts_have_a_layer(self) -> Self:
        for stack in STACKS:
            listed, blocks = self._listed(stack), self.num_blocks(stack)
            if listed is not None and (list(listed) != sorted(set(listed)) or max(listed, default=0) >= blocks):
                raise ValueError(
                    f"sparse_{stack}_layers ({list(listed)}) must name blocks from 0 to {blocks - 1} in order, "
                    "once each"
                )
            if self.num_experts > 1 and listed is None and self.sparse_every > blocks:
                raise ValueError(
                    f"sparse_every ({self.sparse_every}) is more than the {blocks} blocks of a stack, so no layer "
                    f"would be sparse: take sparse_every <= {blocks}, name the layers, or num_experts: 1 for a dense "
                    "model"
                )
        if self.num_experts > 1 and not any(map(self.sparse_layers, STACKS)):
            raise ValueError("sparse_encoder_layers and sparse_decoder_layers name no block: num_experts: 1 is dense")
        return self

    @model_validator(mode="after")
    def _experts_are_bounded(self) -> Self:
        layers, most = sum(len(self.sparse_layers(stack)) for stack in STACKS), MOST["experts_in_all"]
        if layers * self.num_experts > most:
            raise ValueError(
                f"num_experts ({self.num_experts}) in {layers} sparse layers make {layers * self.num_experts:,} in "
                f"all, and at most {most:,} are allowed: take {most // layers} or fewer"
            )
        return self

    @model_validator(mode="after")
    def _routers_fit(self) -> Self:
        for stack in STACKS:
            router = self.router_of(stack)
            key = "decoder_router" if stack == "decoder" and self.decoder_router else "router"
            if self.sparse_layers(stack) and (reason := router.incompatibility(self.num_experts)):
                raise ValueError(f"{key}.{reason}")
        reason = self.router_of("decoder").causality_violation()
        if self.sparse_layers("decoder") and reason:
            raise ValueError(
                f"the decoder is causal, and {reason}: give decoder_router: {{kind: switch}}, or "
                "sparse_decoder_layers: [] to have experts in the encoder alone"
            )
        return self

    @model_validator(mode="after")
    def _far_buckets_lie_beyond_the_exact_ones(self) -> Self:
        exact = self.relative_attention_num_buckets // 2  # the decoder's, one distance each
        if self.relative_attention_max_distance <= exact:
            raise ValueError(
                f"relative_attention_max_distance ({self.relative_attention_max_distance}) must be more than {exact}, "
                f"half of relative_attention_num_buckets ({self.relative_attention_num_buckets}): try {4 * exact}"
            )
        return self

    @property
    def decoder_layers(self) -> int:
        return self.num_decoder_layers or self.num_layers

    @property
    def head_width(self) -> int:
        return self.d_kv or self.d_model // self.num_heads

    @property
    def experts_dropout(self) -> float:
        return self.dropout if self.expert_dropout is None else self.expert_dropout

    def router_of(self, stack: Stack) -> RouterSpec:
        return self.decoder_router or self.router if stack == "decoder" else self.router

    @property
    def group_sequences(self) -> int:
        """Sequences in which a batch is routed: its number of sequences must be a multiple."""
        return math.lcm(*(self.router_of(stack).group_sequences for stack in STACKS if self.sparse_layers(stack)))

    def num_blocks(self, stack: Stack) -> int:
        return self.num_layers if stack == "encoder" else self.decoder_layers

    def sparse_layers(self, stack: Stack) -> tuple[int, ...]:
        """The blocks of a stack that hold experts, from 0."""
        if self.num_experts == 1:
            return ()
        listed = self._listed(stack)
        return (
            tuple(range(self.sparse_every - 1, self.num_blocks(stack), self.sparse_every)) if listed is None else listed
        )

    def is_sparse(self, stack: Stack, layer: int, part: Literal["feed_forward", "attention"]) -> bool:
        """Whether that part of block `layer` is routed to experts."""
        return self.sparse in (part, "both") and layer in self.sparse_layers(stack)

    def sparse_layer_names(self) -> tuple[str, ...]:
        """The name of each sparse layer in the model, in the order of its reports."""
        parts = [part for part in ("attention", "feed_forward") if self.sparse in (part, "both")]
        names = {"attention": "self_attention.attention", "feed_forward": "feed_forward.layer"}
        return tuple(
            f"{stack}.blocks.{layer}.{names[part]}"
            for stack in STACKS
            for layer in self.sparse_layers(stack)
            for part in parts
        )

    def _listed(self, stack: Stack) -> tuple[int, ...] | None:
        return self.sparse_encoder_layers if stack == "encoder" else self.sparse_decoder_layers
