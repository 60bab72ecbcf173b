"""Parameters and forward FLOPs from the spec alone, by the formulas of paper section 5.6; no tensor is made.

The FLOPs formula counts as Kaplan et al. do: two for each weight that a token meets, one of attention's two products.
Embedding look-ups and routers are left out, each token meets one expert (k where the router is top_k), capacity is not
counted, and the keys and values of cross-attention are charged once a decoder token. With 512 and 114 tokens it gives
the FLOPs of Table 9.
"""

from typing import NamedTuple

from switchcli.model.config import STACKS, ModelSpec

FORWARD_AND_BACKWARD = 3
"""FLOPs of a training step over those of its forward pass."""


class ModelCounts(NamedTuple):
    """Parameters, and FLOPs of one sequence's forward pass."""

    dense: int
    """Parameters outside the experts, routers included."""
    expert: int
    """Parameters of all experts."""
    active: int
    """Parameters that one token meets: the dense ones and one expert (k with top_k) in each sparse layer."""
    flops: int

    @property
    def parameters(self) -> int:
        return self.dense + self.expert


def count(spec: ModelSpec, source: int = 512, target: int = 114) -> ModelCounts:
    """Count `spec` for sequences of `source` encoder and `target` decoder tokens."""
    width = spec.num_heads * spec.head_width
    attention = 4 * spec.d_model * width
    inputs = (2 if spec.activation == "geglu" else 1) * spec.d_model * spec.d_ff
    feed_forward = inputs + spec.d_ff * spec.d_model
    queries = inputs + 2 * width * spec.d_ff  # of one expert of a Switch attention, with its shared keys and values
    vocabulary = spec.vocab_size * spec.d_model

    sparse = {stack: len(spec.sparse_layers(stack)) for stack in STACKS}
    routed = {part: spec.sparse in (part, "both") for part in ("feed_forward", "attention")}
    expert = routed["feed_forward"] * feed_forward + routed["attention"] * queries
    replaced = routed["feed_forward"] * feed_forward + routed["attention"] * 3 * spec.d_model * width
    blocks = {"encoder": attention + feed_forward, "decoder": 2 * attention + feed_forward}  # a dense one's
    dense = (
        vocabulary * (1 if spec.tie_embeddings else 2)
        + sum(blocks[stack] * spec.num_blocks(stack) for stack in STACKS)
        + sum(sparse.values()) * (sum(routed.values()) * spec.num_experts * spec.d_model - replaced)
        + spec.d_model * (2 * spec.num_layers + 3 * spec.decoder_layers + 2)
        + 2 * spec.relative_attention_num_buckets * spec.num_heads
    )
    routers = {stack: spec.router_of(stack) for stack in STACKS}
    experts_met = {stack: expert * router.experts_per_token for stack, router in routers.items()}
    met = {
        stack: blocks[stack] * spec.num_blocks(stack) + sparse[stack] * (experts_met[stack] - replaced)
        for stack in STACKS
    }
    flops = 2 * (
        met["encoder"] * source
        + spec.num_layers * width * source**2
        + met["decoder"] * target
        + spec.decoder_layers * width * (target**2 + target * source)
        + vocabulary * target
    )
    active = sum(experts_met[stack] * sparse[stack] for stack in STACKS)
    return ModelCounts(dense, expert * spec.num_experts * sum(sparse.values()), dense + active, flops)
