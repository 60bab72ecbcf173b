"""Where runs of different lengths are compared, and what is said of the best and the fastest of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from messages import lacking
from report_folders import TOKENS, a_run

from switchcli.metric_names import HELD_OUT
from switchcli.report import figures
from switchcli.report.comparison import Comparison, compare
from switchcli.report.run_report import highlights, quality_table
from switchcli.report.runs import Curve, Run, read
from switchcli.report.series import group_by_recipe


def a_made_run(
    name: str, seed: int, held_out: dict[float, float], *, logged: float | None = None, pace: float = 1.0
) -> Run:
    """A run of the recipe that its name begins with, logged up to a step, with so many seconds a step."""
    end = max(held_out, default=100) if logged is None else logged
    steps = np.arange(10.0, end + 1, 10)
    rates = {f"{what}_per_second": Curve(steps, np.full(len(steps), 1e3)) for what in ("tokens", "flops")}
    curves = {"seconds": Curve(steps, pace * steps), **rates} if len(steps) else {}
    if held_out:
        curves[HELD_OUT] = Curve(np.array([*held_out], dtype=float), np.array([*held_out.values()]))
    recipe = {"name": name.partition("-")[0], "train": {"seed": seed, "batch_tokens": TOKENS}}
    return Run(name, recipe, {}, curves, {}, {}, None, ())


def facts(found: Comparison) -> dict[str, str]:
    """Return the highlights by what they measure."""
    return {what: figure for figure, what in highlights(found)}


def best(found: Comparison) -> tuple[str, int | None, bool]:
    """Who is best, at which step before the end, and whether with some seeds alone."""
    ((what, who),) = ((what, who) for what, who in facts(found).items() if "best" in what)
    step = re.search(r"step (\d+)", what)
    return who, int(step[1]) if step else None, "seed" in what


def test_the_wall_time_of_a_step_is_of_the_seeds_that_have_come_to_it() -> None:
    long = a_made_run("a-0", 0, {0: -5, 50: -4, 100: -3}, pace=0.5)
    short = a_made_run("a-1", 1, {0: -5, 50: -4}, pace=1.5)
    table = figures.quality(compare(group_by_recipe([long, short]), None, None, 1))[0].table
    assert dict(zip(table.column("step"), table.column("seconds"), strict=True)) == {0: 0, 50: 50, 100: 50}


def test_the_time_of_an_evaluation_after_the_last_logged_step_goes_on_at_the_last_pace() -> None:
    slow = a_made_run("a-0", 0, {0: -5, 100: -4}, logged=100)
    fast = a_made_run("b-0", 0, {0: -5, 50: -5, 100: -4}, logged=50, pace=2)
    found = compare(group_by_recipe([slow, fast]), None, None, 1)
    assert found.rows[1].speed.costs[1] == (200, 200, 200)
    assert found.rows[1].speed.factors[1] == (0.5, 0.5, 0.5)


def test_the_common_step_is_the_last_evaluation_smoothing_included() -> None:
    long = a_made_run("a-0", 0, {step: step / 100 - 5 for step in range(0, 201, 20)})
    short = a_made_run("b-0", 0, {step: step / 50 - 5 for step in range(0, 101, 20)}, logged=110)
    assert compare(group_by_recipe([long, short]), None, None, 1).common_step == 100
    found = compare(group_by_recipe([long, short]), None, None, 3)
    assert found.common_step == 80  # the mean of 60, 80 and 100
    assert [row.at_common for row in found.rows] == [pytest.approx((-4.2,) * 3), pytest.approx((-3.4,) * 3)]
    assert found.rows[1].over == pytest.approx((0.8,) * 3)
    there, over = quality_table(found).headings[-2:]
    assert not lacking(there, "step 80")
    assert not lacking(over, "over a-0 step 80")


@pytest.mark.parametrize("begun", [{}, {0: -4.0}])
def test_a_run_that_has_only_begun_takes_no_part(begun: dict[float, float]) -> None:
    runs = [a_made_run("a-0", 0, {0: -5, 100: -4}), a_made_run("b-0", 0, {0: -5, 100: -3, 200: -2})]
    found = compare(group_by_recipe([*runs, a_made_run("d-0", 0, begun, logged=10)]), None, None, 1)
    assert found.common_step == 100
    assert found.rows[2].at_common is None
    assert best(found) == ("b-0", 100, False)
    assert any("d-0" in note for note in found.notes) == (not begun)


def test_a_run_cut_short_after_a_logged_step_is_compared_at_its_last_evaluation(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "a", steps=100, of=200)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-3]))  # without the evaluation of step 90, which is logged
    run = read(folder, {"train": {"batch_tokens": TOKENS}})
    other = read(a_run(tmp_path / "b"), {"train": {"batch_tokens": TOKENS}, "b": 1})
    assert compare(group_by_recipe([run, other]), None, None, 1).common_step == 80


def test_the_best_is_doubted_where_the_second_best_is_as_good_with_a_seed() -> None:
    bad = [a_made_run(f"a-{seed}", seed, {0: -5, 100: -4.5}) for seed in (0, 1)]
    good = [a_made_run(f"b-{seed}", seed, {0: -5, 100: end}) for seed, end in ((0, -3.0), (1, -3.4))]
    better = [a_made_run(f"c-{seed}", seed, {0: -5, 100: end}) for seed, end in ((0, -2.5), (1, -3.5))]
    assert best(compare(group_by_recipe([*bad, *good, *better]), None, None, 1)) == ("c", None, True)
    sure = [a_made_run(f"c-{seed}", seed, {0: -5, 100: -2.5}) for seed in (0, 1)]
    assert best(compare(group_by_recipe([*bad, *good, *sure]), None, None, 1)) == ("c", None, False)


def test_the_best_at_the_common_step_is_doubted_there_and_not_at_the_end() -> None:
    base = [a_made_run(f"a-{seed}", seed, {0: -5, 100: -4}) for seed in (0, 1)]
    crossing = [a_made_run(f"b-{seed}", seed, {0: -5, 100: at, 200: -2}) for seed, at in ((0, -3.0), (1, -4.5))]
    found = compare(group_by_recipe([*base, *crossing]), None, None, 1)
    assert found.rows[1].over == pytest.approx((0.25, -0.5, 1))
    assert best(found) == ("b", 100, True)


def test_a_speed_up_of_one_lucky_seed_is_no_headline() -> None:
    base = [a_made_run(f"a-{seed}", seed, {0: -5, 100: -4}) for seed in (0, 1)]
    lucky = [a_made_run(f"b-{seed}", seed, {0: -5, 100: end}) for seed, end in ((0, 4.0), (1, -4.5))]
    steady = [a_made_run(f"c-{seed}", seed, {0: -5, 100: -3}) for seed in (0, 1)]
    found = facts(compare(group_by_recipe([*base, *lucky, *steady]), None, None, 1))
    assert [figure for what, figure in found.items() if not lacking(what, "speed-up c a steps")] == ["2.00 x"]
    assert all(lacking(what, "b") for what in found)
