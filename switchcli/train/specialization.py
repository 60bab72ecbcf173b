"""What the counts of an atlas say: which tokens an expert takes more than others, and by what a layer tells them apart.

Legend: E experts, X pairs that occurred, R values (of tokens, positions or texts) in order, N choices, P bins.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from switchcli.metric_names import DROPPED_FRACTION
from switchcli.train.atlas import ExpertCounts, LayerCounts, sum_counts

TOP = 10
"""Tokens that are named of an expert."""
LEAST = 10
"""A token that was read less often has no lift: it would be chance."""
BINS = 16
"""Of the positions of a row."""


class Information(NamedTuple):
    """What a value (a token's id, where it stands, of which text it is) says of the expert, in nats."""

    nats: float
    """Mutual information of the counts. It is more than 0 by chance alone, the more so the rarer the values are."""
    by_chance: float
    """The same with the choices dealt out to the values at random (`dealt`)."""
    experts: float
    """The entropy of the experts' shares."""
    within: float
    """So much of it no value can say: which one a choice is of the experts that its token chose, ln k where it chose k.
    """

    @property
    def share(self) -> float | None:
        """(nats - by_chance) / (experts - within - by_chance): 0 by chance, 1 where the value decides. None where
        chance says as much as anything could."""
        most = self.experts - self.within - self.by_chance
        return (self.nats - self.by_chance) / most if most > 1e-9 else None

    def to_json(self) -> dict[str, float | None]:
        return {**self._asdict(), "share": self.share}


def information(pairs: ExpertCounts, num_experts: int, num_tokens: int, within: float) -> Information:
    """Of counts on the CPU, which are the choices of so many tokens."""
    count_E = _by_expert(pairs.key_X % num_experts, pairs.count_X, num_experts)
    by_chance = _mutual(information_by_chance(pairs, num_experts, num_tokens), num_experts)
    return Information(_mutual(pairs, num_experts), by_chance, _entropy(count_E), within)


def within(counts: LayerCounts) -> float:
    """`Information.within` of a choice."""
    return float(counts.within) / max(1, int(counts.chosen_E.sum()))


def information_by_chance(pairs: ExpertCounts, num_experts: int, num_tokens: int) -> ExpertCounts:
    """The choices dealt out to the values at random, once: each value and each expert as often.

    Where every token chose k, k are dealt at once and no two alike: those that stand N / k apart in the order of the
    experts, none of which was chosen by more than all tokens. Other choices are dealt one by one.
    """
    value_X, expert_X = pairs.key_X // num_experts, pairs.key_X % num_experts
    value_N = torch.unique(value_X).repeat_interleave(_total_of(value_X, pairs.count_X)[1])
    expert_N = torch.arange(num_experts).repeat_interleave(_by_expert(expert_X, pairs.count_X, num_experts))
    hands, left = divmod(len(expert_N), max(1, num_tokens))
    hand_N = expert_N.reshape(max(1, hands) if not left else 1, -1).T
    hand_N = hand_N[torch.randperm(len(hand_N), generator=torch.Generator().manual_seed(0))].flatten()
    return sum_counts(value_N * num_experts + hand_N, torch.ones_like(hand_N))


def specialization_metrics(texts: Mapping[str, LayerCounts], sentinels: Sequence[int]) -> dict[str, Any]:
    """All of a layer as JSON has it, over texts by name; tokens by their ids."""
    each = {name: counts.on_the_cpu() for name, counts in texts.items()}
    first, *others = each.values()
    counts = sum(others, start=first)
    num_experts, num_tokens = len(counts.chosen_E), int(counts.num_tokens)
    bins = _binned(counts.positions, num_experts)
    binned = _rows(bins.pairs, num_experts)
    told_by = {"token": counts.tokens, "position": bins.pairs}
    if others:
        key_X = torch.arange(len(each) * num_experts)
        told_by["text"] = ExpertCounts(key_X, torch.cat([one.chosen_E for one in each.values()]))
    is_sentinel_X = torch.isin(counts.tokens.key_X // num_experts, torch.tensor(sentinels))
    return {
        "tokens": num_tokens,
        DROPPED_FRACTION: int(counts.dropped) / max(1, num_tokens),
        "confidence": float(counts.confidence) / max(1, num_tokens),
        "entropy": float(counts.entropy) / max(1, num_tokens),
        "load": counts.chosen_E.tolist(),
        "told_by": {
            what: information(pairs, num_experts, num_tokens, within(counts)).to_json()
            for what, pairs in told_by.items()
        },
        "experts": _experts(counts),
        "positions": {
            "firsts": bins.firsts,
            "last": bins.last,
            "load": [binned.get(number, [0] * num_experts) for number in range(len(bins.firsts))],
        },
        "sentinels": _rows(ExpertCounts(*(part[is_sentinel_X] for part in counts.tokens)), num_experts),
        "texts": {name: one.chosen_E.tolist() for name, one in each.items()},
    }


def _experts(counts: LayerCounts) -> list[dict[str, Any]]:
    columns = zip(
        *(part.tolist() for part in counts[2:5]), top_tokens(counts.tokens, len(counts.chosen_E)), strict=True
    )
    choices = max(1, int(counts.chosen_E.sum()))
    return [
        {
            "share": chosen / choices,
            "turned_away_fraction": turned_away / chosen if chosen else None,
            "confidence": probability / chosen if chosen else None,
            **named._asdict(),
        }
        for chosen, turned_away, probability, named in columns
    ]


class Top(NamedTuple):
    """The tokens of an expert that are named: each its id, how often it went there, and its lift, which is its share of
    the expert's tokens over its share of all."""

    by_lift: list[dict[str, float]]
    """Of tokens read `LEAST` times at least, those above 1; of the same lift the more frequent first."""
    by_count: list[dict[str, float]]


def top_tokens(tokens: ExpertCounts, num_experts: int) -> list[Top]:
    """Of each expert, `TOP` at most."""
    value_X, expert_X = tokens.key_X // num_experts, tokens.key_X % num_experts
    row_X, count_R = _total_of(value_X, tokens.count_X)
    count_E = _by_expert(expert_X, tokens.count_X, num_experts)
    of_all_X, of_expert_X = count_R[row_X], count_E[expert_X]
    lift_X = tokens.count_X.double() * count_R.sum() / (of_expert_X.double() * of_all_X)

    def first(order_X: torch.Tensor) -> list[list[dict[str, float]]]:
        order_X = order_X[expert_X[order_X].sort(stable=True).indices]
        num_E = torch.bincount(expert_X[order_X], minlength=num_experts)
        parts = (part[:TOP] for part in torch.split(order_X, num_E.tolist()))
        return [
            [
                {"id": value, "count": count, "lift": lift}
                for value, count, lift in zip(
                    value_X[part].tolist(), tokens.count_X[part].tolist(), lift_X[part].tolist(), strict=True
                )
            ]
            for part in parts
        ]

    by_count_X = tokens.count_X.sort(descending=True, stable=True).indices
    by_lift_X = by_count_X[lift_X[by_count_X].sort(descending=True, stable=True).indices]
    return [*map(Top, first(by_lift_X[(of_all_X[by_lift_X] >= LEAST) & (lift_X[by_lift_X] > 1)]), first(by_count_X))]


class _Binned(NamedTuple):
    pairs: ExpertCounts
    firsts: list[int]
    """The first position of each bin."""
    last: int


def _binned(positions: ExpertCounts, num_experts: int) -> _Binned:
    position_X, expert_X = positions.key_X // num_experts, positions.key_X % num_experts
    last = int(position_X.max()) if len(position_X) else 0
    width = -(-(last + 1) // BINS)
    pairs = sum_counts(position_X // width * num_experts + expert_X, positions.count_X)
    return _Binned(pairs, [*range(0, last + 1, width)], last)


def _rows(pairs: ExpertCounts, num_experts: int) -> dict[int, list[int]]:
    """Each value's counts by expert."""
    row_X, count_R = _total_of(pairs.key_X // num_experts, pairs.count_X)
    table_RE = count_R.new_zeros(len(count_R), num_experts)
    table_RE[row_X, pairs.key_X % num_experts] = pairs.count_X
    return dict(zip(torch.unique(pairs.key_X // num_experts).tolist(), table_RE.tolist(), strict=True))


def _total_of(value_X: torch.Tensor, count_X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each value among those that occur, and how often each of them does in all."""
    values, row_X = torch.unique(value_X, return_inverse=True)
    return row_X, count_X.new_zeros(len(values)).scatter_add_(0, row_X, count_X)


def _by_expert(expert_X: torch.Tensor, count_X: torch.Tensor, num_experts: int) -> torch.Tensor:
    return count_X.new_zeros(num_experts).scatter_add_(0, expert_X, count_X)


def _mutual(pairs: ExpertCounts, num_experts: int) -> float:
    count_R = _total_of(pairs.key_X // num_experts, pairs.count_X)[1]
    count_E = _by_expert(pairs.key_X % num_experts, pairs.count_X, num_experts)
    return _entropy(count_R) + _entropy(count_E) - _entropy(pairs.count_X)


def _entropy(count: torch.Tensor) -> float:
    return float(torch.special.entr(count.double() / count.sum().clamp(min=1)).sum())
