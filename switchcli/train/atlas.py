"""The routing atlas: what the experts of each sparse layer take, counted over passes of held-out text.

Legend: B batch, S positions, G groups, N tokens a group, E experts, C slots, A places: the positions of a batch that
are no padding. X pairs that occurred.

A model is watched from outside, by a hook on each router that is gone afterwards: it keeps nothing, and costs nothing
when nobody looks. An evaluation draws nothing at random, so that the router's rule, asked again with the same logits,
answers as it did.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
from switchcli.train.loss import batch_segment_ids


class ExpertCounts(NamedTuple):
    """How often each of some values (a token's id, a position) went to each expert: those that did alone.

    So a layer takes no more than 16 bytes for each choice that was counted, nor for each of the vocabulary times E.
    """

    key_X: torch.Tensor
    """int64, in order, each once: value * E + expert."""
    count_X: torch.Tensor
    """int64."""

    def __add__(self, other: object) -> "ExpertCounts":
        assert isinstance(other, ExpertCounts)
        return sum_counts(torch.cat([self.key_X, other.key_X]), torch.cat([self.count_X, other.count_X]))


def sum_counts(key_X: torch.Tensor, count_X: torch.Tensor) -> ExpertCounts:
    """The pairs with each key once."""
    key, place = torch.unique(key_X, return_inverse=True)
    return ExpertCounts(key, count_X.new_zeros(len(key)).scatter_add_(0, place, count_X))


class TokenPlaces(NamedTuple):
    """What the sparse layers of a stack read in a batch."""

    real_BS: torch.Tensor
    token_A: torch.Tensor
    """int64 ids: of a decoder those that it reads, the targets one later, where padding is the token that starts it."""
    position_A: torch.Tensor
    """From the beginning of the row; where rows are packed, of the example."""


class Choices(NamedTuple):
    """What a sparse layer did with its places."""

    probability_AE: torch.Tensor
    """float32."""
    chosen_AE: torch.Tensor
    """bool: the experts that a token would go to if there were a slot for every token; of expert choice, which cannot
    do without, `held_AE`."""
    held_AE: torch.Tensor
    """bool: the experts in whose slots it is, under the capacity in use."""


class LayerCounts(NamedTuple):
    """What a sparse layer did, over any number of batches; they add up."""

    tokens: ExpertCounts
    """By id."""
    positions: ExpertCounts
    chosen_E: torch.Tensor
    """int64, as the next."""
    turned_away_E: torch.Tensor
    """Of those that chose it, the ones that found no slot there."""
    probability_E: torch.Tensor
    """float64: the sum of p_e(x) over those that chose it."""
    num_tokens: torch.Tensor
    dropped: torch.Tensor
    """Tokens in no slot at all."""
    confidence: torch.Tensor
    """float64, as the next: the sum over tokens of the largest p_i(x)."""
    entropy: torch.Tensor
    """The sum over tokens of the entropy of p(x), in nats."""
    within: torch.Tensor
    """float64: the sum over tokens of n ln n, of the n experts that one chose: so much of its choices' entropy is which
    of the n one of them is."""

    def __add__(self, other: object) -> "LayerCounts":
        assert isinstance(other, LayerCounts)
        pairs = (self.tokens + other.tokens, self.positions + other.positions)
        return LayerCounts(*pairs, *map(torch.add, self[2:], other[2:]))

    def on_the_cpu(self) -> "LayerCounts":
        tokens, positions = (ExpertCounts(*(part.cpu() for part in one)) for one in self[:2])
        return LayerCounts(tokens, positions, *(part.cpu() for part in self[2:]))


See = Callable[[str, TokenPlaces, Choices], None]
"""Told the name of a sparse layer, what it read, and what it did."""


class RoutingCounts(NamedTuple):
    """What one text showed of one model, or of two.

    Beyond a batch no tensor of A or of a vocabulary is kept, but the pairs that occurred, and E * E of two models.
    """

    layers: tuple[dict[str, LayerCounts], ...]
    """Of each model, by the name of the layer."""
    together_EE: dict[str, torch.Tensor]
    """Of two models: how often a token that chose one's expert (row) chose the other's (column); float64."""


def count_routing(
    models: Sequence[SwitchTransformer],
    batches: Iterable[Batch],
    packed: bool,
    context: DistributedContext,
    policies: Sequence[Policy],
) -> RoutingCounts:
    """Count what one model does with batches, or two: with the same ones, their layers alike by name."""
    layers: tuple[dict[str, LayerCounts], ...] = tuple({} for _ in models)
    together_EE: dict[str, torch.Tensor] = {}
    for batch in batches:
        placed = Batch(*context.to_device(batch))
        kept: list[dict[str, torch.Tensor]] = [{} for _ in models]
        for model, policy, sums, chosen_AE in zip(models, policies, layers, kept, strict=True):
            note = partial(_note, sums, chosen_AE if len(models) > 1 else None)
            with context.autocast():
                observe(model, placed, batch_segment_ids(placed, packed), policy, note)
        if len(models) > 1:
            one_AE, other_AE = kept
            for name in one_AE:
                _add(together_EE, name, (one_AE[name].float().mT @ other_AE[name].float()).double())
    return RoutingCounts(layers, together_EE)


Sum = TypeVar("Sum", LayerCounts, torch.Tensor)


def _note(
    sums: dict[str, LayerCounts],
    chosen_AE: dict[str, torch.Tensor] | None,
    name: str,
    places: TokenPlaces,
    choices: Choices,
) -> None:
    _add(sums, name, counts_of(places, choices))
    if chosen_AE is not None:
        chosen_AE[name] = choices.chosen_AE


def _add(sums: dict[str, Sum], name: str, more: Sum) -> None:
    sums[name] = sums[name] + more if name in sums else more


@torch.no_grad()
def observe(model: SwitchTransformer, batch: Batch, segments: SegmentIds | None, policy: Policy, see: See) -> None:
    """Run a batch through the model in evaluation, and tell of each sparse layer as it comes."""
    places = places_of(batch, segments)

    def told(name: str, layer: SwitchLayer, logits_GNE: torch.Tensor) -> None:
        where = places[_stack_of(name)]
        see(name, where, choices_of(layer, logits_GNE, where.real_BS))

    with evaluating(model, policy), _watching(model, told):
        model(*batch, segments)


def places_of(batch: Batch, segments: SegmentIds | None) -> Mapping[Stack, TokenPlaces]:
    """The tokens and the positions that each stack reads."""
    inputs_BS, targets_BT = batch
    read = (
        (inputs_BS, inputs_BS != PAD, segments and segments.source_BS),
        (decoder_inputs(targets_BT, segments), targets_BT != PAD, segments and segments.target_BT),
    )
    return {stack: _places(*each) for stack, each in zip(STACKS, read, strict=True)}


def _places(ids_BS: torch.Tensor, real_BS: torch.Tensor, segment_BS: torch.Tensor | None) -> TokenPlaces:
    position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
    if segment_BS is not None:
        begins_BS = segment_BS.diff(dim=1, prepend=segment_BS[:, :1]) != 0
        position_BS = position_BS - (position_BS * begins_BS).cummax(1).values
    return TokenPlaces(real_BS, ids_BS[real_BS], position_BS[real_BS])


def choices_of(layer: SwitchLayer, logits_GNE: torch.Tensor, real_BS: torch.Tensor) -> Choices:
    """What the layer's rule makes of its router's logits, at the places that are no padding."""
    N = logits_GNE.shape[1]
    real_GN = real_BS.reshape(logits_GNE.shape[:2])

    def seated(mode: Policy) -> torch.Tensor:
        token_GEC = layer.rule.assign(logits_GNE, real_GN, mode).token_GEC
        seat_GEN = token_GEC.new_zeros(*token_GEC.shape[:2], N + 1, dtype=torch.bool).scatter_(2, token_GEC, True)
        return seat_GEN[..., :N].mT[real_GN]

    assert layer.mode != "training"
    with torch.autocast(logits_GNE.device.type, enabled=False):
        held_AE = seated(layer.mode)
        chosen_AE = held_AE if layer.rule.experts_choose else seated("dropless")
        return Choices(logits_GNE[real_GN].float().softmax(-1), chosen_AE, held_AE)


def counts_of(places: TokenPlaces, choices: Choices) -> LayerCounts:
    """Of one layer on one batch."""
    probability_AE, chosen_AE, held_AE = choices
    place_X, expert_X = chosen_AE.nonzero(as_tuple=True)
    E, one_X = chosen_AE.shape[1], torch.ones_like(expert_X)
    away_X = ~held_AE[place_X, expert_X]
    sums_E = probability_AE.new_zeros(E, dtype=torch.float64)
    return LayerCounts(
        tokens=sum_counts(places.token_A[place_X] * E + expert_X, one_X),
        positions=sum_counts(places.position_A[place_X] * E + expert_X, one_X),
        chosen_E=expert_X.bincount(minlength=E),
        turned_away_E=expert_X[away_X].bincount(minlength=E),
        probability_E=sums_E.index_add(0, expert_X, probability_AE[place_X, expert_X].double()),
        num_tokens=one_X.new_tensor(len(chosen_AE)),
        dropped=(~held_AE.any(1)).sum(),
        confidence=probability_AE.amax(1).sum(dtype=torch.float64),
        entropy=torch.special.entr(probability_AE).sum(1).sum(dtype=torch.float64),
        within=-torch.special.entr(chosen_AE.sum(1).double()).sum(),
    )


def _stack_of(layer: str) -> Stack:
    return next(stack for stack in STACKS if layer.startswith(stack))


@contextmanager
def _watching(model: SwitchTransformer, told: Callable[[str, SwitchLayer, torch.Tensor], None]) -> Iterator[None]:
    def hook(name: str, layer: SwitchLayer) -> Callable[[Any, Any, torch.Tensor], None]:
        return lambda router, inputs, logits_GNE: told(name, layer, logits_GNE)

    hooks = [layer.router.register_forward_hook(hook(name, layer)) for name, layer in sparse_layers(model).items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()
