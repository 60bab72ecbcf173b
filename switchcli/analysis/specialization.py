"""Specialization: which tokens an expert gets more often than others, and what a token says about its expert.

Computed from the counts of routing_counts.py. Legend: E experts, X distinct (token id, expert) pairs, R distinct token
ids in ascending order.
"""

import operator
from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch

from switchcli.analysis.routing_counts import ExpertCounts, LayerCounts
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.metric_names import DROPPED_FRACTION
from switchcli.model.moe.evenness import load_spread

TOP_TOKENS = 10
"""Tokens listed for each expert, at most."""
MIN_COUNT = 10
"""Least count of a token in the list by lift: the lift of a rarer token is mostly chance."""


def mutual_information(pairs: ExpertCounts) -> float:
    """Return the mutual information of value and expert in nats for one choice. `pairs` are on the CPU.

    Chance alone makes it positive, the more so the rarer the values.
    """
    # I(value; expert) = H(value) + H(expert) - H(value, expert).
    return _entropy(pairs.by_value().count_R) + _entropy(pairs.by_expert()) - _entropy(pairs.count_X)


def specialization_metrics(texts: Mapping[str, LayerCounts], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the JSON object of one layer, over its counts by text."""
    counts_by_text = {name: counts.cpu() for name, counts in texts.items()}
    counts = reduce(operator.add, counts_by_text.values())
    num_tokens = int(counts.num_tokens)
    sentinel_ids = tokenizer.sentinels.tolist()
    named_sentinels = zip(tokenizer.pieces(sentinel_ids), sentinel_ids, strict=True)
    return {
        "tokens": num_tokens,
        DROPPED_FRACTION: int(counts.dropped) / max(1, num_tokens),
        "confidence": float(counts.confidence) / max(1, num_tokens),
        "entropy": float(counts.entropy) / max(1, num_tokens),
        "load": counts.chosen_E.tolist(),
        **{name: float(value_L[0]) for name, value_L in load_spread(counts.chosen_E.unsqueeze(0)).items()},
        "experts": _expert_metrics(counts, tokenizer),
        "sentinels": {
            piece: load for piece, index in named_sentinels if any(load := _load_of_token(counts.tokens, index))
        },
        "texts": {name: text.chosen_E.tolist() for name, text in counts_by_text.items()},
    }


def _expert_metrics(counts: LayerCounts, tokenizer: Tokenizer) -> list[dict[str, Any]]:
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
            **{order: _with_pieces(tokens, tokenizer) for order, tokens in top._asdict().items()},
        }
        for chosen, turned_away, probability, top in columns
    ]


def _with_pieces(tokens: list[dict[str, float]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    pieces = tokenizer.pieces(int(token["id"]) for token in tokens)
    return [{"piece": piece, **token} for piece, token in zip(pieces, tokens, strict=True)]


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


def _load_of_token(tokens: ExpertCounts, token_id: int) -> list[int]:
    """Return how often each expert got the token."""
    is_token_X = tokens.value_X == token_id
    return tokens._replace(key_X=tokens.key_X[is_token_X], count_X=tokens.count_X[is_token_X]).by_expert().tolist()


def _entropy(count: torch.Tensor) -> float:
    """Return the entropy of the distribution given by counts, in nats; 0 without counts."""
    return float(torch.special.entr(count.double() / count.sum().clamp(min=1)).sum())
