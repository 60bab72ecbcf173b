"""Specialization: against loops, and where the answer is known."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_routing_counts import looked_at

from switchcli.analysis.routing_counts import (
    ExpertChoices,
    ExpertCounts,
    LayerCounts,
    StackTokens,
    count_choices,
    sum_counts,
)
from switchcli.analysis.specialization import (
    MIN_COUNT,
    TOP_TOKENS,
    information,
    information_by_chance,
    specialization_metrics,
    top_tokens,
)
from switchcli.data.python_kinds import KINDS

CHOICES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=20)


def pairs_of(choices: list[tuple[int, int]], num_experts: int) -> ExpertCounts:
    values, experts = torch.tensor(choices).T
    return sum_counts(values, experts, torch.ones_like(values), num_experts)


@given(CHOICES)
def test_mutual_information_is_that_of_a_loop(drawn: list[tuple[int, int, int]]) -> None:
    choices = [(value, expert) for value, expert, times in drawn for _ in range(times)]
    joint, values, experts = Counter(choices), Counter(v for v, _ in choices), Counter(e for _, e in choices)
    num = len(choices)
    nats = sum(c / num * math.log(c * num / (values[v] * experts[e])) for (v, e), c in joint.items())
    entropy = -sum(c / num * math.log(c / num) for c in experts.values())
    found = information(pairs_of(choices, 4), num, 0.0)
    assert found.nats == pytest.approx(nats, abs=1e-9)
    assert found.experts == pytest.approx(entropy, abs=1e-9)
    assert found.values == pytest.approx(-sum(c / num * math.log(c / num) for c in values.values()), abs=1e-9)
    assert -1e-9 <= found.by_chance <= entropy + 1e-9
    assert found == information(pairs_of(choices[::-1], 4), num, 0.0)


def test_a_value_that_decides_says_all_and_one_that_is_dealt_at_random_nothing() -> None:
    decided = [(value % 40, value % 40 % 8) for value in range(4000)]
    assert information(pairs_of(decided, 8), 4000, 0.0).share == pytest.approx(1.0)
    draw = torch.Generator().manual_seed(1)
    at_random = torch.stack([torch.randint(high, (4000,), generator=draw) for high in (400, 8)], 1)
    chance = information(pairs_of([(int(a), int(b)) for a, b in at_random], 8), 4000, 0.0)
    assert chance.nats > 0.3  # rare values: as they come they seem to say a lot
    assert chance.share == pytest.approx(0.0, abs=0.02)
    assert chance.experts == pytest.approx(math.log(8), abs=0.01)


def test_an_expert_for_each_domain_tells_its_entropy_and_none_of_it_if_experts_do_not_depend_on_it() -> None:
    domains = [0] * 800 + [1] * 150 + [2] * 50
    entropy = -(0.8 * math.log(0.8) + 0.15 * math.log(0.15) + 0.05 * math.log(0.05))
    # Two experts for domain 0, and one for each of the others: the expert tells more than the domain.
    told = information(pairs_of([(d, d + 1 if d else n % 2) for n, d in enumerate(domains)], 4), 1000, 0.0)
    assert (told.nats, told.values) == pytest.approx((entropy, entropy))
    assert told.experts == pytest.approx(entropy + 0.8 * math.log(2))
    assert told.share_of_values == pytest.approx(1.0)
    assert told.share is not None
    assert told.share < 0.7
    even = information(pairs_of([(d, n % 2) for n, d in enumerate(domains)], 2), 1000, 0.0)
    assert even.nats == pytest.approx(0.0, abs=1e-12)
    assert even.share_of_values == pytest.approx(0.0, abs=0.01)
    assert information(pairs_of([(0, n % 4) for n in range(40)], 4), 40, 0.0).share_of_values is None


@pytest.mark.parametrize(("num_experts", "num_values"), [(8, 5), (16, 3), (64, 10)])
def test_what_chance_tells_is_miller_and_madows_bias(num_experts: int, num_values: int) -> None:
    """In the mean over draws of independent values and experts, and of their random assignments."""
    draw, num, nats, by_chance = torch.Generator().manual_seed(0), 8000, [], []
    for _ in range(20):
        values, experts = (torch.randint(high, (num,), generator=draw) for high in (num_values, num_experts))
        pairs = sum_counts(values, experts, torch.ones_like(values), num_experts)
        found = information(pairs, num, 0.0)
        nats.append(found.nats)
        by_chance.append(found.by_chance)
    bias = (num_experts - 1) * (num_values - 1) / (2 * num)
    # A nat's 2 * num fold is chi-squared with (E - 1)(K - 1) degrees of freedom: its mean over 20 draws is within 25 %.
    assert sum(nats) / 20 == pytest.approx(bias, rel=0.25)
    assert sum(by_chance) / 20 == pytest.approx(bias, rel=0.25)


def of_several(experts_AK: torch.Tensor, id_A: torch.Tensor) -> LayerCounts:
    """Return the counts of tokens that chose several of 8 experts each."""
    chosen_AE = torch.zeros(len(id_A), 8).scatter_(1, experts_AK, 1.0)
    places = StackTokens(torch.ones(1, len(id_A)).bool(), id_A, torch.zeros_like(id_A))
    return count_choices(places, ExpertChoices(chosen_AE / experts_AK.shape[1], chosen_AE.bool(), chosen_AE.bool()))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_token_that_decides_all_its_experts_says_all_and_one_that_decides_none_nothing(k: int) -> None:
    draw = torch.Generator().manual_seed(0)
    id_A = torch.randint(400, (4000,), generator=draw)
    of_each = torch.rand(400, 8, generator=draw).topk(k).indices
    decided = specialization_metrics({"text": of_several(of_each[id_A], id_A)}, [])["explained_by"]["token"]
    assert decided["share"] == pytest.approx(1.0)
    assert decided["within"] == pytest.approx(math.log(k))
    at_random = torch.rand(4000, 8, generator=draw).topk(k).indices
    chance = specialization_metrics({"text": of_several(at_random, id_A)}, [])["explained_by"]["token"]
    assert chance["share"] == pytest.approx(0.0, abs=0.02)


@given(st.lists(st.permutations(range(5)), min_size=1, max_size=12), st.integers(1, 3))
def test_what_is_dealt_is_each_value_and_each_expert_as_often_and_no_expert_twice_to_a_token(
    orders: list[list[int]], k: int
) -> None:
    """Each value comes once: a pair that is dealt twice would be one expert twice at one token."""
    choices = [(value, expert) for value, order in enumerate(orders) for expert in order[:k]]
    found = information_by_chance(pairs_of(choices, 5), len(orders))
    assert set(found.count_X.tolist()) == {1}
    again = [divmod(key, 5) for key in found.key_X.tolist()]
    assert Counter(value for value, _ in again) == Counter(value for value, _ in choices)
    assert Counter(expert for _, expert in again) == Counter(expert for _, expert in choices)


def test_what_cannot_be_told_is_not() -> None:
    """Values that came once each say everything of any experts; and one expert leaves nothing to say."""
    assert information(pairs_of([(value, value % 4) for value in range(50)], 4), 50, 0.0).share is None
    assert information(pairs_of([(value % 5, 2) for value in range(50)], 4), 50, 0.0).share is None


@given(CHOICES)
def test_the_tokens_of_an_expert_are_those_of_a_loop(drawn: list[tuple[int, int, int]]) -> None:
    choices = [(value, expert) for value, expert, times in drawn for _ in range(times)]
    joint, values, experts = Counter(choices), Counter(v for v, _ in choices), Counter(e for _, e in choices)
    for expert, top in enumerate(top_tokens(pairs_of(choices, 4))):
        mine = {v: c for (v, e), c in joint.items() if e == expert}
        lift = {v: c / experts[expert] / (values[v] / len(choices)) for v, c in mine.items()}
        more = {v for v, c in mine.items() if c * len(choices) > experts[expert] * values[v]}
        often = sorted((v for v in more if values[v] >= MIN_COUNT), key=lambda v: (-round(lift[v], 9), -mine[v], v))
        assert [one["id"] for one in top.by_count] == sorted(mine, key=lambda v: (-mine[v], v))[:TOP_TOKENS]
        assert [round(lift[int(one["id"])], 9) for one in top.by_lift] == [
            round(lift[v], 9) for v in often[:TOP_TOKENS]
        ]
        for one in top.by_lift + top.by_count:
            assert one["count"] == mine[int(one["id"])]
            assert one["lift"] == pytest.approx(lift[int(one["id"])])


def test_the_kinds_are_told_of_the_tokens_that_have_one() -> None:
    kind_A = torch.tensor([KINDS.index(kind) for kind in ("keyword", "name", "comment")]).repeat_interleave(100)
    kind_A = torch.cat([kind_A, torch.zeros(100, dtype=torch.int64)])
    chosen_AE = F.one_hot(torch.tensor([0, 1, 1, 2]).repeat_interleave(100), 3).bool()
    places = StackTokens(torch.ones(1, 400).bool(), torch.zeros(400).long(), torch.zeros(400).long(), kind_A)
    counts = count_choices(places, ExpertChoices(chosen_AE.float(), chosen_AE, chosen_AE))
    found = specialization_metrics({"text": counts + counts}, [])
    assert found["kinds"] == {"keyword": [200, 0, 0], "name": [0, 200, 0], "comment": [0, 200, 0]}
    told = found["explained_by"]["kind"]
    # Expert 0 is a third of the tokens with a kind; without one, all of expert 2's tokens count in nothing.
    halves = math.log(3) - 2 / 3 * math.log(2)
    assert (told["nats"], told["experts"], told["values"]) == pytest.approx((halves, halves, math.log(3)))
    assert told["share"] == pytest.approx(1.0)
    assert told["share_of_values"] == pytest.approx(halves / math.log(3), abs=0.01)
    assert found["max_load"] == 1.5
    assert found["load_entropy"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
    without = count_choices(places._replace(kind_A=None), ExpertChoices(chosen_AE.float(), chosen_AE, chosen_AE))
    assert "kind" not in specialization_metrics({"text": without}, [])["explained_by"]


@given(st.data())
def test_the_parts_of_the_figures_add_up(data: st.DataObject) -> None:
    texts = {name: count_choices(*data.draw(looked_at(3))) for name in ("a", "b")}
    found = specialization_metrics(texts, [1, 4])
    chosen = sum(int(one.chosen_E.sum()) for one in texts.values())
    assert sum(found["load"]) == chosen
    assert [sum(column) for column in zip(*found["texts"].values(), strict=True)] == found["load"]
    assert sum(map(sum, found["positions"]["load"])) == chosen
    assert set(found["sentinels"]) <= {1, 4}
    assert set(found["explained_by"]) - {"kind"} == {"token", "position", "text"}
    assert sum(map(sum, found["kinds"].values())) == sum(int(one.kinds.count_X.sum()) for one in texts.values())
    assert set(found["kinds"]) <= set(KINDS[1:])
    for expert, load in enumerate(found["load"]):
        assert (found["experts"][expert]["confidence"] is None) == (load == 0)
        assert bool(found["experts"][expert]["by_count"]) == (load > 0)


def of_positions(positions: range) -> LayerCounts:
    """The first half of the places to expert 0, the others to expert 1, none to expert 2."""
    num = len(positions)
    chosen = torch.zeros(num, 3, dtype=torch.bool)
    chosen[: num // 2, 0] = chosen[num // 2 :, 1] = True
    places = StackTokens(torch.ones(1, num).bool(), torch.arange(num) % 7, torch.tensor(positions))
    return count_choices(places, ExpertChoices(torch.full((num, 3), 1 / 3), chosen, chosen))


def test_experts_that_go_by_position_and_one_that_takes_nothing() -> None:
    once = of_positions(range(64))
    found = specialization_metrics({"text": once + once + once}, [])
    assert found["explained_by"]["position"]["share"] == pytest.approx(1.0)
    assert abs(found["explained_by"]["token"]["share"]) < 0.1
    assert "text" not in found["explained_by"]
    assert found["positions"]["firsts"] == list(range(0, 64, 4))
    assert found["positions"]["last"] == 63
    assert found["positions"]["load"] == [[12, 0, 0]] * 8 + [[0, 12, 0]] * 8
    one_more = specialization_metrics({"text": of_positions(range(65))}, [])["positions"]
    assert one_more["firsts"] == list(range(0, 65, 5))  # at most 16 of equal width
    nothing = found["experts"][2]
    assert nothing == {
        "share": 0.0,
        "turned_away_fraction": None,
        "confidence": None,
        "by_lift": [],
        "by_count": [],
    }
    assert found["experts"][0]["confidence"] == pytest.approx(1 / 3)
    assert found["entropy"] == pytest.approx(math.log(3), rel=1e-6)
    assert found["sentinels"] == {}
