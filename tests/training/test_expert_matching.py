"""Drift: matchings against all permutations, agreement against a loop."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from switchcli.training.expert_matching import agreement, best_matching, greedy_matching, matching_metrics

from switchcli.analysis.routing_counts import ExpertChoices, StackTokens, count_choices
from switchcli.training import expert_matching

TABLES = st.integers(1, 6).flatmap(
    lambda num: st.lists(st.lists(st.integers(0, 9), min_size=num, max_size=num), min_size=num, max_size=num)
)


def gain(table: list[list[int]], match: list[int] | tuple[int, ...]) -> int:
    return sum(table[row][column] for row, column in enumerate(match))


@given(TABLES)
def test_the_best_matching_is_the_best_of_all_permutations(table: list[list[int]]) -> None:
    table_EE = torch.tensor(table).double()
    best, greedy = best_matching(table_EE), greedy_matching(table_EE)
    assert sorted(best) == sorted(greedy) == list(range(len(table)))
    most = max(gain(table, match) for match in permutations(range(len(table))))
    assert gain(table, best) == most
    assert 2 * gain(table, greedy) >= most


def test_a_hundred_experts_in_another_order_are_found_again() -> None:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    noise = torch.randint(40, (100, 100), generator=torch.Generator().manual_seed(1)).double()
    assert best_matching(noise + 50 * torch.eye(100)[order]) == order.tolist()


CHOSEN = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def together(both: list[tuple[int, int]]) -> torch.Tensor:
    table_EE = torch.zeros(4, 4, dtype=torch.float64)
    for one, other in both:
        table_EE[one, other] += 1
    return table_EE


@given(CHOSEN)
def test_agreement_is_that_of_a_loop(both: list[tuple[int, int]]) -> None:
    table_EE = together(both)
    num = len(both)
    found = agreement(table_EE, torch.outer(table_EE.sum(1), table_EE.sum(0)) / num, 2 * num)
    kept = sum(one == other for one, other in both) / num
    chance = sum(one == other for one, _ in both for _, other in both) / num**2
    assert found.changed == pytest.approx(1 - kept)
    if chance < 1:
        assert found.beyond_chance == pytest.approx((kept - chance) / (1 - chance))
    else:
        assert found.beyond_chance is None


def counted(experts: torch.Tensor) -> ExpertChoices:
    chosen_AE = torch.nn.functional.one_hot(experts, 4).bool()
    return ExpertChoices(chosen_AE.float(), chosen_AE, chosen_AE)


@pytest.mark.parametrize("most", [256, 3])
def test_experts_that_only_changed_their_numbers_changed_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_matching, "MAX_EXACT_EXPERTS", most)
    experts = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 3, 1])
    both = [counted(experts), counted(order[experts])]
    places = StackTokens(torch.ones(1, 200).bool(), experts, experts)
    together_EE = both[0].chosen_AE.double().mT @ both[1].chosen_AE.double()
    found = matching_metrics(together_EE, *(count_choices(places, one) for one in both))
    assert found["changed"] == 1.0
    assert found["beyond_chance"] < 0
    assert found["matched"] == {"changed": 0.0, "beyond_chance": 1.0, "experts": order.tolist(), "exact": most == 256}
    assert found["shared_information"]["share"] == pytest.approx(1.0)
    assert found["together"] == (together_EE.tolist() if most == 256 else None)


@given(CHOSEN)
def test_what_is_matched_is_renumbered_and_compared(both: list[tuple[int, int]]) -> None:
    choices = [counted(torch.tensor(experts)) for experts in zip(*both, strict=True)]
    places = StackTokens(torch.ones(1, len(both)).bool(), *[torch.zeros(len(both)).long()] * 2)
    found = matching_metrics(together(both), *(count_choices(places, one) for one in choices))["matched"]
    changed = sum(found["experts"][one] != other for one, other in both) / len(both)
    assert found["changed"] == pytest.approx(changed)
    if found["beyond_chance"] is not None and changed == 0:
        assert found["beyond_chance"] == 1.0


@pytest.mark.parametrize(("k", "most"), [(1, 256), (2, 3)])
def test_routers_that_chose_by_themselves_agree_by_chance_alone(
    k: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_matching, "MAX_EXACT_EXPERTS", most)
    draw, experts, tokens = torch.Generator().manual_seed(0), 8, 500
    found, plain = [], []
    for _ in range(5):
        ones_AE = [
            torch.zeros(tokens, experts).scatter_(1, torch.rand(tokens, experts, generator=draw).topk(k).indices, 1.0)
            for _ in range(2)
        ]
        places = StackTokens(torch.ones(1, tokens).bool(), *[torch.zeros(tokens).long()] * 2)
        counts = [count_choices(places, ExpertChoices(one_AE / k, one_AE.bool(), one_AE.bool())) for one_AE in ones_AE]
        figure = matching_metrics((ones_AE[0].mT @ ones_AE[1]).double(), *counts)
        found.append(figure["matched"]["beyond_chance"])
        plain.append(figure["beyond_chance"])
        assert figure["shared_information"]["share"] == pytest.approx(0.0, abs=0.05)
    assert sum(found) / 5 == pytest.approx(0.0, abs=0.02)
    assert sum(plain) / 5 == pytest.approx(0.0, abs=0.02)


def test_a_token_with_two_experts_that_keeps_one_changed_by_half() -> None:
    chosen = [torch.tensor([[1, 1, 0, 0]] * 4).bool(), torch.tensor([[1, 0, 1, 0]] * 4).bool()]
    together_EE = chosen[0].double().mT @ chosen[1].double()
    assert agreement(together_EE, torch.zeros(4, 4), 16).changed == 0.5
