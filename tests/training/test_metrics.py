"""Means add up in any order and survive the vector that travels between ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from switchcli.training.state import Mean, Metrics, flatten, merge, unflatten


def mean(total: list[float] | float, weight: float) -> Mean:
    return Mean(torch.tensor(total, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64))


def as_lists(metrics: Metrics) -> dict[str, list[object]]:
    return {name: [part.tolist() for part in one] for name, one in metrics.items()}


numbers = st.integers(-1000, 1000).map(float)
metrics = st.dictionaries(
    st.sampled_from(["loss", "load", "dropped", "norm"]),
    st.builds(mean, st.one_of(numbers, st.lists(numbers, min_size=2, max_size=2)), st.integers(0, 9)),
)


def test_a_mean_of_parts_is_the_mean_of_the_whole_and_not_of_their_means() -> None:
    assert (mean(6.0, 3) + mean(1.0, 1)).value() == 7 / 4


def test_a_mean_of_nothing_is_zero() -> None:
    assert mean(0.0, 0).value() == 0.0


def test_every_entry_of_a_total_has_the_same_weight() -> None:
    assert mean([2.0, 4.0], 2).value().tolist() == [1.0, 2.0]


@given(metrics)
def test_what_is_flattened_comes_back(before: Metrics) -> None:
    flat = flatten(before)
    assert flat.dtype == torch.float64
    assert as_lists(unflatten(flat, before)) == as_lists(before)


@given(st.dictionaries(st.sampled_from("abc"), st.builds(mean, numbers, st.integers(0, 9)), min_size=1))
def test_sums_of_vectors_are_sums_of_metrics(one: Metrics) -> None:
    other = {name: mean(float(ord(name)), 2) for name in one}
    assert as_lists(unflatten(flatten(one) + flatten(other), one)) == as_lists(merge(one, other))


def test_merge_keeps_what_one_side_alone_has() -> None:
    merged = merge({"a": mean(1.0, 1), "b": mean(2.0, 1)}, {"b": mean(3.0, 1), "c": mean(4.0, 1)})
    assert as_lists(merged) == {"a": [1.0, 1.0], "b": [5.0, 2.0], "c": [4.0, 1.0]}
