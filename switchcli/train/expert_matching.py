"""How far two routers agree on the same tokens: as they number their experts, and after the best matching of them.

Legend: E experts, of one model in rows and of the other in columns.
"""

from typing import Any, NamedTuple

import torch

from switchcli.train.atlas import ExpertCounts, LayerCounts
from switchcli.train.specialization import information, information_by_chance, within

MOST = 256
"""Experts that are matched exactly, in E**3 steps; more are matched greedily, and no table of pairs is told."""


class Agreement(NamedTuple):
    """Of one numbering of the experts."""

    changed: float
    """The share of choices that are not the other's. Of a token with several experts, those that only one names count
    as so much of a change."""
    beyond_chance: float | None
    """Cohen's kappa: 0 if both chose by their own shares alone, 1 if they never differ."""


def agreement(together_EE: torch.Tensor, chance_EE: torch.Tensor, choices: int) -> Agreement:
    """Of how often their choices fell together, of how often they would by chance, and of the choices of both."""
    kept, chance = (2 * float(table_EE.trace()) / choices for table_EE in (together_EE, chance_EE))
    return Agreement(1 - kept, (kept - chance) / (1 - chance) if chance < 1 - 1e-9 else None)


def matching_metrics(together_EE: torch.Tensor, one: LayerCounts, other: LayerCounts) -> dict[str, Any]:
    """All of a layer as JSON has it.

    The best of many matchings finds some agreement in any two routers: by chance is what it finds in choices that were
    dealt out anew. `told_by_the_other` needs no matching: what an expert in the one model says of the expert in the
    other. Where a token has several, one of them seldom says all of the other's, even if both models are the same.
    """
    together_EE, one_E, other_E = together_EE.cpu(), one.chosen_E.cpu(), other.chosen_E.cpu()
    num_tokens, num_experts, choices = int(one.num_tokens), len(one_E), int(one_E.sum())
    exact = num_experts <= MOST
    matching = best_matching if exact else greedy_matching
    match = matching(together_EE)
    key_X = together_EE.flatten().nonzero().flatten()
    pairs = ExpertCounts(key_X, together_EE.flatten()[key_X].long())
    by_chance = information_by_chance(pairs, num_experts, choices)
    dealt_EE = torch.zeros_like(together_EE)
    dealt_EE.view(-1)[by_chance.key_X] = by_chance.count_X.to(dealt_EE.dtype)
    of_both = choices + int(other_E.sum())
    matched = agreement(together_EE[:, match], dealt_EE[:, matching(dealt_EE)], of_both)
    return {
        "tokens": num_tokens,
        **agreement(together_EE, torch.outer(one_E.double(), other_E.double()) / num_tokens, of_both)._asdict(),
        "matched": {**matched._asdict(), "experts": match, "exact": exact},
        "told_by_the_other": information(pairs, num_experts, choices, within(other)).to_json(),
        "together": together_EE.long().tolist() if exact else None,
    }


def greedy_matching(gain_EE: torch.Tensor) -> list[int]:
    """A column for each row: the largest entry first, then the largest in rows and columns that are free."""
    num = len(gain_EE)
    match = [-1] * num
    taken: set[int] = set()
    for place in gain_EE.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, num)
        if match[row] < 0 and column not in taken:
            match[row] = column
            taken.add(column)
    return match


def best_matching(gain_EE: torch.Tensor) -> list[int]:
    """A column for each row, so that the sum of the gains is the largest there is.

    By shortest augmenting paths (Kuhn 1955, Munkres 1957; with potentials): row after row gets a column, and whoever
    is pushed out of it another, along the path that costs least. Whole numbers, so that float64 makes no error.
    """
    num = len(gain_EE)
    cost_EE = gain_EE.max() - gain_EE.double()
    row_price, column_price = torch.zeros(num, dtype=torch.float64), torch.zeros(num, dtype=torch.float64)
    row_of = torch.full((num,), -1)
    for new in range(num):
        least, before = torch.full((num,), torch.inf, dtype=torch.float64), torch.full((num,), -1)
        seen = torch.zeros(num, dtype=torch.bool)
        column, row, length = -1, new, 0.0
        while row >= 0:
            reached = length + cost_EE[row] - row_price[row] - column_price
            nearer = ~seen & (reached < least)
            least, before = reached.where(nearer, least), before.masked_fill(nearer, column)
            column = int(least.masked_fill(seen, torch.inf).argmin())
            length, row = float(least[column]), int(row_of[column])
            seen[column] = True
        shift = (length - least).where(seen, 0.0)
        column_price -= shift
        owned = seen & (row_of >= 0)
        row_price[row_of[owned]] += shift[owned]
        row_price[new] += length
        while column >= 0:
            previous = int(before[column])
            row_of[column] = row_of[previous] if previous >= 0 else new
            column = previous
    return row_of.argsort().tolist()
