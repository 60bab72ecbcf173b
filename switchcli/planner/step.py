"""The inputs of the planner: a mesh, the batch of a step, the weights of one rank, and the rows that experts compute.

Legend: G groups, E experts, C slots of an expert, D model, F hidden, O outputs.

Weights, optimizer state and routing are those of the real code on the `meta` device, where tensors have names and
shapes but no memory. So a model of a trillion parameters can be planned on any machine.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch

from switchcli.distributed.layout import MOMENTUM, is_stacked, reduced_dim
from switchcli.distributed.parallel_spec import Shard, even_dim
from switchcli.distributed.tensor_parallel import sharded_dim
from switchcli.model.config import ModelSpec, Stack
from switchcli.model.flops import newton_schulz_flops
from switchcli.model.moe.router import RouterSpec

FLOAT = 4
"""Bytes of a float32: a weight, its gradient, or an element of the residual stream."""

Tensors = Mapping[str, torch.Tensor]
"""Tensors on `meta`, by name."""


class Mesh(NamedTuple):
    """A mesh of `data` x `model` devices (see distributed/mesh.py). Each has weights divided as `shard` says."""

    data: int
    expert: int = 1
    """Ranks of the data axis that together hold all experts; data / expert such groups are replicas of each other."""
    model: int = 1
    shard: Shard = "none"

    @property
    def replicas(self) -> int:
        """Number of ranks that hold the same experts, for each rank of the model axis."""
        return self.data // self.expert

    @property
    def dense_shards(self) -> int:
        """Number of shards into which data-parallel ranks divide the weights outside the experts."""
        return 1 if self.shard == "none" else self.data

    def __str__(self) -> str:
        shard = "" if self.shard == "none" else f", {self.shard}"
        return f"data {self.data:,} x model {self.model}, expert {self.expert:,}{shard}"


class Step(NamedTuple):
    """The batch of one optimizer step, and how it is computed."""

    sequences: int
    source: int
    """Length of the encoder's sequences, in tokens."""
    target: int
    """Length of the decoder's sequences, in tokens."""
    product_bytes: int = 2
    """Bytes of an element in the dtype of matrix products: 4 for float32, 2 for bfloat16."""
    router_bytes: int = FLOAT
    """Bytes of an element in the dtype of the routers: 2 only for the paper's bfloat16 baseline (Table 2)."""
    fused: bool = True
    """Whether attention keeps no [B, H, T, S] tensor, and a norm keeps only its input: true on CUDA, false on a CPU."""
    recomputed: bool = False
    """Whether blocks keep only their inputs and run again in the backward pass (`train.activation_checkpointing`)."""

    def length(self, stack: Stack) -> int:
        """Return the number of tokens of one sequence in a stack."""
        return self.source if stack == "encoder" else self.target


class RankWeights(NamedTuple):
    """Sizes of what one rank of the model axis holds, before the expert axis and the data axis divide it.

    Weights are counted in parameters, optimizer state in bytes.
    """

    dense: int
    """Parameters outside the experts."""
    expert: int
    """Parameters of all experts."""
    products: int
    """Parameters that autocast copies to bfloat16 and autograd keeps until the backward pass: the matrices of the
    blocks outside the experts."""
    units: tuple[int, ...]
    """Dense parameters of each unit that fully_shard gathers at a time: first those outside the blocks, then those of
    each block."""
    expert_units: tuple[int, ...]
    """Parameters of all experts of each sparse layer. A unit of fully_shard is one of them divided by `Mesh.expert`."""
    expert_shapes: tuple[tuple[int, int], ...]
    """First two dims of the stacked weights, each pair once: (E, F / m) and (E, O) for m ranks of the model axis."""
    dense_rows: tuple[tuple[int, int, int], ...]
    """Dense weights by the length of their dim 0, which fully_shard divides: this length, the parameters of a row of
    all these weights together, and the bytes of the optimizer state that belong to the row."""
    dense_means: int
    """Bytes of optimizer state outside the experts that belong to no row: means over dim 0, and step counts."""
    expert_state: int
    """Bytes of optimizer state of all experts."""
    expert_means: int
    """Bytes of it that are means over dim 1 of the stacks."""
    dense_orthogonal_flops: int
    """FLOPs of a step of Muon in matrices outside the experts; 0 with other optimizers."""
    expert_orthogonal_flops: int
    """FLOPs of a step of Muon in all experts; 0 with other optimizers."""

    def dense_shard(self, mesh: Mesh) -> tuple[int, int]:
        """Return parameters and bytes of state of the first shard, the largest one: rows are divided, rounded up."""
        rows = [(-(-length // mesh.dense_shards), parameters, state) for length, parameters, state in self.dense_rows]
        parameters = sum(length * each for length, each, _ in rows)
        return parameters, self.dense_means + sum(length * each for length, _, each in rows)

    def expert_state_shard(self, mesh: Mesh) -> int:
        """Return the bytes of state of the experts on one rank."""
        state, means = self.expert_state // mesh.expert, self.expert_means // mesh.expert
        num_shards = self.expert_shards(mesh)
        if num_shards == 1 or self._expert_dim(mesh) == 0:
            return state // num_shards
        return (state - means) // num_shards + means  # dim 1 is divided: every rank has the means over it

    def expert_shards(self, mesh: Mesh) -> int:
        """Return the number of shards into which replicas divide the experts; 1 if every replica has them in full."""
        return 1 if mesh.shard == "none" or self._expert_dim(mesh) is None else mesh.replicas

    def _expert_dim(self, mesh: Mesh) -> int | None:
        """Return the dim of the stacks that the replicas divide; None if none divides evenly."""
        local_shapes = [(num_experts // mesh.expert, width) for num_experts, width in self.expert_shapes]
        return even_dim(local_shapes, mesh.replicas)


def rank_weights(weights: Tensors, state: Tensors, model: int) -> RankWeights:
    """Return what each of `model` ranks of the model axis holds.

    Args:
        weights: the parameters of the unsharded model.
        state: the optimizer state of these parameters, by `<parameter>/<slot>`. Which moments are factored depends on
            the full weights, so the slots are the same at any sharding.
        model: the number of ranks on the model axis.
    """
    dense = expert = products = 0
    units, expert_units, expert_shapes = Counter({"": 0}), Counter[str](), dict[tuple[int, int], None]()
    parameters_of, state_of = Counter[int](), Counter[int]()  # dense ones, by the number of rows
    for name, weight in weights.items():
        dim = sharded_dim(name)
        numel = weight.numel() // (1 if dim is None else model)
        if is_stacked(name):
            expert += numel
            layer = name.rpartition(".")[0]
            expert_units[layer] += numel
            width = weight.shape[1] // (model if dim == 1 else 1)
            expert_shapes[weight.shape[0], width] = None
            continue
        dense += numel
        rows = weight.shape[0] // (model if dim == 0 else 1)
        parameters_of[rows] += numel // rows
        # `encoder.blocks.3.norm.weight` belongs to the unit `encoder.3`, a name without `.blocks.` to the unit "".
        stack, _, name_in_blocks = name.partition(".blocks.")
        unit = f"{stack}.{name_in_blocks.split('.')[0]}" if name_in_blocks else ""
        units[unit] += numel
        if name_in_blocks and dim is not None:  # norms and routers are not divided, and not computed in bfloat16
            products += numel
    dense_means = expert_state = expert_means = dense_orthogonal_flops = expert_orthogonal_flops = 0
    for name, tensor in state.items():
        parameter, _, slot = name.rpartition("/")
        num_bytes = tensor.numel() * tensor.element_size()
        if parameter not in weights:  # the number of steps
            dense_means += num_bytes
            continue
        weight, dim = weights[parameter], sharded_dim(parameter)
        missing = reduced_dim(slot, weight.ndim)
        # A slot is divided as its parameter is, unless it is a mean over the divided dim, or a scalar such as a step.
        if tensor.ndim and dim not in (None, missing):
            num_bytes //= model
        flops = newton_schulz_flops(weight.shape) if slot == MOMENTUM else 0
        if is_stacked(parameter):
            expert_orthogonal_flops += flops
            expert_state += num_bytes
            expert_means += num_bytes if missing == 1 else 0
            continue
        dense_orthogonal_flops += flops
        if not tensor.ndim or missing == 0:
            dense_means += num_bytes
        else:
            rows = weight.shape[0] // (model if dim == 0 else 1)
            state_of[rows] += num_bytes // rows
    return RankWeights(
        dense,
        expert,
        products,
        tuple(units.values()),
        tuple(expert_units.values()),
        tuple(expert_shapes),
        tuple((rows, parameters, state_of[rows]) for rows, parameters in parameters_of.items()),
        dense_means,
        expert_state,
        expert_means,
        dense_orthogonal_flops,
        expert_orthogonal_flops,
    )


class Slots(NamedTuple):
    """Rows of one sparse layer in one microbatch on one rank."""

    sent_rows: int
    """Rows that a rank sends over the expert axis: E * G * C, since empty slots are sent too; without a capacity, one
    for each expert that a token chooses."""
    expert_rows: int
    """A: rows that the experts of a rank compute."""


def slots(spec: ModelSpec, stack: Stack, step: Step, microbatch: int, expert: int) -> Slots:
    """Return the slots of a sparse layer in training, from a call of the router on `meta`.

    `microbatch` is the number of sequences of a microbatch, `expert` the number of ranks on the expert axis.
    """
    rule = spec.router_of(stack)
    num_groups = microbatch // rule.group_sequences
    group_tokens = rule.group_sequences * step.length(stack)
    capacity, max_filled = _slots_of_group(rule, group_tokens, spec.num_experts)
    sent_rows = num_groups * (max_filled if capacity >= group_tokens else spec.num_experts * capacity)
    # Without an expert axis only filled slots are computed, but in float32 on CUDA all of them (`products_wait`). With
    # one of R ranks, the E / R experts of a rank compute the slots of R ranks: E / R * R * G * C rows. If dropless,
    # they compute as many rows as a rank sends, if the experts have equal loads.
    computes_all = expert > 1 or (step.fused and step.product_bytes == FLOAT)
    expert_rows = sent_rows if computes_all else num_groups * max_filled
    return Slots(sent_rows, expert_rows)


@cache
def _slots_of_group(rule: RouterSpec, group_tokens: int, num_experts: int) -> tuple[int, int]:
    """Return C, and the largest number of slots that can be filled, of one group."""
    with torch.device("meta"):
        logits_1NE = torch.empty(1, group_tokens, num_experts)
        real_1N = torch.empty(1, group_tokens, dtype=torch.bool)
        routing = rule.assign(logits_1NE, real_1N, "training")
    return routing.token_GEC.shape[2], routing.max_filled_slots


def output_widths(spec: ModelSpec) -> dict[str, int]:
    """Return O, the number of outputs of an expert, for each routed part of a block.

    An expert of a Switch attention (Appendix A) returns a query, and one vector that is both key and value.
    """
    widths = {"attention": 2 * spec.num_heads * spec.head_width, "feed_forward": spec.d_model}
    return {part: width for part, width in widths.items() if spec.sparse in (part, "both")}
