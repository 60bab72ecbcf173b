"""No-token-left-behind by hand: rounds in which only what overflowed tries again."""

import pytest
import torch
from hand import route
from hypothesis import given
from hypothesis import strategies as st

from switchcli.model.moe.router import NoTokenLeftBehindRouter, SwitchRouter

RULE = NoTokenLeftBehindRouter(capacity_factor=1.0, min_capacity=1, jitter=0.0)


def test_only_tokens_without_a_slot_try_their_next_choice() -> None:
    # Two slots each. All but the last choose expert 0: tokens 2 and 3 overflow. Their second choices are 1 and 2.
    found = route(
        RULE,
        [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.5, 0.1, 0.4], [0.4, 0.35, 0.25], [0.1, 0.7, 0.2]],
    )
    # Token 5 was accepted by expert 1 in round 1, token 2 stands behind it, and then there is no room for token 4:
    # in round 3 it finds the last slot of expert 2. Weights are the raw probabilities of the choice.
    assert found.queues == [[(0, 0.7), (1, 0.6)], [(5, 0.7), (2, 0.4)], [(3, 0.4), (4, 0.25)]]
    assert found.report.dropped == 0
    assert found.report.load_E.tolist() == [5, 3, 2]  # who asked, round by round


def test_a_round_queues_behind_those_accepted_not_behind_those_who_asked() -> None:
    # Four tokens ask expert 0, which has two slots; expert 1 accepted one. In round 2 one more of three fits there.
    found = route(RULE.model_copy(update={"k": 2}), [[0.6, 0.4]] * 3 + [[0.4, 0.6]])
    assert found.queues == [[(0, 0.6), (1, 0.6)], [(3, 0.6), (2, 0.4)]]


def test_rounds_end_after_k() -> None:
    table = [[0.5, 0.3, 0.2]] * 3  # one slot each
    assert route(RULE, table).report.dropped == 0
    assert route(RULE.model_copy(update={"k": 2}), table).queues == [[(0, 0.5)], [(1, 0.3)], []]
    assert route(RULE.model_copy(update={"k": 2}), table).report.dropped == 1


def test_more_rounds_than_experts_are_as_many_as_there_are_experts() -> None:
    assert route(RULE.model_copy(update={"k": 9}), [[0.6, 0.4]] * 2).queues == [[(0, 0.6)], [(1, 0.4)]]


def test_f_is_the_mean_over_the_k_choices_whether_they_were_tried_or_not() -> None:
    two = RULE.model_copy(update={"k": 2, "capacity_factor": 9.0})
    report = route(two, [[0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.1, 0.6, 0.3], [0.6, 0.3, 0.1]]).report
    assert report.load_E.tolist() == [3, 1, 0]
    assert report.fraction_GE.tolist() == [[3 / 8, 3 / 8, 2 / 8]]


def test_with_every_expert_among_the_choices_the_balance_loss_is_one_and_pulls_nowhere() -> None:
    """f is then 1 / E whatever the router does, and sum(P) is 1: Mesh-TensorFlow's loss needs more than k experts."""
    logits_GNE = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    balance = RULE.assign(logits_GNE, torch.ones(1, 20, dtype=torch.bool), "training").stats.load_balancing_loss
    assert balance.item() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(balance, logits_GNE)
    assert gradient.abs().max() < 1e-7


@given(num_experts=st.integers(2, 6), tokens=st.integers(1, 20), seed=st.integers(0, 2**20))
def test_all_are_placed_where_there_are_slots_and_rounds_enough_and_none_twice(
    num_experts: int, tokens: int, seed: int
) -> None:
    logits_GNE = torch.randn(1, tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    real_GN = torch.ones(1, tokens, dtype=torch.bool)
    factor = (-(-tokens // num_experts)) * num_experts / tokens + 1e-9  # slots for all, to the next whole one
    settings = {"capacity_factor": factor, "min_capacity": 1, "jitter": 0.0}
    routing = NoTokenLeftBehindRouter(**settings, k=num_experts).assign(logits_GNE, real_GN, "training")
    placed = routing.token_GEC[routing.token_GEC < tokens].tolist()
    assert sorted(placed) == list(range(tokens))
    assert routing.stats.dropped == 0
    # The first round is Switch routing: whom it places sits where Switch puts it.
    switch = SwitchRouter(**settings).assign(logits_GNE, real_GN, "training")
    first = switch.token_GEC < tokens
    assert torch.equal(routing.token_GEC[first], switch.token_GEC[first])
    assert torch.equal(routing.weight_GEC[first], switch.weight_GEC[first])
