"""The shape of a model: T5 (v1.0 and v1.1) with Switch layers where `sparse_every` says.

Sources: paper sections 2 and 5.6 (Table 9); T5 for the rest. Sizes by name are in `switchcli.recipe.sizes`.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from switchcli.model.routing import RouterSpec, Switch
from switchcli.spec import Spec


class ModelSpec(Spec):
    """An encoder-decoder with `num_layers` blocks in each stack; every number is a count or a width in elements."""

    size: str = "custom"
    """The named size that filled the keys which the recipe does not set; a label once resolved."""
    vocab_size: int = Field(default=32128, ge=1)
    """Rows of the embedding: at least the tokenizer's pieces; T5 pads 32,100 to 32,128."""
    d_model: int = Field(default=512, ge=1)
    d_ff: int = Field(default=2048, ge=1)
    d_kv: int | None = Field(default=None, ge=1)
    """Width of one attention head; absent: d_model / num_heads. Given, it may differ: T5-3B's and Switch-C's heads
    do not multiply to d_model."""
    num_heads: int = Field(default=8, ge=1)
    num_layers: int = Field(default=6, ge=1)
    """Blocks of the encoder, and of the decoder unless `num_decoder_layers` says otherwise."""
    num_decoder_layers: int | None = Field(default=None, ge=1)
    activation: Literal["relu", "geglu"] = "relu"
    """`relu` is T5 1.0's; `geglu` (T5 1.1) has two input projections, one through GELU."""
    tie_embeddings: bool = True
    """One matrix for input and softmax, with the d_model**-0.5 of T5 1.0; else a softmax matrix of its own."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    expert_dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Dropout of the experts' hidden vector (section 2.4 of the paper: 0.4 for fine-tuning); `dropout` when absent."""
    layer_norm_epsilon: float = Field(default=1e-6, gt=0.0)
    relative_attention_num_buckets: int = Field(default=32, ge=4, multiple_of=4)
    relative_attention_max_distance: int = Field(default=128, ge=2)
    init_scale: float = Field(default=0.1, gt=0.0)
    """s in sigma = sqrt(s / fan_in) of the feed-forwards, experts and router (Table 3)."""
    num_experts: int = Field(default=1, ge=1)
    """Experts in each sparse layer; 1 is the dense model: no router, no sparse layer."""
    sparse_every: int = Field(default=2, ge=1)
    """Block i of a stack is sparse when i % sparse_every == sparse_every - 1: 2 is the paper's frequency 1/2."""
    router: RouterSpec = Switch()

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
        fewest = min(self.num_layers, self.decoder_layers)
        if self.num_experts > 1 and self.sparse_every > fewest:
            raise ValueError(
                f"sparse_every ({self.sparse_every}) is more than the {fewest} blocks of a stack, so no layer would be "
                f"sparse: take sparse_every <= {fewest}, or num_experts: 1 for a dense model"
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

    def is_sparse(self, layer: int) -> bool:
        """Whether block `layer` (from 0) of either stack holds experts."""
        return self.num_experts > 1 and layer % self.sparse_every == self.sparse_every - 1
