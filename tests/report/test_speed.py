"""Speed-up to a quality: by hand, against itself, and against a search by small steps."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import lacking
from report_folders import FLOPS, a_run

from switchcli.metric_names import HELD_OUT_BITS as BITS
from switchcli.metric_names import HELD_OUT_LOSS
from switchcli.report.comparison import compare
from switchcli.report.runs import Curve, Run, read
from switchcli.report.series import SeedSpread, group_by_recipe
from switchcli.report.significance import Verdict
from switchcli.report.speed import first_step_reaching

RECIPE = {"train": {"batch_tokens": 1000}}


def a_seed(folder: Path, name: str, seed: int, rate: float, seconds: float = 0.5, tokenizer: str = "{}") -> Run:
    """A run whose quality rises by `rate` a step."""
    path = a_run(folder / f"{name}-{seed}", lambda step: rate * step - 5, seconds=seconds, tokenizer=tokenizer)
    return read(path, {"name": name, "train": {**RECIPE["train"], "seed": seed}})


def test_by_hand(tmp_path: Path) -> None:
    dense = [a_seed(tmp_path, "dense", seed, 0.01) for seed in (0, 1)]
    fast = [a_seed(tmp_path, "fast", seed, 0.01 * rate, seconds=1.0) for seed, rate in ((0, 2.0), (1, 4.0))]
    slow = [a_seed(tmp_path, "slow", 0, 0.005)]
    found = compare(group_by_recipe([*dense, *fast, *slow]), None, None, 1)
    base, quick, never = found.rows
    assert [factor.spread for factor in base.speed.factors] == [(1, 1, 1)] * 3
    assert base.speed.costs == ((100, 100, 100), (50, 50, 50), (100 * FLOPS,) * 3)
    steps, time, flops = (factor.spread for factor in quick.speed.factors)
    assert steps == flops == pytest.approx((8**0.5, 2, 4))  # the quality of 100 steps after 50 and after 25
    assert time == pytest.approx((2**0.5, 1, 2))  # at half the speed
    assert quick.over.spread == pytest.approx((2, 1, 3))
    assert quick.final == SeedSpread(2, 1, 3)
    assert never.speed.reached == 0
    assert never.speed.factors == (None, None, None)
    assert never.over.spread == pytest.approx((-0.5, -0.5, -0.5))


def test_a_quality_of_ones_own_and_another_baseline(tmp_path: Path) -> None:
    dense, fast = a_seed(tmp_path, "dense", 0, 0.01), a_seed(tmp_path, "fast", 0, 0.02)
    found = compare(group_by_recipe([dense, fast]), fast.name, 4.5, 1)
    assert found.baseline.label == "fast-0"
    assert [row.speed.costs[0] for row in found.rows] == [(50, 50, 50), (25, 25, 25)]
    assert [row.speed.factors[0].spread for row in found.rows] == [(0.5, 0.5, 0.5), (1, 1, 1)]


def test_of_other_tokenizers_bits_a_byte_count_and_fewer_are_better(tmp_path: Path) -> None:
    runs = [a_seed(tmp_path, "a", 0, 0.01), a_seed(tmp_path, "b", 0, 0.02, tokenizer='{"other": 1}')]
    found = compare(group_by_recipe(runs), None, None, 1)
    assert (found.metric.name, found.num_tokenizers) == (BITS, 2)
    assert not lacking(found.notes[0], "2 tokenizers bits byte")
    better = found.rows[1]
    assert better.final == (1.5, 1.5, 1.5)  # of 2.0
    assert better.over.spread == (0.5, 0.5, 0.5)
    assert better.speed.factors[0].spread == pytest.approx((2, 2, 2))


@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=12), quality=st.floats(-10, 10))
def test_the_first_step_is_where_a_search_finds_it(values: list[float], quality: float) -> None:
    steps = np.arange(len(values)) * 8.0
    first = next((step for step, value in zip(steps, values, strict=True) if value >= quality), None)
    found = first_step_reaching(Curve(steps, np.array(values)), quality)
    fine = np.linspace(0, steps[-1], int(steps[-1]) * 64 + 1)
    there = np.interp(fine, steps, values)
    if found is None:
        assert max(values) < quality
    elif first == 8 and values[1] > quality:
        assert np.isnan(found)  # between step 0 and the first evaluation in training
    else:
        assert np.interp(found, steps, values) >= quality - 1e-9
        assert (there[fine < found - 1e-9] <= quality + 1e-9).all()


@given(values=st.lists(st.integers(-10, -1), min_size=2, max_size=12), pace=st.floats(0.1, 10))
def test_a_run_that_gets_everywhere_in_half_the_steps_is_twice_as_fast(values: list[int], pace: float) -> None:
    runs = []
    for apart, seconds in ((20.0, 1.0), (10.0, pace)):
        steps = np.arange(len(values)) * apart
        curves = {
            HELD_OUT_LOSS: Curve(steps, -np.array(values, dtype=float)),
            "seconds": Curve(steps[1:], steps[1:] * seconds),
        }
        for name in ("flops", "tokens"):
            curves[f"{name}_per_second"] = Curve(steps[1:], np.full(len(values) - 1, 1e6))
        runs.append(Run(f"{apart}", {**RECIPE, "apart": apart}, {}, curves, {}, {}, None, ()))
    row = compare(group_by_recipe(runs), None, None, 1).rows[1]
    assert row.speed.reached == 1
    first = next(index for index, value in enumerate(values) if value >= values[-1])
    # There before the first step, at no cost; or before the first evaluation in training, at a cost that is not known.
    if first == 0 or (first == 1 and values[1] > values[-1]):
        assert row.speed.factors == (None, None, None)
    else:
        assert row.speed.factors[0].spread == row.speed.factors[2].spread == pytest.approx((2, 2, 2))
        assert row.speed.factors[1].spread == pytest.approx((2 / pace,) * 3)


@pytest.mark.parametrize("evaluations", [1, 2])
def test_nothing_is_interpolated_from_step_0(evaluations: int) -> None:
    def a_seed_of(name: str, seed: int, held_out: dict[float, float]) -> Run:
        curve = Curve(np.array([*held_out]), -np.array([*held_out.values()]))
        recipe = {"name": name, "train": {"seed": seed}}
        return Run(f"{name}-{seed}", recipe, {}, {HELD_OUT_LOSS: curve}, {}, {}, None, ())

    slow = [a_seed_of("slow", seed, {0.0: -9.0, 50.0: -5.0, 100.0: -4.0, 150.0: -4.0}) for seed in (0, 1)]
    fast = [a_seed_of("fast", seed, {0.0: -9.0, 50.0: -2.0, 100.0: -2.0, 150.0: -2.0}) for seed in (0, 1)]
    row = compare(group_by_recipe([*slow, *fast]), None, None, evaluations).rows[1]
    assert row.speed.reached == 2
    assert row.speed.costs == row.speed.factors == (None, None, None)
    assert row.verdict == Verdict.BETTER
    losses = [one[0].curves[HELD_OUT_LOSS] for one in (slow, fast)]
    reached = [first_step_reaching(Curve(curve.steps, -curve.values), -2.0) for curve in losses]
    assert reached == [None, 50], "a value that was measured is no interpolation"
