"""Parameters and forward FLOPs from the spec, by the formulas of paper section 5.6, without creating a tensor.

FLOPs are counted as Kaplan et al. do: two per weight that processes a token, and those of only one of attention's two
products. Embedding lookups and routers are left out (`ModelCounts.router_flops`), each token passes one expert (k with
a top_k router), capacity is ignored, and the keys and values of cross-attention are counted once per decoder token.
With 512 and 114 tokens this gives the FLOPs of Table 9.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from switchcli.model.config import STACKS, ModelSpec

FORWARD_AND_BACKWARD = 3
"""Ratio of the FLOPs of a training step to those of its forward pass."""

NEWTON_SCHULZ_STEPS = 5
"""Steps of Muon's Newton-Schulz iteration."""


class ModelCounts(NamedTuple):
    """Number of parameters, and FLOPs of one sequence's forward pass."""

    dense: int
    """Parameters outside the experts, including routers."""
    expert: int
    """Parameters of all experts."""
    active: int
    """Parameters that one token uses: the dense ones and one expert (k with top_k) in each sparse layer."""
    flops: int
    router_flops: int
    """FLOPs of the routers, which are no part of `flops`: they count where there are many small experts."""

    @property
    def parameters(self) -> int:
        return self.dense + self.expert


def count(spec: ModelSpec, source: int = 512, target: int = 114) -> ModelCounts:
    """Count `spec` for sequences of `source` encoder and `target` decoder tokens."""
    # Weights of one module.
    width = spec.num_heads * spec.head_width
    attention = 4 * spec.d_model * width  # q, k, v, o
    num_inputs = 2 if spec.activation == "geglu" else 1
    per_hidden_unit = (num_inputs + 1) * spec.d_model
    feed_forward = per_hidden_unit * spec.d_ff
    # Outputs of an expert of attention: a query, and a shared key and value.
    attention_expert = (num_inputs * spec.d_model + 2 * width) * spec.expert_width
    vocabulary = spec.vocab_size * spec.d_model
    dense_block = {"encoder": attention + feed_forward, "decoder": 2 * attention + feed_forward}

    # A sparse block has a router and experts instead of its feed-forward, of its q, k and v, or of both.
    num_sparse = {stack: len(spec.sparse_layers(stack)) for stack in STACKS}
    routes_feed_forward = spec.sparse in ("feed_forward", "both")
    routes_attention = spec.sparse in ("attention", "both")
    num_routers = routes_feed_forward + routes_attention
    expert = routes_feed_forward * per_hidden_unit * spec.expert_width + routes_attention * attention_expert
    # Beside the experts of a feed-forward there may be a smaller one for every token.
    unrouted = routes_feed_forward * per_hidden_unit * (spec.d_ff - spec.shared_d_ff)
    replaced = unrouted + routes_attention * 3 * spec.d_model * width

    num_norms = 2 * spec.num_layers + 3 * spec.decoder_layers + 2  # one per sublayer, and one at the end of each stack
    router = num_routers * spec.num_experts * spec.d_model
    dense = (
        vocabulary * (1 if spec.tie_embeddings else 2)
        + sum(dense_block[stack] * spec.num_blocks(stack) for stack in STACKS)
        + sum(num_sparse.values()) * (router - replaced)
        + spec.d_model * num_norms
        + 2 * spec.relative_attention_num_buckets * spec.num_heads  # a position bias per stack
    )

    # Weights that process one token of a stack.
    active_experts = {stack: expert * spec.router_of(stack).experts_per_token for stack in STACKS}
    per_token = {
        stack: dense_block[stack] * spec.num_blocks(stack) + num_sparse[stack] * (active_experts[stack] - replaced)
        for stack in STACKS
    }
    flops = 2 * (
        per_token["encoder"] * source
        + spec.num_layers * width * source**2
        + per_token["decoder"] * target
        + spec.decoder_layers * width * (target**2 + target * source)  # self-attention and cross-attention
        + vocabulary * target
    )
    router_flops = 2 * router * (num_sparse["encoder"] * source + num_sparse["decoder"] * target)
    active = dense + sum(active_experts[stack] * num_sparse[stack] for stack in STACKS)
    return ModelCounts(dense, expert * spec.num_experts * sum(num_sparse.values()), active, flops, router_flops)


def newton_schulz_flops(shape: Sequence[int]) -> int:
    """Return the FLOPs of Muon's Newton-Schulz iteration of a matrix [A, B], or of a stack [E, A, B].

    With d the smaller side and f the larger, a step has the products [d, f] [f, d], [d, d] [d, d] and [d, d] [d, f].
    """
    *stack, d, f = *shape[:-2], *sorted(shape[-2:])
    return math.prod(stack) * NEWTON_SCHULZ_STEPS * (4 * d**2 * f + 2 * d**3)
