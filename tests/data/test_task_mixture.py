"""TaskMixtureSource: rates by hand, a pure function of (seed, step), every example as often as its rate says."""

from collections import Counter

import numpy as np
import pytest
import torch

from switchcli.data.objectives.example_packing import PackedExamples, RowLengths, pack, store_from_texts
from switchcli.data.task_batches import InterleavedRows, TaskMixtureSource
from switchcli.data.text_mixture import Equal, MixtureSpec, Proportional
from switchcli.spec import EOS, PAD


def task(number: int, examples: int, length: int) -> PackedExamples:
    """Example n of the task is `length` ids of 10000 * number + n + 2."""
    inputs = store_from_texts(np.full(length, 10_000 * number + n + 2) for n in range(examples))
    targets = store_from_texts(np.array([number + 2]) for _ in range(examples))
    return pack(inputs, targets, RowLengths(16, 16), seed=0)


TASKS = {"short": task(1, 600, 2), "long": task(2, 100, 12), "small": task(3, 7, 5)}


def shown(stream: TaskMixtureSource, steps: int, rows: int) -> Counter[int]:
    """How often each example came, by the id that it is made of."""
    found: Counter[int] = Counter()
    for step in range(steps):
        for row in stream.batch(step, 0, rows).inputs_BS.numpy():
            ends = np.flatnonzero(row == EOS)
            found.update(int(row[end - 1]) for end in ends)
            assert (row[ends[-1] + 1 :] == PAD).all()
    return found


@pytest.mark.integration
@pytest.mark.parametrize(
    ("mixture", "rates"),
    [
        (Proportional(), [600 / 707, 100 / 707, 7 / 707]),
        (Proportional(cap=50), [50 / 107, 50 / 107, 7 / 107]),
        (Proportional(temperature=2.0), [24.4949 / 37.1407, 10 / 37.1407, 2.6458 / 37.1407]),
        (Proportional(cap=100, temperature=2.0), [10 / 22.6458, 10 / 22.6458, 2.6458 / 22.6458]),
        (Equal(), [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_rates_are_those_of_the_examples_shown(mixture: MixtureSpec, rates: list[float]) -> None:
    np.testing.assert_allclose(mixture.rates([600, 100, 7]), rates, rtol=1e-4)
    found = shown(TaskMixtureSource(TASKS, mixture, 0, 64), 150, 64)
    by_task = np.array([sum(n for key, n in found.items() if key // 10_000 == number) for number in (1, 2, 3)])
    np.testing.assert_allclose(by_task / by_task.sum(), rates, rtol=0.08)


def test_in_proportion_one_turn_shows_every_example_once() -> None:
    rows = sum(packed.num_rows for packed in TASKS.values())
    found = shown(TaskMixtureSource(TASKS, Proportional(), 3, rows), 2, rows)
    assert set(found.values()) == {2}
    assert len(found) == 707


def test_a_batch_follows_from_seed_and_step() -> None:
    stream = TaskMixtureSource(TASKS, Equal(), 5, 32)
    whole = [stream.batch(step, 0, 32) for step in range(40)]
    again = TaskMixtureSource(TASKS, Equal(), 5, 32)
    for step in (39, 3, 17):  # in any order, and in portions
        parts = [again.batch(step, first, 8) for first in range(0, 32, 8)]
        for field in range(2):
            assert torch.equal(torch.cat([part[field] for part in parts]), whole[step][field])
    other = TaskMixtureSource(TASKS, Equal(), 6, 32).batch(0, 0, 32)
    assert not torch.equal(other.inputs_BS, whole[0].inputs_BS)


def test_a_cap_beneath_every_task_makes_them_equal() -> None:
    np.testing.assert_allclose(Proportional(cap=5).rates([600, 100, 7]), [1 / 3] * 3)


@pytest.mark.parametrize(("mixture", "share"), [(Equal(), 1 / 2), (Proportional(cap=5), 5 / 6)])
def test_small_tasks_keep_their_rates_to_a_thousandth(mixture: MixtureSpec, share: float) -> None:
    """The rates do not depend on the number of rows: here one task has two rows and the other one."""
    tasks = {"short": task(1, 10, 2), "long": task(2, 1, 12)}
    assert [packed.num_rows for packed in tasks.values()] == [2, 1]
    found = shown(TaskMixtureSource(tasks, mixture, 0, 100), 20, 100)
    by_task = [sum(n for key, n in found.items() if key // 10_000 == number) for number in (1, 2)]
    assert by_task[0] / sum(by_task) == pytest.approx(share, abs=0.001)


def test_a_task_with_a_tiny_rate_is_shown_in_every_turn() -> None:
    """Its rate is a thirtieth of a row in the 2,000 rows of a turn: it gets one row."""
    tasks = {"large": TASKS["short"], "tiny": task(2, 1, 5)}
    found = shown(TaskMixtureSource(tasks, Proportional(temperature=0.5), 0, 100), 40, 100)
    assert sum(count for key, count in found.items() if key // 10_000 == 2) == 2


def in_order(tasks: list[PackedExamples]) -> list[tuple[list[int], list[int]]]:
    """Every row of the tasks, one task after another."""
    rows = [packed.rows(np.arange(packed.num_rows)) for packed in tasks]
    return [pair for inputs, targets in rows for pair in zip(inputs.tolist(), targets.tolist(), strict=True)]


def held_out(tasks: list[PackedExamples], portions: list[int]) -> list[tuple[list[int], list[int]]]:
    rows, found, first = InterleavedRows(tasks), [], 0
    assert rows.num_rows == sum(portions)
    for count in portions:
        batch = rows.rows(first, count)
        found += zip(batch.inputs_BS.tolist(), batch.targets_BT.tolist(), strict=True)
        first += count
    return found


def test_held_out_rows_are_every_row_of_every_task_once() -> None:
    tasks = [task(4, 1, 12), *TASKS.values(), task(5, 1, 12)]
    total = sum(packed.num_rows for packed in tasks)
    assert sorted(held_out(tasks, [total])) == sorted(in_order(tasks))
    assert held_out(tasks, [1] * total) == held_out(tasks, [total]), "in any portions"
    assert sorted(held_out([TASKS["small"]], [TASKS["small"].num_rows])) == sorted(in_order([TASKS["small"]]))


def test_held_out_rows_are_shuffled_the_same_way_each_time() -> None:
    """Some of the rows, as `eval.sequences` takes them, then stand for all tasks."""
    tasks = [TASKS["short"], TASKS["long"]]
    total = sum(packed.num_rows for packed in tasks)
    found = held_out(tasks, [total])
    assert found == held_out(tasks, [total])
    assert found != in_order(tasks)
    number = [inputs[0] // 10_000 for inputs, _ in found]
    for half in (number[: total // 2], number[total // 2 :]):
        assert half.count(1) / len(half) == pytest.approx(number.count(1) / total, abs=0.15)
    first = [inputs[0] for inputs, _ in found if inputs[0] // 10_000 == 2]
    assert first != sorted(first)
    assert first != [inputs[0] for inputs, _ in in_order([TASKS["long"]])], "within a task too"
