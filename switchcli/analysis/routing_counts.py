"""Routing counts: how often the routers of each sparse layer sent a token id to each expert.

Legend: B batch, S positions, G groups, N tokens a group, E experts, C slots, A real tokens (all positions of a batch
that are not padding), X distinct (value, expert) pairs, R distinct values.

Counting uses a temporary forward hook on each router, so a model that is not counted pays nothing. Routing in
evaluation mode is deterministic: calling the router's `assign` again on the same logits gives the same assignment.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.attention import SegmentIds, decoder_inputs
from switchcli.model.config import STACKS, Stack
from switchcli.model.moe.layer import SwitchLayer, evaluating, sparse_layers
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import PAD
from switchcli.training.loss import batch_segment_ids


class ValueCounts(NamedTuple):
    """The R distinct values of X entries, each of which has a value and a count."""

    value_R: torch.Tensor
    """int64, ascending."""
    row_X: torch.Tensor
    """int64: where the value of each entry is in `value_R`."""
    count_R: torch.Tensor
    """int64: the total count of each value."""


def count_values(value_X: torch.Tensor, count_X: torch.Tensor) -> ValueCounts:
    """Return the distinct values of entries with their total counts."""
    value_R, row_X = torch.unique(value_X, return_inverse=True)
    return ValueCounts(value_R, row_X, count_X.new_zeros(len(value_R)).scatter_add_(0, row_X, count_X))


class ExpertCounts(NamedTuple):
    """A sparse table of counts: how often each value, such as a token id, went to each of E experts.

    Only pairs that occurred are stored, 16 bytes each. The dense table would have vocabulary * E entries.
    """

    key_X: torch.Tensor
    """int64, ascending and distinct: value * E + expert."""
    count_X: torch.Tensor
    """int64."""
    num_experts: int

    @property
    def value_X(self) -> torch.Tensor:
        return self.key_X // self.num_experts

    @property
    def expert_X(self) -> torch.Tensor:
        return self.key_X % self.num_experts

    def by_value(self) -> ValueCounts:
        """Return the total count of each value."""
        return count_values(self.value_X, self.count_X)

    def by_expert(self) -> torch.Tensor:
        """Return the total count of each expert: int64 [E]."""
        return self.count_X.new_zeros(self.num_experts).scatter_add_(0, self.expert_X, self.count_X)

    def __add__(self, other: object) -> "ExpertCounts":
        assert isinstance(other, ExpertCounts)
        key_X, count_X = (torch.cat(pair) for pair in ((self.key_X, other.key_X), (self.count_X, other.count_X)))
        key_R, _, count_R = count_values(key_X, count_X)
        return ExpertCounts(key_R, count_R, self.num_experts)

    def cpu(self) -> "ExpertCounts":
        return self._replace(key_X=self.key_X.cpu(), count_X=self.count_X.cpu())


def count_pairs(value_X: torch.Tensor, expert_X: torch.Tensor, num_experts: int) -> ExpertCounts:
    """Return how often each pair of value and expert occurs."""
    key_R, count_R = torch.unique(value_X * num_experts + expert_X, return_counts=True)
    return ExpertCounts(key_R, count_R, num_experts)


class StackTokens(NamedTuple):
    """The tokens that the sparse layers of one stack read in a batch."""

    real_BS: torch.Tensor
    """bool: False for padding."""
    id_A: torch.Tensor
    """int64 token ids. The decoder reads the targets shifted right, so its first id is the start token, `PAD`."""


class ExpertChoices(NamedTuple):
    """What one sparse layer did with the real tokens of a batch."""

    probability_AE: torch.Tensor
    """float32: the router's p(x)."""
    chosen_AE: torch.Tensor
    """bool: the experts that the token would go to with unlimited capacity. Under expert choice, where capacity defines
    the choice, equal to `in_slot_AE`."""
    in_slot_AE: torch.Tensor
    """bool: the experts that have the token in one of their slots, under the capacity in use."""


class LayerCounts(NamedTuple):
    """Counts of one sparse layer over any number of batches. Counts of different batches can be added."""

    tokens: ExpertCounts
    """Choices by token id."""
    chosen_E: torch.Tensor
    """int64: how many tokens chose each expert."""
    turned_away_E: torch.Tensor
    """int64: how many of those found no free slot there."""
    probability_E: torch.Tensor
    """float64: the sum of p_e(x) over the tokens that chose expert e."""
    num_tokens: torch.Tensor
    """int64 scalar: real tokens."""
    dropped: torch.Tensor
    """int64 scalar: tokens in no slot of any expert."""
    confidence: torch.Tensor
    """float64 scalar: the sum over tokens of the largest p_i(x)."""
    entropy: torch.Tensor
    """float64 scalar: the sum over tokens of the entropy of p(x), in nats."""

    @property
    def num_experts(self) -> int:
        return self.tokens.num_experts

    def __add__(self, other: object) -> "LayerCounts":
        assert isinstance(other, LayerCounts)
        return LayerCounts(*map(operator.add, self, other))

    def cpu(self) -> "LayerCounts":
        return LayerCounts(*map(operator.methodcaller("cpu"), self))


OnLayer = Callable[[str, StackTokens, ExpertChoices], None]
"""A function that is called with the name of a sparse layer, the tokens it read, and its choices."""


def count_routing(
    model: SwitchTransformer, batches: Iterable[Batch], packed: bool, context: DistributedContext, policy: Policy
) -> dict[str, LayerCounts]:
    """Count the routing of a model on batches. Return the counts by name of the sparse layer.

    No tensor of size A or of the vocabulary outlives its batch: only pairs that occurred are kept.

    Args:
        model: the model.
        batches: batches in the host's memory.
        packed: whether several examples share a row of a batch.
        context: the device and the precision.
        policy: how routers count capacity.
    """
    counts: dict[str, LayerCounts] = {}

    def add(name: str, tokens: StackTokens, choices: ExpertChoices) -> None:
        layer = count_choices(tokens, choices)
        counts[name] = counts[name] + layer if name in counts else layer

    for batch in batches:
        on_device = Batch(*context.to_device(batch))
        with context.autocast():
            observe(model, on_device, batch_segment_ids(on_device, packed), policy, add)
    return counts


@torch.no_grad()
def observe(
    model: SwitchTransformer, batch: Batch, segments: SegmentIds | None, policy: Policy, on_layer: OnLayer
) -> None:
    """Run the model on a batch in evaluation mode, and call `on_layer` for each sparse layer in forward order."""
    tokens_by_stack = stack_tokens(batch, segments)

    def hook(name: str, layer: SwitchLayer) -> Callable[[Any, Any, torch.Tensor], None]:
        tokens = tokens_by_stack[next(stack for stack in STACKS if name.startswith(stack))]
        return lambda router, inputs, logits_GNE: on_layer(
            name, tokens, expert_choices(layer, logits_GNE, tokens.real_BS)
        )

    with evaluating(model, policy), ExitStack() as hooks:
        for name, layer in sparse_layers(model).items():
            hooks.enter_context(layer.router.register_forward_hook(hook(name, layer)))
        model(*batch, segments)


def stack_tokens(batch: Batch, segments: SegmentIds | None) -> Mapping[Stack, StackTokens]:
    """Return the tokens that each stack reads. `segments` is None where rows are not packed."""
    inputs_BS, targets_BT = batch
    real_BS, real_BT = inputs_BS != PAD, targets_BT != PAD
    encoder = StackTokens(real_BS, inputs_BS[real_BS])
    # The decoder reads shifted targets. Which positions are real follows from the targets: an example starts with PAD.
    decoder = StackTokens(real_BT, decoder_inputs(targets_BT, segments)[real_BT])
    return dict(zip(STACKS, (encoder, decoder), strict=True))


def expert_choices(layer: SwitchLayer, logits_GNE: torch.Tensor, real_BS: torch.Tensor) -> ExpertChoices:
    """Return what the router of `layer` does with the real tokens, given its logits."""
    N = logits_GNE.shape[1]
    # [B, S] and [G, N] are the same tokens in the same order, so both masks select A tokens in the same order.
    real_GN = real_BS.reshape(logits_GNE.shape[:2])

    def slots_AE(mode: Policy) -> torch.Tensor:
        # Entries are token numbers 0..N-1 of a group, and N for an empty slot. Column N collects the empty slots.
        token_GEC = layer.router_spec.assign(logits_GNE, real_GN, mode, layer.router.bias).token_GEC
        in_slot_GEN = token_GEC.new_zeros(*token_GEC.shape[:2], N + 1, dtype=torch.bool).scatter_(2, token_GEC, True)
        return in_slot_GEN[..., :N].mT[real_GN]

    assert layer.mode != "training"
    with torch.autocast(logits_GNE.device.type, enabled=False):
        in_slot_AE = slots_AE(layer.mode)
        chosen_AE = in_slot_AE if layer.router_spec.experts_choose else slots_AE("dropless")
        return ExpertChoices(layer.router_spec.probabilities(logits_GNE[real_GN].float()), chosen_AE, in_slot_AE)


def count_choices(tokens: StackTokens, choices: ExpertChoices) -> LayerCounts:
    """Return the counts of one layer on one batch."""
    probability_AE, chosen_AE, in_slot_AE = choices
    # One entry for each choice: choice x is that of token token_X[x] for expert expert_X[x].
    token_X, expert_X = chosen_AE.nonzero(as_tuple=True)
    E = chosen_AE.shape[1]
    turned_away_X = ~in_slot_AE[token_X, expert_X]
    zeros_E = probability_AE.new_zeros(E, dtype=torch.float64)
    return LayerCounts(
        tokens=count_pairs(tokens.id_A[token_X], expert_X, E),
        chosen_E=expert_X.bincount(minlength=E),
        turned_away_E=expert_X[turned_away_X].bincount(minlength=E),
        probability_E=zeros_E.index_add(0, expert_X, probability_AE[token_X, expert_X].double()),
        num_tokens=expert_X.new_tensor(len(chosen_AE)),
        dropped=(~in_slot_AE.any(1)).sum(),
        confidence=probability_AE.amax(1).sum(dtype=torch.float64),
        # entr(x) is -x ln x, and 0 for x = 0.
        entropy=torch.special.entr(probability_AE).sum(1).sum(dtype=torch.float64),
    )
