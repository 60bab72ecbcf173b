"""Routing counts: how often the routers of each sparse layer sent a token id, or a position, to each expert.

Legend: B batch, S positions, G groups, N tokens a group, E experts, C slots, A real tokens (all positions of a batch
that are not padding), X distinct (value, expert) pairs, R distinct values.

Counting uses a temporary forward hook on each router, so a model that is not counted pays nothing. Routing in
evaluation mode is deterministic: calling the router's `assign` again on the same logits gives the same assignment.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.config import STACKS, Stack
from switchcli.model.moe.layer import SwitchLayer, evaluating, sparse_layers
from switchcli.model.moe.router import Policy
from switchcli.model.packing import SegmentIds, decoder_inputs
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
    """A sparse table of counts: how often each value (a token id, a position, ...) went to each of E experts.

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


def sum_counts(value_X: torch.Tensor, expert_X: torch.Tensor, count_X: torch.Tensor, num_experts: int) -> ExpertCounts:
    """Return a table with one entry for each distinct pair of value and expert: the sum of its counts."""
    key_R, _, count_R = count_values(value_X * num_experts + expert_X, count_X)
    return ExpertCounts(key_R, count_R, num_experts)


class StackTokens(NamedTuple):
    """The tokens that the sparse layers of one stack read in a batch."""

    real_BS: torch.Tensor
    """bool: False for padding."""
    id_A: torch.Tensor
    """int64 token ids. The decoder reads the targets shifted right, so its first id is the start token, `PAD`."""
    position_A: torch.Tensor
    """int64 positions from the start of the row, or of the example where rows are packed."""
    kind_A: torch.Tensor | None = None
    """int64: the kind of each token, as python_kinds.py numbers them, 0 for a token without one; None if not known."""


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
    positions: ExpertCounts
    """Choices by position."""
    kinds: ExpertCounts
    """Choices by kind, of tokens that have one."""
    chosen_E: torch.Tensor
    """int64: how many tokens chose each expert."""
    turned_away_E: torch.Tensor
    """int64: how many of those found no free slot there."""
    probability_E: torch.Tensor
    """float64: the sum of p_e(x) over the tokens that chose expert e."""
    num_tokens: torch.Tensor
    """int64 scalar: real tokens."""
    tokens_of_kinds: torch.Tensor
    """int64 scalar: real tokens that have a kind."""
    dropped: torch.Tensor
    """int64 scalar: tokens in no slot of any expert."""
    confidence: torch.Tensor
    """float64 scalar: the sum over tokens of the largest p_i(x)."""
    entropy: torch.Tensor
    """float64 scalar: the sum over tokens of the entropy of p(x), in nats."""
    within_token: torch.Tensor
    """float64 scalar: the sum over tokens of n ln n, where n is the number of experts that the token chose. This is the
    entropy of a choice that comes from which of the token's n experts it is; no property of the token explains it."""

    @property
    def num_experts(self) -> int:
        return self.tokens.num_experts

    @property
    def within(self) -> float:
        """The mean of `within_token` over choices: `Information.within`."""
        return float(self.within_token) / max(1, int(self.chosen_E.sum()))

    def __add__(self, other: object) -> "LayerCounts":
        assert isinstance(other, LayerCounts)
        return LayerCounts(*map(operator.add, self, other))

    def cpu(self) -> "LayerCounts":
        return LayerCounts(*map(operator.methodcaller("cpu"), self))


OnLayer = Callable[[str, StackTokens, ExpertChoices], None]
"""A function that is called with the name of a sparse layer, the tokens it read, and its choices."""


class RoutingCounts(NamedTuple):
    """The routing of one model, or of two models, on one text.

    No tensor of size A or of the vocabulary outlives its batch: only pairs that occurred are kept, and E * E entries a
    layer for two models.
    """

    layers: tuple[dict[str, LayerCounts], ...]
    """For each model, the counts by name of the sparse layer."""
    joint_EE: dict[str, torch.Tensor]
    """For two models, by name of the layer: how often a token chose expert i of the first (row) and expert j of the
    second (column); float64."""


def count_routing(
    models: Sequence[SwitchTransformer],
    batches: Iterable[Batch],
    packed: bool,
    context: DistributedContext,
    policies: Sequence[Policy],
    kinds: Sequence[Batch] | None = None,
) -> RoutingCounts:
    """Count the routing of one model, or of two models with equally named sparse layers, on the same batches.

    Args:
        models: one or two models.
        batches: batches in the host's memory.
        packed: whether several examples share a row of a batch.
        context: the device and the precision.
        policies: how the routers of each model count capacity.
        kinds: for each batch the kinds of its tokens, where their ids lie in the batch.
    """
    layers: tuple[dict[str, LayerCounts], ...] = tuple({} for _ in models)
    joint_EE: dict[str, torch.Tensor] = {}
    for batch, kinds_of_batch in zip(batches, kinds or repeat(None), strict=False):
        on_device = Batch(*context.to_device(batch))
        on_device_kinds = kinds_of_batch and Batch(*context.to_device(kinds_of_batch))
        segments = batch_segment_ids(on_device, packed)
        chosen: list[dict[str, torch.Tensor]] = [{} for _ in models]
        for model, policy, counts, chosen_AE in zip(models, policies, layers, chosen, strict=True):
            on_layer = partial(_count_layer, counts, chosen_AE if len(models) > 1 else None)
            with context.autocast():
                observe(model, on_device, segments, policy, on_layer, on_device_kinds)
        if len(models) > 1:
            one_AE, other_AE = chosen
            for name in one_AE:
                # [E, A] @ [A, E]: entry (i, j) counts the tokens that chose expert i of one and j of the other.
                _add(joint_EE, name, (one_AE[name].float().mT @ other_AE[name].float()).double())
    return RoutingCounts(layers, joint_EE)


def _count_layer(
    counts: dict[str, LayerCounts],
    chosen_AE: dict[str, torch.Tensor] | None,
    name: str,
    tokens: StackTokens,
    choices: ExpertChoices,
) -> None:
    """Add the counts of a layer on a batch to `counts`, and keep its choices in `chosen_AE` unless it is None."""
    _add(counts, name, count_choices(tokens, choices))
    if chosen_AE is not None:
        chosen_AE[name] = choices.chosen_AE


Sum = TypeVar("Sum", LayerCounts, torch.Tensor)


def _add(sums: dict[str, Sum], name: str, term: Sum) -> None:
    sums[name] = sums[name] + term if name in sums else term


@torch.no_grad()
def observe(
    model: SwitchTransformer,
    batch: Batch,
    segments: SegmentIds | None,
    policy: Policy,
    on_layer: OnLayer,
    kinds: Batch | None = None,
) -> None:
    """Run the model on a batch in evaluation mode, and call `on_layer` for each sparse layer in forward order."""
    tokens_by_stack = stack_tokens(batch, segments, kinds)

    def hook(name: str, layer: SwitchLayer) -> Callable[[Any, Any, torch.Tensor], None]:
        tokens = tokens_by_stack[next(stack for stack in STACKS if name.startswith(stack))]
        return lambda router, inputs, logits_GNE: on_layer(
            name, tokens, expert_choices(layer, logits_GNE, tokens.real_BS)
        )

    with evaluating(model, policy), ExitStack() as hooks:
        for name, layer in sparse_layers(model).items():
            hooks.enter_context(layer.router.register_forward_hook(hook(name, layer)))
        model(*batch, segments)


def stack_tokens(batch: Batch, segments: SegmentIds | None, kinds: Batch | None = None) -> Mapping[Stack, StackTokens]:
    """Return the tokens that each stack reads, with their positions. `segments` is None where rows are not packed."""
    inputs_BS, targets_BT = batch
    encoder = _stack_tokens(inputs_BS, inputs_BS != PAD, segments and segments.source_BS, kinds and kinds.inputs_BS)
    # The decoder reads shifted targets. Which positions are real follows from the targets: an example starts with PAD.
    # EOS has no kind, so kinds shifted as in rows of one example are 0 at all starts.
    ids_BT, kinds_BT = decoder_inputs(targets_BT, segments), kinds and decoder_inputs(kinds.targets_BT, None)
    decoder = _stack_tokens(ids_BT, targets_BT != PAD, segments and segments.target_BT, kinds_BT)
    return dict(zip(STACKS, (encoder, decoder), strict=True))


def _stack_tokens(
    ids_BS: torch.Tensor, real_BS: torch.Tensor, segment_BS: torch.Tensor | None, kind_BS: torch.Tensor | None
) -> StackTokens:
    position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
    if segment_BS is not None:
        # True at the first position of each example but the first; the first starts at 0 anyway.
        starts_BS = segment_BS.diff(dim=1, prepend=segment_BS[:, :1]) != 0
        # The running maximum carries the start of an example over its positions; subtract it.
        position_BS = position_BS - (position_BS * starts_BS).cummax(1).values
    kind_A = None if kind_BS is None else kind_BS[real_BS]
    return StackTokens(real_BS, ids_BS[real_BS], position_BS[real_BS], kind_A)


def expert_choices(layer: SwitchLayer, logits_GNE: torch.Tensor, real_BS: torch.Tensor) -> ExpertChoices:
    """Return what the router of `layer` does with the real tokens, given its logits."""
    N = logits_GNE.shape[1]
    # [B, S] and [G, N] are the same tokens in the same order, so both masks select A tokens in the same order.
    real_GN = real_BS.reshape(logits_GNE.shape[:2])

    def slots_AE(mode: Policy) -> torch.Tensor:
        # Entries are token numbers 0..N-1 of a group, and N for an empty slot. Column N collects the empty slots.
        token_GEC = layer.assign(logits_GNE, real_GN, mode).token_GEC
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
    E, one_X = chosen_AE.shape[1], torch.ones_like(expert_X)
    turned_away_X = ~in_slot_AE[token_X, expert_X]
    zeros_E = probability_AE.new_zeros(E, dtype=torch.float64)
    kind_A = torch.zeros_like(tokens.id_A) if tokens.kind_A is None else tokens.kind_A
    kind_X = kind_A[token_X]
    has_kind_X = kind_X > 0
    return LayerCounts(
        tokens=sum_counts(tokens.id_A[token_X], expert_X, one_X, E),
        positions=sum_counts(tokens.position_A[token_X], expert_X, one_X, E),
        kinds=sum_counts(kind_X[has_kind_X], expert_X[has_kind_X], one_X[has_kind_X], E),
        chosen_E=expert_X.bincount(minlength=E),
        turned_away_E=expert_X[turned_away_X].bincount(minlength=E),
        probability_E=zeros_E.index_add(0, expert_X, probability_AE[token_X, expert_X].double()),
        num_tokens=one_X.new_tensor(len(chosen_AE)),
        tokens_of_kinds=(kind_A > 0).sum(),
        dropped=(~in_slot_AE.any(1)).sum(),
        confidence=probability_AE.amax(1).sum(dtype=torch.float64),
        # entr(x) is -x ln x, and 0 for x = 0.
        entropy=torch.special.entr(probability_AE).sum(1).sum(dtype=torch.float64),
        within_token=-torch.special.entr(chosen_AE.sum(1).double()).sum(),
    )
