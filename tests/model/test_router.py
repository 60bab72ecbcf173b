"""What all routers that queue share, by hand: order, capacity, padding, noise, and who is first in a queue."""

from typing import get_args

import pytest
import torch
from hand import one_row, route

from switchcli.model.moe.router import (
    ExpertChoiceRouter,
    Mode,
    NoTokenLeftBehindRouter,
    Router,
    RouterSpec,
    SwitchRouter,
    TopKRouter,
)

BARE = SwitchRouter(capacity_factor=1.0, min_capacity=1, jitter=0.0)
EVERY = [
    SwitchRouter(overflow="random", sample_temperature=1.0),
    SwitchRouter(overflow="probability", capacity_factor="dropless"),
    TopKRouter(),
    NoTokenLeftBehindRouter(),
    ExpertChoiceRouter(),
]
MODES: tuple[Mode, ...] = ("training", "paper", "dropless")
NAMED = get_args(get_args(RouterSpec)[0])
"""The class of each router that a recipe can name."""
IN_EVERY_MODE = [(rule, mode) for rule in EVERY for mode in MODES]


def test_earlier_tokens_take_the_slots_and_the_gate_is_the_raw_probability() -> None:
    # Tokens 0, 2, 3 choose expert 1, token 1 expert 0. Capacity int(4 * 1.0 / 2) = 2: token 3 is dropped.
    found = route(BARE, [[0.3, 0.7], [0.9, 0.1], [0.4, 0.6], [0.1, 0.9]])
    assert found.queues == [[(1, 0.9)], [(0, 0.7), (2, 0.6)]]
    assert found.report.load_E.tolist() == [1, 3]
    assert found.report.dropped == 1


def test_groups_do_not_share_slots() -> None:
    logits_GNE = torch.tensor([[1.0, 0.0]]).expand(3, 4, 2)
    routing = BARE.assign(logits_GNE, torch.ones(3, 4, dtype=torch.bool), "training")
    assert routing.token_GEC.tolist() == 3 * [[[0, 1], [4, 4]]]
    assert routing.stats.dropped == 6


@pytest.mark.parametrize(("real", "first"), [([False, False, True, True], 2), ([True, True, False, False], 0)])
def test_padding_takes_no_slot_on_either_side(real: list[bool], first: int) -> None:
    found = route(BARE, [[0.2, 0.8]] * 4, real)
    assert found.queues == [[], [(first, 0.8), (first + 1, 0.8)]]
    assert (found.report.tokens, found.report.dropped) == (2, 0)
    assert found.report.fraction_GE.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("mode", ["paper", "dropless"])
def test_what_stands_at_padding_moves_no_token(named: type[Router], mode: Mode) -> None:
    logits_GNE, real_GN = torch.randn(3, 24, 4), torch.rand(3, 24) < 0.7
    found, other = (
        named().assign(logits_GNE.where(real_GN.unsqueeze(-1), padding), real_GN, mode)
        for padding in (torch.randn(3, 24, 4), 9 * torch.randn(3, 24, 4))
    )
    assert found.token_GEC.equal(other.token_GEC)
    assert found.weight_GEC.equal(other.weight_GEC)


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("mode", ["training", "paper", "dropless"])
def test_a_group_of_padding_gives_zeros_and_no_nan(rule: Router, mode: Mode) -> None:
    found = route(rule, [[0.2, 0.3, 0.4, 0.1]] * 5, [False] * 5, mode)
    assert found.queues == [[]] * 4
    for name, field in found.report._asdict().items():
        assert (field == 0).all(), name
    assert found.report.load_balancing_loss == 0


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "least", "capacity"),
    [
        (512, 8, 1.25, 4, 80),
        (512, 128, 1.0, 4, 4),
        (100, 8, 1.25, 4, 15),  # 15.6 rounded down
        (3, 8, 1.25, 4, 3),
        (1, 2, 0.1, 1, 1),
        (10, 4, 8.0, 4, 10),
        (10, 4, "dropless", 4, 10),
    ],
)
def test_capacity_is_equation_3(tokens: int, experts: int, factor: float | str, least: int, capacity: int) -> None:
    training = SwitchRouter(capacity_factor=factor, min_capacity=least, eval_capacity_factor=0.01)
    evaluation = SwitchRouter(eval_capacity_factor=factor, min_capacity=least, capacity_factor=0.01)
    assert training.capacity(tokens, experts, "training") == capacity
    assert evaluation.capacity(tokens, experts, "paper") == capacity
    assert training.capacity(tokens, experts, "dropless") == tokens


@pytest.mark.parametrize(
    "rule", [BARE, TopKRouter(min_capacity=1), NoTokenLeftBehindRouter(min_capacity=1, k=2)], ids=lambda r: r.kind
)
def test_nothing_is_dropped_without_a_capacity(rule: Router) -> None:
    table = [[0.7, 0.2, 0.1]] * 9  # all to the first expert
    assert route(rule, table, mode="training").report.dropped > 0
    free = rule.model_copy(update={"capacity_factor": "dropless"})
    for found in (route(rule, table, mode="dropless"), route(free, table, mode="training")):
        assert found.report.dropped == 0
        assert found.num_slots == 9
        assert [token for token, _ in found.queues[0]] == list(range(9))


def test_the_most_probable_token_is_first_where_overflow_goes_by_probability() -> None:
    rule = BARE.model_copy(update={"overflow": "probability"})
    table = [[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]
    for mode in ("training", "paper"):
        found = route(rule.model_copy(update={"eval_capacity_factor": 1.0}), table, mode=mode)
        assert found.queues == [[(1, 0.9), (3, 0.7)], [(2, 0.8)]]
    equal = route(rule, [[0.8, 0.2]] * 1000)
    assert equal.queues[0] == [(token, 0.8) for token in range(500)]  # by position where probabilities are equal
    padded = route(rule, table, [True, False, True, True])
    assert padded.queues[0] == [(3, 0.7), (0, 0.6)]


def test_each_token_is_as_likely_to_stay_where_overflow_is_random_in_training() -> None:
    """8 tokens for 2 slots, 4,000 times: 1,000 each, known to 27.4; five times that is allowed."""
    rule = SwitchRouter(capacity_factor=0.5, min_capacity=1, overflow="random")
    routing = one_row(rule, [0.9, 0.1], num_tokens=8, num_groups=4000)
    assert routing.token_GEC[:, 1].eq(8).all()
    times_N = routing.token_GEC[:, 0].flatten().bincount(minlength=8)
    assert times_N.sum() == 8000
    assert (times_N - 1000).abs().max() < 137
    first_N = routing.token_GEC[:, 0, 0].bincount(minlength=8)  # and to be the first of them
    assert (first_N - 500).abs().max() < 105


def test_random_overflow_goes_by_position_in_evaluation_and_drops_no_padding_into_a_slot() -> None:
    rule = SwitchRouter(capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=1, overflow="random")
    assert route(rule, [[0.9, 0.1]] * 4, mode="paper").queues == [[(0, 0.9), (1, 0.9)], []]
    for _ in range(20):
        found = route(rule, [[0.9, 0.1]] * 6, [True, False, True, False, False, True])
        assert {token for token, _ in found.queues[0]} == {0, 2, 5}
        assert found.queues[1] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_choices_are_sampled_from_the_softmax_of_tempered_logits(temperature: float, dtype: torch.dtype) -> None:
    """40,000 tokens: a share is known to sqrt(p (1 - p) / 40,000), and five times that is allowed."""
    rule = SwitchRouter(sample_temperature=temperature, capacity_factor="dropless")
    logits_E = torch.tensor([39.0, 40.0, 40.0, 38.0]).to(dtype)  # bfloat16 knows quarters there
    torch.manual_seed(0)
    routing = rule.assign(logits_E.expand(10, 4000, 4), torch.ones(10, 4000, dtype=torch.bool), "training")
    expected_E = (logits_E.float() / temperature).softmax(-1)
    error_E = (routing.stats.load_E / 40_000 - expected_E) / (expected_E * (1 - expected_E) / 40_000).sqrt()
    assert error_E.abs().max() < 5
    # The gate is the probability without temperature.
    gate_E = logits_E.softmax(-1).float()
    for expert in range(4):
        assert set(routing.weight_GEC[:, expert].float().flatten().tolist()) == {0.0, gate_E[expert].item()}


def test_sampling_draws_distinct_experts_and_only_in_training() -> None:
    rule = TopKRouter(sample_temperature=1.0, keep_threshold=0.0, capacity_factor="dropless")
    routing = one_row(rule, [0.5, 0.3, 0.2], num_tokens=500, num_groups=1)
    assert routing.stats.load_E.sum() == 1000
    for token_C in routing.token_GEC[0].tolist():
        tokens = [token for token in token_C if token < 500]
        assert len(tokens) == len(set(tokens))
    assert 0 < routing.stats.load_E[2] < 1000
    for mode in ("paper", "dropless"):
        assert route(rule, [[0.5, 0.3, 0.2]] * 50, mode=mode).report.load_E.tolist() == [50, 50, 0]


def test_without_noise_training_is_the_argmax() -> None:
    logits_GNE = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    routing = SwitchRouter(jitter=0.0, capacity_factor="dropless").assign(
        logits_GNE, torch.ones(3, 50, dtype=torch.bool), "training"
    )
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn
    for group, expert, slot in (routing.token_GEC < 50).nonzero().tolist():
        token = routing.token_GEC[group, expert, slot]
        assert logits_GNE[group, token].argmax() == expert
    assert (routing.token_GEC < 50).sum() == 150


@pytest.mark.parametrize(("rule", "mode"), IN_EVERY_MODE, ids=lambda value: getattr(value, "kind", value))
def test_gradients_flow_through_weights_probabilities_and_z_alone(rule: Router, mode: Mode) -> None:
    logits_GNE = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = rule.assign(logits_GNE, torch.ones(2, 9, dtype=torch.bool), mode)
    carrying = {name for name, field in routing.stats._asdict().items() if field.requires_grad}
    assert carrying == {"probability_GE", "z_sum"}
    assert routing.weight_GEC.requires_grad
    assert routing.weight_GEC.dtype == torch.float32
