"""Parameters and forward FLOPs from the spec alone, by the formulas of paper section 5.6; no tensor is made.

The FLOPs formula counts as Kaplan et al. do: two for each weight that a token meets, one of attention's two products.
Embedding look-ups and routers are left out, each token meets one expert, capacity padding is not counted, and the keys
and values of cross-attention are charged once a decoder token. With 512 and 114 tokens it gives the FLOPs of Table 9.
"""

from typing import NamedTuple

from switchcli.model.spec import ModelSpec


class Count(NamedTuple):
    """Parameters, and FLOPs of one sequence's forward pass."""

    dense: int
    """Parameters outside the experts, routers included."""
    expert: int
    """Parameters of all experts."""
    active: int
    """Parameters that one token can meet: the dense ones and one expert in each sparse layer."""
    flops: int

    @property
    def parameters(self) -> int:
        return self.dense + self.expert


def count(spec: ModelSpec, source: int = 512, target: int = 114) -> Count:
    """Count `spec` for sequences of `source` encoder and `target` decoder tokens."""
    stacks = (spec.num_layers, spec.decoder_layers)
    sparse = sum(spec.is_sparse(layer) for stack in stacks for layer in range(stack))
    attention = 4 * spec.d_model * spec.num_heads * spec.head_width
    feed_forward = (3 if spec.activation == "geglu" else 2) * spec.d_model * spec.d_ff
    vocabulary = spec.vocab_size * spec.d_model

    dense = (
        vocabulary * (1 if spec.tie_embeddings else 2)
        + attention * (spec.num_layers + 2 * spec.decoder_layers)
        + feed_forward * (sum(stacks) - sparse)
        + spec.num_experts * spec.d_model * sparse
        + spec.d_model * (2 * spec.num_layers + 3 * spec.decoder_layers + 2)
        + 2 * spec.relative_attention_num_buckets * spec.num_heads
    )
    expert = feed_forward * spec.num_experts * sparse
    width = spec.num_heads * spec.head_width
    flops = 2 * (
        spec.num_layers * ((attention + feed_forward) * source + width * source**2)
        + spec.decoder_layers * ((2 * attention + feed_forward) * target + width * (target**2 + target * source))
        + vocabulary * target
    )
    return Count(dense, expert, dense + feed_forward * sparse, flops)
