"""Expert matching: how far two routers agree on the same tokens, expert by expert and after renumbering the experts.

Legend: E experts; in [E, E] tables rows are experts of the first model and columns experts of the second.
"""

from typing import Any, NamedTuple

import torch

from switchcli.training.routing_counts import ExpertCounts, LayerCounts
from switchcli.training.specialization import information, information_by_chance, within

MAX_EXACT_EXPERTS = 256
"""Experts that are matched exactly, which takes E**3 steps. More are matched greedily, and their table of pairs is left
out of the result."""


class Agreement(NamedTuple):
    """How far the choices of two routers agree under one numbering of the experts. Written to JSON."""

    changed: float
    """The fraction of choices that differ. A token with several experts counts by the fraction of its experts that only
    one of the routers chose."""
    beyond_chance: float | None
    """Cohen's kappa: 0 if the routers agree as often as independent ones with the same loads, 1 if they fully agree."""


def agreement(joint_EE: torch.Tensor, chance_EE: torch.Tensor, choices: int) -> Agreement:
    """Return the agreement on the diagonal of `joint_EE`, compared with that of `chance_EE`.

    Args:
        joint_EE: how often a token chose expert i of the first model and expert j of the second.
        chance_EE: the same for independent routers.
        choices: the number of choices of both models together, so that full agreement is 2 * trace / choices = 1.
    """
    agreed, by_chance = (2 * float(table_EE.trace()) / choices for table_EE in (joint_EE, chance_EE))
    return Agreement(1 - agreed, (agreed - by_chance) / (1 - by_chance) if by_chance < 1 - 1e-9 else None)


def matching_metrics(joint_EE: torch.Tensor, one: LayerCounts, other: LayerCounts) -> dict[str, Any]:
    """Return the JSON object of one layer of two models.

    The best of many matchings finds some agreement between any two routers. For `matched`, agreement by chance is
    therefore what the same matching finds after the choices are assigned at random. `told_by_the_other` is the
    information that an expert of the first model gives about the expert of the second; it needs no matching. Where
    tokens have several experts, it stays below 1 even for two identical models.
    """
    joint_EE, one_E, other_E = joint_EE.cpu(), one.chosen_E.cpu(), other.chosen_E.cpu()
    num_tokens, num_experts, choices = int(one.num_tokens), len(one_E), int(one_E.sum())
    exact = num_experts <= MAX_EXACT_EXPERTS
    matching = best_matching if exact else greedy_matching
    match = matching(joint_EE)
    # The flat index of entry (i, j) is i * E + j: the key of a pair whose value is expert i of the first model.
    key_X = joint_EE.flatten().nonzero().flatten()
    pairs = ExpertCounts(key_X, joint_EE.flatten()[key_X].long())
    random_pairs = information_by_chance(pairs, num_experts, choices)
    random_EE = torch.zeros_like(joint_EE)
    random_EE.view(-1)[random_pairs.key_X] = random_pairs.count_X.to(random_EE.dtype)
    # Row i of both tables gets column match[i], so matched experts lie on the diagonal.
    choices_of_both = choices + int(other_E.sum())
    matched = agreement(joint_EE[:, match], random_EE[:, matching(random_EE)], choices_of_both)
    independent_EE = torch.outer(one_E.double(), other_E.double()) / num_tokens
    return {
        "tokens": num_tokens,
        **agreement(joint_EE, independent_EE, choices_of_both)._asdict(),
        "matched": {**matched._asdict(), "experts": match, "exact": exact},
        "told_by_the_other": information(pairs, num_experts, choices, within(other)).to_json(),
        "together": joint_EE.long().tolist() if exact else None,
    }


def greedy_matching(gain_EE: torch.Tensor) -> list[int]:
    """Return a column for each row: repeatedly the largest entry whose row and column are both free."""
    num = len(gain_EE)
    match = [-1] * num
    matched_columns: set[int] = set()
    for index in gain_EE.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(index, num)
        if match[row] < 0 and column not in matched_columns:
            match[row] = column
            matched_columns.add(column)
    return match


def best_matching(gain_EE: torch.Tensor) -> list[int]:
    """Return a column for each row, so that the sum of the matched gains is the largest possible.

    Shortest augmenting paths with potentials, O(E**3) (Kuhn 1955; Munkres 1957). Rows are matched one after another. A
    row may take the column of an earlier row, which then moves to another column, along the cheapest such path. Gains
    are whole numbers, so float64 is exact.
    """
    num = len(gain_EE)
    cost_EE = gain_EE.max() - gain_EE.double()
    # Potentials: cost - row_price - column_price is never negative, and 0 for matched pairs.
    row_price, column_price = torch.zeros(num, dtype=torch.float64), torch.zeros(num, dtype=torch.float64)
    row_of = torch.full((num,), -1)  # the row matched to each column, -1 if free
    for new_row in range(num):
        # Dijkstra from new_row: distance[c] is the length of the shortest known path to column c, and before[c] the
        # column that precedes c on it, -1 for new_row itself.
        distance, before = torch.full((num,), torch.inf, dtype=torch.float64), torch.full((num,), -1)
        is_final = torch.zeros(num, dtype=torch.bool)
        column, row, length = -1, new_row, 0.0
        while row >= 0:  # until the nearest column is free
            through_row = length + cost_EE[row] - row_price[row] - column_price
            is_shorter = ~is_final & (through_row < distance)
            distance, before = through_row.where(is_shorter, distance), before.masked_fill(is_shorter, column)
            column = int(distance.masked_fill(is_final, torch.inf).argmin())
            length, row = float(distance[column]), int(row_of[column])
            is_final[column] = True
        # Lower the prices of the columns that were reached, and raise those of their rows, by what each is nearer than
        # the end of the path. Reduced costs stay nonnegative, and become 0 along the path.
        shift = (length - distance).where(is_final, 0.0)
        column_price -= shift
        is_matched = is_final & (row_of >= 0)
        row_price[row_of[is_matched]] += shift[is_matched]
        row_price[new_row] += length
        # Walk the path back from the free column: each column takes the row of the column before it.
        while column >= 0:
            previous = int(before[column])
            row_of[column] = row_of[previous] if previous >= 0 else new_row
            column = previous
    return row_of.argsort().tolist()  # the inverse permutation: the column of each row
