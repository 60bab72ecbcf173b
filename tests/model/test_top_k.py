"""Top-k by hand: first choices before any second, each dropped by itself, second ones kept at random."""

import pytest
import torch
from hand import one_row, route
from pydantic import ValidationError

from switchcli.model.moe.router import Mode, TopKRouter

KEEP = TopKRouter(capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=1, jitter=0.0, keep_threshold=0.0)


def test_second_choices_queue_behind_all_first_ones_of_the_same_expert() -> None:
    # First choices: 0 -> a, 1 -> b, 2 -> b, 3 -> a. Second: 0 -> b, 1 -> a, 2 -> c, 3 -> c.
    table = [[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.0, 0.75, 0.25], [0.75, 0.05, 0.2]]
    found = route(KEEP.model_copy(update={"capacity_factor": 3.0}), table)
    assert found.queues == [
        [(0, 0.667), (3, 0.789), (1, 0.333)],
        [(1, 0.667), (2, 0.75), (0, 0.333)],
        [(2, 0.25), (3, 0.211)],
    ]
    assert found.report.load_E.tolist() == [3, 3, 2]


@pytest.mark.parametrize("mode", ["training", "paper"])
def test_each_choice_is_dropped_by_itself_and_gates_are_not_renormalized_after_drops(mode: Mode) -> None:
    # Capacity int(4 * 1.0 / 2) = 2, and all choose expert 0 first: 2 and 3 lose it, and so keep their second alone.
    found = route(KEEP, [[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]], mode=mode)
    assert found.queues == [[(0, 0.6), (1, 0.7)], [(0, 0.4), (1, 0.3)]]
    assert found.report.dropped == 2
    # A second choice in the first's full queue is lost, and the first one keeps its weight of 0.6.
    found = route(KEEP, [[0.4, 0.6], [0.7, 0.3], [0.8, 0.2], [0.4, 0.6]], mode=mode)
    assert found.queues == [[(1, 0.7), (2, 0.8)], [(0, 0.6), (3, 0.6)]]
    assert found.report.dropped == 0


def test_a_token_whose_first_choice_is_dropped_may_keep_its_second() -> None:
    found = route(KEEP, [[0.6, 0.1, 0.3], [0.6, 0.3, 0.1], [0.6, 0.15, 0.25]])  # one slot each
    assert found.queues == [[(0, 0.667)], [(1, 0.333)], [(0, 0.333)]]
    assert found.report.dropped == 1


def test_gates_may_stay_raw() -> None:
    raw = KEEP.model_copy(update={"renormalize": False, "capacity_factor": 2.0})
    assert route(raw, [[0.6, 0.1, 0.3]]).queues == [[(0, 0.6)], [], [(0, 0.3)]]


def test_f_counts_the_first_of_two_choices_and_all_of_three() -> None:
    table = [[0.6, 0.3, 0.1, 0.0]] * 3 + [[0.1, 0.3, 0.6, 0.0]]
    report = route(KEEP, table).report
    assert report.fraction_GE.tolist() == [[0.75, 0.0, 0.25, 0.0]]
    assert report.load_E.tolist() == [3, 4, 1, 0]
    three = route(KEEP.model_copy(update={"k": 3}), table).report
    assert three.fraction_GE.tolist() == [[pytest.approx(1 / 3)] * 3 + [0.0]]


def test_three_choices_queue_in_three_rounds() -> None:
    three = TopKRouter(k=3, capacity_factor=9.0, keep_threshold=0.0, jitter=0.0)
    found = route(three, [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])
    assert found.queues == [[(0, 0.5), (1, 0.2)], [(1, 0.5), (0, 0.3)], [(1, 0.3), (0, 0.2)]]


@pytest.mark.parametrize(("second", "kept"), [(0.02, 0.1), (0.1, 0.5), (0.18, 0.9)])
def test_a_second_choice_is_kept_in_proportion_to_its_gate(second: float, kept: float) -> None:
    """200 other experts hold half of the mass: what counts are the gates of two after they are divided by their sum.

    20,000 draws: a share of p is known to sqrt(p (1 - p) / 20,000), and five times that is allowed.
    """
    probability_E = [second / 2, (1 - second) / 2, *[0.0025] * 200]
    routing = one_row(TopKRouter(capacity_factor="dropless"), probability_E, num_tokens=2000, num_groups=10)
    load = routing.stats.load_E.tolist()
    assert (load[1], sum(load[2:])) == (20_000, 0)
    assert load[0] / 20_000 == pytest.approx(kept, abs=5 * (kept * (1 - kept) / 20_000) ** 0.5)
    weights = routing.weight_GEC[:, 0][routing.token_GEC[:, 0] < 2000]
    assert weights.unique().tolist() == pytest.approx([second])  # what is kept is not scaled up


def test_the_draws_of_different_tokens_are_independent() -> None:
    """Pairs of neighbours: both kept in a quarter of 10,000 pairs, known to 0.0043."""
    routing = one_row(TopKRouter(capacity_factor="dropless"), [0.1, 0.9], num_tokens=2, num_groups=10_000)
    assert (routing.token_GEC[:, 0] < 2).all(1).float().mean().item() == pytest.approx(0.25, abs=0.022)


@pytest.mark.parametrize(
    ("second", "threshold", "kept"), [(1e-30, 0.2, 0), (0.2001, 0.2, 2000), (0.45, 0.2, 2000), (1e-30, 0.0, 2000)]
)
def test_a_second_choice_is_never_or_always_kept_at_the_ends(second: float, threshold: float, kept: int) -> None:
    rule = TopKRouter(capacity_factor="dropless", keep_threshold=threshold)
    assert one_row(rule, [second, 1 - second], num_tokens=2000, num_groups=1).stats.load_E.tolist() == [kept, 2000]


@pytest.mark.parametrize("mode", ["paper", "dropless"])
def test_every_second_choice_is_kept_in_evaluation(mode: Mode) -> None:
    assert route(TopKRouter(), [[0.001, 0.999]] * 50, mode=mode).report.load_E.tolist() == [50, 50]


def test_what_is_not_kept_takes_no_slot() -> None:
    """Expert 1 is the first choice of nobody; of the second choices every other is about never kept."""
    rule = TopKRouter(capacity_factor=0.5, min_capacity=1)
    torch.manual_seed(0)
    found = route(rule, [[1 - 1e-20, 1e-20], [0.7, 0.3]] * 4)  # two slots
    assert found.queues[1] == [(1, 0.3), (3, 0.3)]
    assert found.report.load_E.tolist() == [8, 4]


def test_probability_overflow_goes_by_the_first_probability_before_gates_are_divided() -> None:
    """Token 0 has gates 0.83 and 0.17 of p 0.5 and 0.1; token 1 has p 0.6 and 0.4, and is first."""
    table = [[0.5, 0.1] + 8 * [0.05], [0.6, 0.4] + 8 * [0.0]]
    rule = KEEP.model_copy(update={"overflow": "probability"})
    assert route(rule, table).queues[:2] == [[(1, 0.6)], [(1, 0.4)]]


def test_one_choice_that_is_renormalized_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValidationError, match=r"\bk: 1\b.*renormalize: true.*kind: switch.*\bk: 2\b"):
        TopKRouter(k=1)
    found = route(TopKRouter(k=1, renormalize=False), [[0.3, 0.7]])
    assert found.queues == [[], [(0, 0.7)]]


@pytest.mark.parametrize("renormalize", [True, False])
def test_biased_sigmoid_gates_are_those_of_deepseek_v3_in_transformers(renormalize: bool) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        **{"hidden_size": 6, "n_routed_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": renormalize},
        **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    )
    theirs, generator = DeepseekV3TopkRouter(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        theirs.weight.normal_(generator=generator)
        theirs.e_score_correction_bias.uniform_(-0.5, 0.5, generator=generator)
        logits_NE, weight_NK, expert_NK = theirs(torch.randn(20, 6, generator=generator))
    router = TopKRouter(k=3, renormalize=renormalize, gate="sigmoid", balance="bias")
    real_1N = torch.ones(1, 20, dtype=torch.bool)
    routing = router.assign(logits_NE[None], real_1N, "dropless", theirs.e_score_correction_bias)
    expected_EN = torch.zeros(20, 8).scatter(1, expert_NK, weight_NK).mT
    found_EN = torch.zeros(8, 21).scatter_add(1, routing.token_GEC[0], routing.weight_GEC[0])[:, :20]
    torch.testing.assert_close(found_EN, expected_EN)
