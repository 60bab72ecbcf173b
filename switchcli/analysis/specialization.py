"""Specialization: which tokens an expert gets more often than others, and what determines a token's expert.

Computed from the counts of routing_counts.py. Legend: E experts, X distinct (value, expert) pairs, R distinct values
(token ids, position bins or texts) in ascending order, N choices.
"""

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch

from switchcli.analysis.routing_counts import ExpertCounts, LayerCounts, sum_counts
from switchcli.data.python_kinds import KINDS
from switchcli.metric_names import DROPPED_FRACTION
from switchcli.model.moe.evenness import load_spread

TOP_TOKENS = 10
"""Tokens listed for each expert, at most."""
MIN_COUNT = 10
"""Least count of a token in the list by lift: the lift of a rarer token is mostly chance."""
NUM_BINS = 16
"""Bins of equal width that the positions of a row are divided into, at most."""


class Information(NamedTuple):
    """What a value (a token id, a position, a text) tells about the expert, in nats for one choice. Written to JSON."""

    nats: float
    """The mutual information of value and expert. Chance alone makes it positive, the more so the rarer the values."""
    by_chance: float
    """The mutual information after the choices are assigned to the values at random (`information_by_chance`): the bias
    of `nats`. It is about (R - 1)(E - 1) / (2 N) where each of the R values came often (Miller and Madow), and stays
    right where many are rare."""
    experts: float
    """The entropy of the experts' shares of the choices."""
    values: float
    """The entropy of the values' shares of the choices."""
    within: float
    """The part of `experts` that no value can explain: which of a token's own experts a choice is. It is ln k where
    every token chose k experts."""

    @property
    def share(self) -> float | None:
        """(nats - by_chance) / (experts - within - by_chance): 0 for chance, 1 where the value determines the expert.
        None where chance already explains everything."""
        explainable = self.experts - self.within - self.by_chance
        return (self.nats - self.by_chance) / explainable if explainable > 1e-9 else None

    @property
    def share_of_values(self) -> float | None:
        """(nats - by_chance) / (values - by_chance): 0 for chance, 1 where the expert determines the value."""
        tellable = self.values - self.by_chance
        return (self.nats - self.by_chance) / tellable if tellable > 1e-9 else None

    def to_json(self) -> dict[str, float | None]:
        return {**self._asdict(), "share": self.share, "share_of_values": self.share_of_values}


def information(pairs: ExpertCounts, num_tokens: int, within: float) -> Information:
    """Return the information of `pairs`, which count the choices of `num_tokens` tokens and are on the CPU."""
    experts, values = _entropy(pairs.by_expert()), _entropy(pairs.by_value().count_R)
    # I(value; expert) = H(value) + H(expert) - H(value, expert). At random each value and each expert is as frequent.
    at_random = information_by_chance(pairs, num_tokens)
    nats, by_chance = (values + experts - _entropy(joint.count_X) for joint in (pairs, at_random))
    return Information(nats, by_chance, experts, values, within)


def information_by_chance(pairs: ExpertCounts, num_tokens: int) -> ExpertCounts:
    """Return `pairs` with the choices assigned to the values at random, from a fixed seed.

    Each value and each expert keep their counts. Where every token chose k experts, a token again gets k different
    ones. Otherwise choices are assigned one by one.

    Example: four tokens chose k = 2 of three experts, which have 3, 3 and 2 choices. The sorted list of the eight
    experts is 0 0 0 1, 1 1 2 2: its halves are the columns of four rows, 0 1, 0 1, 0 2 and 1 2. The shuffled rows are
    dealt out to the tokens in the order of their values.
    """
    # The N choices, one entry each: their values in ascending order, and their experts in ascending order.
    value_R, _, count_R = pairs.by_value()
    value_N = value_R.repeat_interleave(count_R)
    expert_N = torch.arange(pairs.num_experts).repeat_interleave(pairs.by_expert())
    k, remainder = divmod(len(expert_N), max(1, num_tokens))
    # [N / k, k], a row for each token: its k experts are N / k = num_tokens apart in the sorted list. No expert has
    # more than num_tokens choices, so the experts of a row differ. Rows are shuffled as a unit.
    expert_rows = expert_N.reshape(1 if remainder else max(1, k), -1).T
    order = torch.randperm(len(expert_rows), generator=torch.Generator().manual_seed(0))
    return sum_counts(value_N, expert_rows[order].flatten(), torch.ones_like(value_N), pairs.num_experts)


def specialization_metrics(texts: Mapping[str, LayerCounts], sentinels: Sequence[int]) -> dict[str, Any]:
    """Return the JSON object of one layer, over its counts by text. Tokens, sentinels too, are named by their ids."""
    counts_by_text = {name: counts.cpu() for name, counts in texts.items()}
    counts = reduce(operator.add, counts_by_text.values())
    num_experts, num_tokens = counts.num_experts, int(counts.num_tokens)
    bins = _bin_positions(counts.positions)
    load_by_bin = _load_by_value(bins.pairs)
    sources = {"token": counts.tokens, "position": bins.pairs}
    if len(texts) > 1:
        # The value of a choice is the number of its text: keys run over all (text, expert) pairs in order.
        count_X = torch.cat([text.chosen_E for text in counts_by_text.values()])
        sources["text"] = ExpertCounts(torch.arange(len(count_X)), count_X, num_experts)
    told = {name: information(pairs, num_tokens, counts.within) for name, pairs in sources.items()}
    if tokens_of_kinds := int(counts.tokens_of_kinds):
        told["kind"] = information(counts.kinds, tokens_of_kinds, counts.within)
    tokens = counts.tokens
    is_sentinel_X = torch.isin(tokens.value_X, torch.tensor(sentinels))
    sentinel_pairs = tokens._replace(key_X=tokens.key_X[is_sentinel_X], count_X=tokens.count_X[is_sentinel_X])
    return {
        "tokens": num_tokens,
        DROPPED_FRACTION: int(counts.dropped) / max(1, num_tokens),
        "confidence": float(counts.confidence) / max(1, num_tokens),
        "entropy": float(counts.entropy) / max(1, num_tokens),
        "load": counts.chosen_E.tolist(),
        **{name: float(value_L[0]) for name, value_L in load_spread(counts.chosen_E.unsqueeze(0)).items()},
        "explained_by": {name: info.to_json() for name, info in told.items()},
        "experts": _expert_metrics(counts),
        "positions": {
            "firsts": bins.firsts,
            "last": bins.last,
            "load": [load_by_bin.get(number, [0] * num_experts) for number in range(len(bins.firsts))],
        },
        "sentinels": _load_by_value(sentinel_pairs),
        "kinds": {KINDS[kind]: load for kind, load in _load_by_value(counts.kinds).items()},
        "texts": {name: text.chosen_E.tolist() for name, text in counts_by_text.items()},
    }


def _expert_metrics(counts: LayerCounts) -> list[dict[str, Any]]:
    """Return the JSON object of each expert of a layer."""
    num_choices = max(1, int(counts.chosen_E.sum()))
    columns = zip(
        counts.chosen_E.tolist(),
        counts.turned_away_E.tolist(),
        counts.probability_E.tolist(),
        top_tokens(counts.tokens),
        strict=True,
    )
    return [
        {
            "share": chosen / num_choices,
            "turned_away_fraction": turned_away / chosen if chosen else None,
            "confidence": probability / chosen if chosen else None,
            **top._asdict(),
        }
        for chosen, turned_away, probability, top in columns
    ]


class TopTokens(NamedTuple):
    """The tokens listed for one expert: id, count at the expert, and lift. Written to JSON.

    The lift of a token is its share of the expert's choices over its share of all choices.
    """

    by_lift: list[dict[str, float]]
    """Tokens with at least `MIN_COUNT` choices and a lift above 1, highest lift first; ties by count."""
    by_count: list[dict[str, float]]
    """Tokens with the most choices of the expert."""


def top_tokens(tokens: ExpertCounts) -> list[TopTokens]:
    """Return at most `TOP_TOKENS` tokens for each expert, by lift and by count."""
    value_X, expert_X = tokens.value_X, tokens.expert_X
    _, row_X, count_R = tokens.by_value()
    # For each pair: all choices of its token, and all choices of its expert.
    token_total_X, expert_total_X = count_R[row_X], tokens.by_expert()[expert_X]
    lift_X = tokens.count_X.double() * count_R.sum() / (expert_total_X.double() * token_total_X)

    def describe(pair_numbers: torch.Tensor) -> list[dict[str, float]]:
        ids, counts = value_X[pair_numbers].tolist(), tokens.count_X[pair_numbers].tolist()
        columns = zip(ids, counts, lift_X[pair_numbers].tolist(), strict=True)
        return [{"id": token_id, "count": count, "lift": lift} for token_id, count, lift in columns]

    def first_of_each_expert(order_X: torch.Tensor) -> list[list[dict[str, float]]]:
        """Return the first `TOP_TOKENS` pairs of each expert, in the order of the pair numbers `order_X`."""
        # A stable sort by expert makes the pairs of each expert contiguous and keeps their order.
        order_X = order_X[expert_X[order_X].sort(stable=True).indices]
        num_E = torch.bincount(expert_X[order_X], minlength=tokens.num_experts)
        return [describe(pair_numbers[:TOP_TOKENS]) for pair_numbers in torch.split(order_X, num_E.tolist())]

    # Pair numbers, highest count first; then, keeping that order among ties, highest lift first.
    by_count_X = tokens.count_X.sort(descending=True, stable=True).indices
    by_lift_X = by_count_X[lift_X[by_count_X].sort(descending=True, stable=True).indices]
    is_listed_X = (token_total_X[by_lift_X] >= MIN_COUNT) & (lift_X[by_lift_X] > 1)
    by_lift, by_count = first_of_each_expert(by_lift_X[is_listed_X]), first_of_each_expert(by_count_X)
    return [TopTokens(*lists) for lists in zip(by_lift, by_count, strict=True)]


class _PositionBins(NamedTuple):
    """Counts of a layer by bin of positions."""

    pairs: ExpertCounts
    """The value is the number of the bin."""
    firsts: list[int]
    """The first position of each bin."""
    last: int
    """The last position of the last bin."""


def _bin_positions(positions: ExpertCounts) -> _PositionBins:
    position_X = positions.value_X
    last = int(position_X.max()) if len(position_X) else 0
    width = -(-(last + 1) // NUM_BINS)  # rounded up, so that NUM_BINS bins hold positions 0 to last
    pairs = sum_counts(position_X // width, positions.expert_X, positions.count_X, positions.num_experts)
    return _PositionBins(pairs, [*range(0, last + 1, width)], last)


def _load_by_value(pairs: ExpertCounts) -> dict[int, list[int]]:
    """Return the counts of all experts for each value that occurs."""
    value_R, row_X, count_R = pairs.by_value()
    load_RE = count_R.new_zeros(len(count_R), pairs.num_experts)
    load_RE[row_X, pairs.expert_X] = pairs.count_X
    return dict(zip(value_R.tolist(), load_RE.tolist(), strict=True))


def _entropy(count: torch.Tensor) -> float:
    """Return the entropy of the distribution given by counts, in nats; 0 without counts."""
    return float(torch.special.entr(count.double() / count.sum().clamp(min=1)).sum())
