"""Experts that choose tokens, by hand: by probability, from the real tokens, as many as their share."""

import pytest
import torch
from hand import route
from hypothesis import given
from hypothesis import strategies as st

from switchcli.model.moe.router import ExpertChoiceRouter, Mode

RULE = ExpertChoiceRouter(capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=1, jitter=0.0)


def test_each_expert_takes_the_tokens_most_probable_for_it_the_most_probable_first() -> None:
    # Two slots each. Token 1 is taken by both, token 2 by none.
    found = route(RULE, [[0.1, 0.9], [0.4, 0.6], [0.7, 0.3], [0.9, 0.1]])
    assert found.queues == [[(3, 0.9), (2, 0.7)], [(0, 0.9), (1, 0.6)]]
    found = route(RULE, [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.1, 0.8]])
    assert found.queues == [[(0, 0.5)], [(0, 0.4)], [(2, 0.8)]]
    assert found.report.dropped == 1
    assert found.report.load_E.tolist() == [1, 1, 1]


def test_tokens_that_are_equal_are_taken_once_each_and_padding_never() -> None:
    found = route(RULE.model_copy(update={"capacity_factor": 2.0}), [[0.5, 0.5]] * 4, [True, False, True, True])
    assert [sorted(queue) for queue in found.queues] == 2 * [[(0, 0.5), (2, 0.5), (3, 0.5)]]
    few = route(RULE, [[0.5, 0.5]] * 6, [True, False, True, True, False, True])
    assert all(len(queue) == len(set(queue)) == 2 for queue in few.queues)
    assert all(token in (0, 2, 3, 5) for queue in few.queues for token, _ in queue)


def test_of_tokens_that_are_equal_the_earlier_are_taken_as_before_a_first_attention_where_tokens_repeat() -> None:
    few = RULE.model_copy(update={"capacity_factor": 0.5})
    for left, right in ((0, 0), (40, 0), (0, 40), (7, 3)):
        real = [False] * left + [True] * 12 + [False] * right
        found = route(few, [[0.5, 0.5]] * len(real), real)
        assert [[token - left for token, _ in queue] for queue in found.queues] == [[0, 1, 2], [0, 1, 2]]


def test_a_token_of_no_probability_is_taken_before_padding() -> None:
    found = route(RULE.model_copy(update={"capacity_factor": 2.0}), [[0.0, 1.0]] * 3, [False, True, False])
    assert found.queues == [[(1, 0.0)], [(1, 1.0)]]


@pytest.mark.parametrize("mode", ["training", "paper", "dropless"])
def test_slots_are_a_share_of_the_real_tokens_of_the_group(mode: Mode) -> None:
    """Groups of 8, 5, 3 and 0 tokens of 8 at two experts, factor 1.25: int(5), int(3.125), int(1.875), and none."""
    rule = ExpertChoiceRouter(min_capacity=1)
    real_GN = torch.arange(8) < torch.tensor([8, 5, 3, 0]).unsqueeze(1)
    routing = rule.assign(torch.randn(4, 8, 2), real_GN, mode)
    assert (routing.token_GEC < 8).sum(2).tolist() == [[5, 5], [3, 3], [1, 1], [0, 0]]
    least = rule.model_copy(update={"min_capacity": 4}).assign(torch.randn(4, 8, 2), real_GN, mode)
    assert (least.token_GEC < 8).sum(2).tolist() == [[5, 5], [4, 4], [3, 3], [0, 0]]


def test_evaluation_has_a_factor_of_its_own_under_either_policy() -> None:
    rule = ExpertChoiceRouter(capacity_factor=0.5, eval_capacity_factor=2.0, min_capacity=1)
    table = [[0.5, 0.5]] * 4
    assert [len(route(rule, table, mode=mode).queues[0]) for mode in ("training", "paper", "dropless")] == [1, 4, 4]


def test_loads_are_equal_so_there_is_no_balance_loss() -> None:
    report = route(RULE, [[0.9, 0.1]] * 4).report
    assert report.fraction_GE.tolist() == [[0.5, 0.5]]
    assert RULE.balance_coef == 0.0
    with pytest.raises(ValueError, match="balance_loss_coef"):
        ExpertChoiceRouter(balance_loss_coef=0.01)


@given(real=st.lists(st.booleans(), min_size=1, max_size=12), extra=st.integers(0, 6), seed=st.integers(0, 2**20))
def test_padding_anywhere_changes_nothing(real: list[bool], extra: int, seed: int) -> None:
    """The tokens alone are routed as among padding: the same weights at the same tokens, expert by expert."""
    rule = ExpertChoiceRouter(min_capacity=1)
    real_N = torch.tensor(real + [False] * extra)
    logits_NE = torch.randn(len(real_N), 3, generator=torch.Generator().manual_seed(seed))
    among = rule.assign(logits_NE[None], real_N[None], "training")
    alone = rule.assign(logits_NE[real_N][None], torch.ones(1, int(real_N.sum()), dtype=torch.bool), "training")
    place = real_N.nonzero().flatten().tolist()
    for token_C, weight_C, other_C, others_C in zip(
        among.token_GEC[0], among.weight_GEC[0], alone.token_GEC[0], alone.weight_GEC[0], strict=True
    ):
        taken = token_C < len(real_N)
        assert token_C[taken].tolist() == [place[token] for token in other_C.tolist()]
        assert torch.equal(weight_C[taken], others_C)
