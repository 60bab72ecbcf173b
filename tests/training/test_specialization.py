"""Specialization: against loops, and where the answer is known."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_routing_counts import looked_at

from switchcli.analysis.routing_counts import ExpertChoices, ExpertCounts, StackTokens, count_choices, count_pairs
from switchcli.analysis.specialization import (
    MIN_COUNT,
    TOP_TOKENS,
    mutual_information,
    specialization_metrics,
    top_tokens,
)

TOKENIZER: Any = SimpleNamespace(sentinels=np.array([1, 4]), pieces=lambda ids: [f"<{token}>" for token in ids])
CHOICES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=20)


def pairs_of(choices: list[tuple[int, int]], num_experts: int) -> ExpertCounts:
    values, experts = torch.tensor(choices).T
    return count_pairs(values, experts, num_experts)


@given(CHOICES)
def test_mutual_information_is_that_of_a_loop(drawn: list[tuple[int, int, int]]) -> None:
    choices = [(value, expert) for value, expert, times in drawn for _ in range(times)]
    joint, values, experts = Counter(choices), Counter(v for v, _ in choices), Counter(e for _, e in choices)
    num = len(choices)
    nats = sum(c / num * math.log(c * num / (values[v] * experts[e])) for (v, e), c in joint.items())
    assert mutual_information(pairs_of(choices, 4)) == pytest.approx(nats, abs=1e-9)


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


@given(st.data())
def test_the_parts_of_the_figures_add_up(data: st.DataObject) -> None:
    texts = {name: count_choices(*data.draw(looked_at(3))) for name in ("a", "b")}
    found = specialization_metrics(texts, TOKENIZER)
    chosen = sum(int(one.chosen_E.sum()) for one in texts.values())
    assert sum(found["load"]) == chosen
    assert [sum(column) for column in zip(*found["texts"].values(), strict=True)] == found["load"]
    assert set(found["sentinels"]) <= {"<1>", "<4>"}
    for expert, load in enumerate(found["load"]):
        assert (found["experts"][expert]["confidence"] is None) == (load == 0)
        assert bool(found["experts"][expert]["by_count"]) == (load > 0)


def test_two_experts_with_half_of_the_tokens_each_and_one_without_any() -> None:
    num = 64
    chosen_AE = torch.zeros(num, 3, dtype=torch.bool)
    chosen_AE[: num // 2, 0] = chosen_AE[num // 2 :, 1] = True
    tokens = StackTokens(torch.ones(1, num).bool(), torch.arange(num) // 16)
    counts = count_choices(tokens, ExpertChoices(torch.full((num, 3), 1 / 3), chosen_AE, chosen_AE))
    found = specialization_metrics({"text": counts + counts}, TOKENIZER)
    assert (found["tokens"], found["load"]) == (128, [64, 64, 0])
    assert found["max_load"] == 1.5
    assert found["load_entropy"] == pytest.approx(math.log(2))
    assert found["entropy"] == pytest.approx(math.log(3), rel=1e-6)
    assert found["sentinels"] == {"<1>": [32, 0, 0]}
    first, _, nothing = found["experts"]
    assert nothing == {
        "share": 0.0,
        "turned_away_fraction": None,
        "confidence": None,
        "by_lift": [],
        "by_count": [],
    }
    assert first["confidence"] == pytest.approx(1 / 3)
    assert first["by_lift"] == [{"piece": f"<{token}>", "id": token, "count": 32, "lift": 2.0} for token in (0, 1)]
