"""Schedules at the values that T5 and their definitions give, and as functions without jumps."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import lacking

from switchcli.training.schedules import (
    Constant,
    Cosine,
    InverseSquareRoot,
    Linear,
    ScheduleSpec,
    WarmupStableDecay,
)

TOTAL = 100_000


@given(step=st.integers(0, TOTAL - 1))
def test_t5_is_one_over_the_root_of_the_step_at_any_length_of_the_run(step: int) -> None:
    assert InverseSquareRoot()(step, TOTAL) == pytest.approx(1 / math.sqrt(max(step, 10_000)))
    assert InverseSquareRoot()(step, TOTAL) == InverseSquareRoot()(step, 2 * TOTAL)


def test_the_last_tenth_falls_to_zero_where_it_is_asked_for() -> None:
    plain, decayed = InverseSquareRoot(), InverseSquareRoot(decay_fraction=0.1)
    assert decayed(90_000, TOTAL) == plain(90_000, TOTAL)
    assert decayed(95_000, TOTAL) == pytest.approx(plain(95_000, TOTAL) / 2)
    assert decayed(TOTAL - 1, TOTAL) == pytest.approx(plain(TOTAL, TOTAL) / 10_000, rel=1e-4)
    assert decayed(TOTAL, TOTAL) == 0.0


@pytest.mark.parametrize("schedule", [Constant, Cosine, Linear, WarmupStableDecay])
def test_a_warm_up_may_last_to_the_end_and_no_longer(
    schedule: type[Constant | Cosine | Linear | WarmupStableDecay],
) -> None:
    assert schedule(warmup_steps=100).incompatibility(100) is None
    assert lacking(schedule(warmup_steps=101).incompatibility(100) or "", "warmup_steps 101 100") == []


def test_constant_after_a_warm_up() -> None:
    assert {Constant()(step, TOTAL) for step in (0, 1, 50_000, TOTAL)} == {0.001}
    warm = Constant(learning_rate=0.4, warmup_steps=100)
    assert [warm(step, TOTAL) for step in (0, 49, 99, 100, 5000)] == pytest.approx([0.004, 0.2, 0.4, 0.4, 0.4])


@pytest.mark.parametrize("spec", [Cosine, Linear])
def test_warm_up_peak_middle_and_end(spec: type[Cosine] | type[Linear]) -> None:
    schedule = spec(learning_rate=0.4, warmup_steps=100, final_fraction=0.1)
    assert schedule(0, 1100) == pytest.approx(0.004)  # the first step already learns
    assert schedule(49, 1100) == pytest.approx(0.2)
    assert schedule(99, 1100) == schedule(100, 1100) == pytest.approx(0.4)
    assert schedule(600, 1100) == pytest.approx(0.4 * 0.55)
    assert schedule(1100, 1100) == schedule(2000, 1100) == pytest.approx(0.04)


def test_cosine_and_linear_part_ways_between() -> None:
    assert Cosine(learning_rate=1.0)(25, 100) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert Linear(learning_rate=1.0)(25, 100) == pytest.approx(0.75)


def test_the_end_value_is_reached_after_the_last_update() -> None:
    end = {"learning_rate": 1.0, "final_fraction": 0.1}
    assert Linear(**end)(99, 100) == pytest.approx(0.109)
    assert 0.1 < Cosine(**end)(99, 100) < 0.101
    assert InverseSquareRoot(decay_fraction=0.1)(99, 100) == pytest.approx(0.01 / 10)
    assert Linear(**end)(100, 100) == Cosine(**end)(100, 100) == pytest.approx(0.1)
    assert InverseSquareRoot(decay_fraction=0.1)(100, 100) == 0


def test_wsd_warms_up_is_constant_and_falls_over_the_last_fraction() -> None:
    linear = WarmupStableDecay(learning_rate=0.4, warmup_steps=100, decay_fraction=0.25)
    steps = (0, 49, 99, 100, 749, 750, 875, 999, 1000)
    assert [linear(step, 1000) for step in steps] == pytest.approx(
        [0.004, 0.2, 0.4, 0.4, 0.4, 0.4, 0.2, 0.4 / 250, 0.0]
    )
    root = linear.model_copy(update={"shape": "sqrt"})
    assert [root(step, 1000) for step in (749, 750, 1000)] == pytest.approx([0.4, 0.4, 0.0])
    # A sixteenth and a quarter of the decay: 1 - 1/4 and 1 - 1/2 of the rate.
    assert [root(step, 1600) for step in (1225, 1300)] == pytest.approx([0.3, 0.2])
    assert WarmupStableDecay()(79, 100) == WarmupStableDecay()(80, 100) == 0.001
    assert WarmupStableDecay()(90, 100) == pytest.approx(0.0005)


def test_wsd_over_the_whole_run_is_linear_to_zero() -> None:
    wsd, linear = WarmupStableDecay(decay_fraction=1.0), Linear()
    assert [wsd(step, 50) for step in range(51)] == pytest.approx([linear(step, 50) for step in range(51)])


@given(first=st.integers(0, 999), own=st.integers(1, 1000), step=st.integers(0, 1000), root=st.booleans())
def test_wsd_of_a_branch_falls_over_all_steps_of_its_own(first: int, own: int, step: int, root: bool) -> None:
    """By hand: the rate of the branch's own step, counted from its beginning."""
    step = first + step % own
    branch = WarmupStableDecay(learning_rate=0.5, shape="sqrt" if root else "linear").of_branch(first, first + own)
    progress = (step - first) / own
    assert branch(step, first + own) == pytest.approx(0.5 * (1 - (math.sqrt(progress) if root else progress)))


@pytest.mark.parametrize("schedule", [InverseSquareRoot(), Constant(), Cosine(), Linear()])
def test_other_schedules_of_a_branch_are_those_of_the_run(schedule: ScheduleSpec) -> None:
    assert schedule.of_branch(40, 100) == schedule


schedules = st.one_of(
    st.builds(
        InverseSquareRoot,
        learning_rate=st.floats(1e-6, 1.0),
        warmup_steps=st.integers(1, 2000),
        decay_fraction=st.floats(0.0, 0.99),
    ),
    *(
        st.builds(
            spec,
            learning_rate=st.floats(1e-6, 1.0),
            warmup_steps=st.integers(0, 500),
            final_fraction=st.floats(0.0, 1.0),
        )
        for spec in (Cosine, Linear)
    ),
    st.builds(
        WarmupStableDecay,
        learning_rate=st.floats(1e-6, 1.0),
        warmup_steps=st.integers(0, 500),
        decay_fraction=st.floats(0.01, 1.0),
        shape=st.sampled_from(["linear", "sqrt"]),
    ),
)


@given(schedule=schedules, total=st.integers(1, 3000), share=st.floats(0.0, 1.0))
def test_a_rate_is_positive_at_most_the_peak_and_never_jumps(schedule: ScheduleSpec, total: int, share: float) -> None:
    step = int(share * (total - 1))
    rate, following = schedule(step, total), schedule(step + 1, total)
    assert rate >= 0.0
    assert rate <= schedule.learning_rate * (1 + 1e-12)
    fastest = 1.0  # a part of one step may be all of a ramp
    if isinstance(schedule, InverseSquareRoot):
        # A ramp of `decay_fraction` falls by 1 / its length a step, and the root by half the step over it.
        ramp = schedule.decay_fraction * total
        fastest = min(1.0, (1 / ramp if ramp else 0.0) + 0.5 / schedule.warmup_steps)
    elif isinstance(schedule, WarmupStableDecay):
        share = 1 / (schedule.decay_fraction * total)  # of the decay, in one step
        fall = share if schedule.shape == "linear" else math.sqrt(share)
        fastest = min(1.0, fall + 1 / max(1, schedule.warmup_steps))  # both, where they overlap
    elif step < schedule.warmup_steps:
        fastest = 1 / schedule.warmup_steps
    elif total > schedule.warmup_steps:
        fastest = min(1.0, math.pi / 2 / (total - schedule.warmup_steps))
    assert abs(following - rate) <= schedule.learning_rate * fastest * (1 + 1e-9)


@given(schedule=schedules, total=st.integers(1, 3000))
def test_the_rate_never_rises_after_the_warm_up(schedule: ScheduleSpec, total: int) -> None:
    steps = range(min(schedule.warmup_steps, total), total, max(1, total // 50))
    rates = [schedule(step, total) for step in steps]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(rates))
