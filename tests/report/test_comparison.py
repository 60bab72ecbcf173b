"""Where runs of different lengths are compared, and the verdicts on their quality and speed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from messages import lacking
from report_folders import TOKENS

from switchcli.metric_names import DROPPED_FRACTION, HELD_OUT_LOSS
from switchcli.report import charts, figures
from switchcli.report.comparison import compare
from switchcli.report.run_report import Report, quality_table, tables, to_json
from switchcli.report.runs import Curve, Run
from switchcli.report.series import by_seed, group_by_recipe
from switchcli.report.significance import Verdict, gain, t_95


def a_made_run(
    name: str, seed: int, held_out: dict[float, float], *, logged: float | None = None, pace: float = 1.0
) -> Run:
    """A run of the recipe that its name begins with, logged up to a step, with so many seconds a step."""
    end = max(held_out, default=100) if logged is None else logged
    steps = np.arange(10.0, end + 1, 10)
    rates = {f"{what}_per_second": Curve(steps, np.full(len(steps), 1e3)) for what in ("tokens", "flops")}
    curves = {"seconds": Curve(steps, pace * steps), **rates} if len(steps) else {}
    if held_out:  # neg. log perplexities by step
        curves[HELD_OUT_LOSS] = Curve(np.array([*held_out], dtype=float), -np.array([*held_out.values()], dtype=float))
    recipe = {"name": name.partition("-")[0], "train": {"seed": seed, "batch_tokens": TOKENS}}
    return Run(name, recipe, {}, curves, {}, {}, None, ())


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_branch_with_another_batch_has_the_tokens_of_the_run_before_it(is_complete: bool) -> None:
    """100 steps of the recipe's batch, then a branch with a batch of half: at step 200 it has seen 150 batches."""
    whole = a_made_run("a-0", 0, {0: -5, 100: -4, 200: -3})
    branch = a_made_run("b-0", 0, {100: -4, 200: -3})
    recipe = {**branch.recipe, "train": {"seed": 0, "batch_tokens": TOKENS // 2}}
    tokens = Curve(np.array([150.0, 200.0]), np.array([125.0, 150.0]) * TOKENS)
    if is_complete:
        branch = branch._replace(recipe=recipe, result={"step": 200, "input_tokens": 150 * TOKENS})
    else:
        branch = branch._replace(recipe=recipe, curves={**branch.curves, "input_tokens": tokens})
    found = compare(group_by_recipe([whole, branch]), "a-0", None, 1)
    drawn = {figure.name: figure for figure in figures.quality(found)}
    assert {"held_out_tokens", "held_out_flops"} <= drawn.keys(), "steps do not have the same tokens"
    columns = map(drawn["held_out_tokens"].table.column, ("series", "step", "tokens", "flops"))
    assert [*zip(*columns, strict=True)] == [
        *(("a-0", step, step * TOKENS, step * TOKENS) for step in (0, 100, 200)),
        *(("b-0", step, batches * TOKENS, batches * TOKENS) for step, batches in ((100, 100), (200, 150))),
    ]
    steps, _, flops = found.rows[1].speed.factors
    assert steps is not None
    assert flops is not None
    assert (steps.spread.mean, flops.spread.mean) == (1.0, 200 / 150)


def a_finished_run(name: str, seed: int, loss: float, flops: int, num_experts: int, **router: Any) -> Run:
    run = a_made_run(name, seed, {100: -loss})
    model = {"num_experts": num_experts, "router": {"kind": "switch", **router}}
    return run._replace(recipe={**run.recipe, "model": model}, result={"flops_per_sequence": flops, "step": 100})


def test_runs_of_equal_flops_and_routers_make_a_line_over_the_number_of_experts() -> None:
    dense = [a_finished_run("dense", seed, 3.0 + seed, 100, 1) for seed in (0, 1)]
    switch = [a_finished_run(f"rate{rate}", 0, loss, 100, 8) for rate, loss in ((1, 2.75), (2, 2.5), (3, 2.625))]
    others = [a_finished_run("wide", 0, 2.0, 200, 8), a_finished_run("topk", 0, 2.25, 100, 8, kind="top_k", k=4)]
    (chart,) = figures.experts(compare(group_by_recipe([*dense, *switch, *others]), None, None, 1))
    assert chart.table.rows == [
        ("100 FLOPs, 100 steps, switch", 1, 3.5, 3.0, 4.0),
        ("100 FLOPs, 100 steps, switch", 8, 2.5, 2.5, 2.5),
        ("200 FLOPs, 100 steps, switch", 8, 2.0, 2.0, 2.0),
        ("100 FLOPs, 100 steps, top_k with k 4", 8, 2.25, 2.25, 2.25),
    ]
    assert charts.svg(chart).startswith("<svg")
    assert figures.experts(compare(group_by_recipe([*dense, *others]), None, None, 1)) == []
    assert figures.experts(compare(group_by_recipe([a_made_run("a-0", 0, {100: -1})]), None, None, 1)) == []


@pytest.mark.parametrize(
    "other",
    [{"verb": "distill"}, {"start": {"checkpoint": "a"}}, {"data": {"corpora": []}}, {"train": {"batch_tokens": 1}}],
)
def test_a_run_with_another_start_text_or_batch_is_no_point_over_the_number_of_experts(other: dict[str, Any]) -> None:
    runs = [a_finished_run("dense", 0, 3.0, 100, 1), a_finished_run("sparse", 0, 2.5, 100, 8)]
    student = a_finished_run("student", 0, 1.0, 100, 1)
    student = student._replace(recipe={**student.recipe, **other})
    (chart,) = figures.experts(compare(group_by_recipe([*runs, student]), None, None, 1))
    assert [row[2] for row in chart.table.rows] == [3.0, 2.5]


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
    assert found.rows[1].speed.factors[1].spread == (0.5, 0.5, 0.5)


def test_the_common_step_is_the_last_evaluation_smoothing_included() -> None:
    long = a_made_run("a-0", 0, {step: step / 100 - 5 for step in range(0, 201, 20)})
    short = a_made_run("b-0", 0, {step: step / 50 - 5 for step in range(0, 101, 20)}, logged=110)
    assert compare(group_by_recipe([long, short]), None, None, 1).common_step == 100
    found = compare(group_by_recipe([long, short]), None, None, 3)
    assert found.common_step == 80  # the mean of 60, 80 and 100
    assert [row.at_common for row in found.rows] == [pytest.approx((4.2,) * 3), pytest.approx((3.4,) * 3)]
    assert found.rows[1].over.spread == pytest.approx((0.8,) * 3)
    headings = quality_table(found).columns
    assert "at step 80" in headings
    assert not lacking(headings[2], "gain over a-0 step 80")


@pytest.mark.parametrize("begun", [{}, {0: -4.0}])
def test_a_run_that_has_only_begun_takes_no_part(begun: dict[float, float]) -> None:
    runs = [a_made_run("a-0", 0, {0: -5, 100: -4}), a_made_run("b-0", 0, {0: -5, 100: -3, 200: -2})]
    found = compare(group_by_recipe([*runs, a_made_run("d-0", 0, begun, logged=10)]), None, None, 1)
    assert found.common_step == 100
    assert found.rows[2].at_common is None
    assert found.rows[1].verdict == Verdict.ONE_SEED
    assert any("d-0" in note for note in found.notes) == (not begun)


def seeds(name: str, *ends: float, first: int = 0) -> list[Run]:
    """Runs of one recipe that end with these values after -5 at step 20, with seeds from `first` on."""
    return [a_made_run(f"{name}-{seed}", seed, {0: -9, 20: -5, 100: end}) for seed, end in enumerate(ends, start=first)]


def test_a_series_is_better_only_if_its_interval_over_the_baseline_says_so() -> None:
    bad, good, chancy = seeds("a", -4.5, -4.5, -4.5), seeds("b", -3.0, -3.4, -3.2), seeds("c", -1.0, -6.0, -4.0)
    found = compare(group_by_recipe([*bad, *good, *chancy]), None, None, 1)
    assert [row.verdict for row in found.rows] == [Verdict.BASELINE, Verdict.BETTER, Verdict.NO_DIFFERENCE]


def test_runs_are_compared_within_a_seed_and_without_common_seeds_by_their_means() -> None:
    # The seeds differ by 1, the recipes by 0.1 to 0.12 within a seed.
    base = seeds("a", -4.0, -3.0, -2.0)
    row = compare(group_by_recipe([*base, *seeds("b", -3.9, -2.88, -1.89)]), None, None, 1).rows[1]
    assert row.over.spread == pytest.approx((0.11, 0.1, 0.12))
    margin = 4.302653 * 0.01 / 3**0.5  # Student's, with 2 degrees of freedom and a standard deviation of 0.01
    assert row.over.interval == pytest.approx((0.11 - margin, 0.11 + margin))
    assert row.verdict == Verdict.BETTER
    row = compare(group_by_recipe([*base, *seeds("b", -3.9, -2.88, -1.89, first=7)]), None, None, 1).rows[1]
    assert row.over.spread.mean == pytest.approx(0.11)
    low, high = row.over.interval
    assert (low + high) / 2 == pytest.approx(0.11)
    assert high - low > 4  # 2 x 2.78 (4 degrees of freedom) x (1.00 + 1.01) ** 0.5 / 3 ** 0.5
    assert row.verdict == Verdict.NO_DIFFERENCE
    assert row.speed.factors[0].verdict in (Verdict.NO_PAIRS, Verdict.SOME_SEEDS)


@pytest.mark.parametrize(
    ("first", "mean", "margin"),
    [
        (1, 1.1, 12.7062 * 0.1),  # seeds 1 and 2: pairs that differ by 1.0 and 1.2, 1 degree of freedom
        (2, 2.1, 2.7789 * (1.00 / 3 + 1.11 / 3) ** 0.5),  # one shared seed says less than three of each: 3.99 degrees
        (3, 2.1, 2.7789 * (1.00 / 3 + 1.11 / 3) ** 0.5),
    ],
    ids=["two shared seeds of three", "one shared seed of three", "none"],
)
def test_runs_are_paired_from_two_shared_seeds_on(first: int, mean: float, margin: float) -> None:
    theirs = {0: 1.0, 1: 2.0, 2: 3.0}
    ours = dict(enumerate((3.0, 4.2, 5.1), start=first))
    found = gain(ours, theirs)
    assert found is not None
    assert found.interval is not None
    assert found.spread.mean == pytest.approx(mean)
    assert found.interval == pytest.approx((mean - margin, mean + margin), abs=1e-3)


def test_one_shared_seed_is_a_pair_where_a_series_has_no_other() -> None:
    for ours, theirs in (({0: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0}), ({0: 5.0, 1: 2.0, 2: 3.0}, {0: 1.0})):
        found = gain(ours, theirs)
        assert found is not None
        assert (found.spread.mean, found.verdict) == (4.0, Verdict.ONE_SEED)


def test_equal_runs_do_not_differ() -> None:
    found = gain({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert found is not None
    assert (found.interval, found.verdict) == ((0, 0), Verdict.NO_DIFFERENCE)


def test_the_dropped_share_is_that_of_the_last_tenth() -> None:
    run = a_made_run("a-0", 0, {0: -5, 100: -4})
    dropped = Curve(np.arange(20.0), np.arange(20.0) / 20)
    run = run._replace(curves={**run.curves, DROPPED_FRACTION: dropped})
    assert compare(group_by_recipe([run]), None, None, 1).rows[0].dropped == pytest.approx((0.925,) * 3)


def test_a_run_that_was_repeated_with_its_seed_is_one_seed() -> None:
    twice = [
        [a_made_run(f"{name}-{copy}", 0, {0: -9, 20: -5, 100: end}) for copy in (0, 1)]
        for name, end in (("a", -4), ("b", -3))
    ]
    found = compare(group_by_recipe([*twice[0], *twice[1]]), None, None, 1)
    assert (found.rows[1].seeds, found.rows[1].verdict) == (1, Verdict.ONE_SEED)
    assert by_seed(group_by_recipe(twice[0])[0]) == {0: twice[0][0]}  # the first
    assert found.rows[1].speed.factors[0].verdict == Verdict.ONE_SEED


def test_a_chart_counts_a_repeated_seed_once_as_tables_do() -> None:
    ends = {"a-0": (0, -4), "a-0-again": (0, -5), "a-1": (1, -3)}
    runs = [a_made_run(name, seed, {0: -9, 20: -6, 100: end}) for name, (seed, end) in ends.items()]
    found = compare(group_by_recipe(runs), None, None, 1)
    table = figures.quality(found)[0].table
    assert [table.column(column)[-1] for column in ("value", "least", "most")] == [*found.rows[0].final] == [3.5, 3, 4]


def test_a_gain_at_the_common_step_is_doubted_there_and_not_at_the_end() -> None:
    base = [a_made_run(f"a-{seed}", seed, {0: -5, 100: -4}) for seed in (0, 1)]
    crossing = [a_made_run(f"b-{seed}", seed, {0: -5, 100: at, 200: -2}) for seed, at in ((0, -3.0), (1, -4.5))]
    found = compare(group_by_recipe([*base, *crossing]), None, None, 1)
    assert found.rows[1].over.spread == pytest.approx((0.25, -0.5, 1))
    assert (found.rows[1].verdict, found.common_step) == (Verdict.NO_DIFFERENCE, 100)


def test_a_speed_up_of_lucky_seeds_is_none() -> None:
    base, lucky, steady = seeds("a", -4, -4, -4), seeds("b", 4.0, 3.9, -4.5), seeds("c", -3, -3, -3)
    found = compare(group_by_recipe([*base, *lucky, *steady]), None, None, 1)
    assert [row.speed.factors[0].verdict for row in found.rows[1:]] == [Verdict.SOME_SEEDS, Verdict.FASTER]
    assert found.rows[2].speed.factors[0].spread.mean == pytest.approx(100 / 60)


def test_a_speed_up_within_the_spread_of_seeds_is_none() -> None:
    found = compare(group_by_recipe([*seeds("a", -4, -4, -4), *seeds("b", -3, -3.99, -4)]), None, None, 1)
    speed_up = found.rows[1].speed.factors[0]
    assert speed_up.spread.mean == pytest.approx((100 / 60 * 100 / (20 + 80 / 1.01)) ** (1 / 3))
    assert speed_up.interval.low < 1 < speed_up.interval.high
    assert speed_up.verdict == Verdict.NO_DIFFERENCE


def test_welchs_interval_of_two_and_two_seeds_has_a_fraction_of_degrees_of_freedom() -> None:
    """Variances of the means 0.25 and 1: (0.25 + 1)^2 / (0.25^2 + 1^2) = 1.47 degrees, where t is 6.19 and not 12.7."""
    effect = gain({0: 5.0, 1: 3.0}, {2: 1.0, 3: 2.0})
    assert effect is not None
    assert effect.interval is not None
    assert effect.interval.high - 2.5 == pytest.approx(6.19 * 1.25**0.5, rel=2e-3)


def test_runs_are_compared_at_the_last_step_at_which_all_were_evaluated() -> None:
    rare = [a_made_run(f"a-{seed}", seed, {0: -10, 50: -5 + seed, 100: -4, 150: -3}) for seed in (0, 1)]
    often = [a_made_run(f"b-{seed}", seed, {0: -10, 20: -6, 50: -4 + seed, 70: -1}) for seed in (0, 1)]
    found = compare(group_by_recipe([*rare, *often]), None, None, 1)
    assert found.common_step == 50, "not 70, where only one was evaluated"
    assert [row.at_common for row in found.rows] == [(4.5, 4, 5), (3.5, 3, 4)]
    assert (found.rows[1].over.spread, found.rows[1].verdict) == ((1, 1, 1), Verdict.BETTER)


def test_runs_on_other_tasks_are_not_compared() -> None:
    def tuned(name: str, seed: int, tasks: list[Any]) -> Run:
        run = a_made_run(f"{name}-{seed}", seed, {0: -10, 50: -4, 100: -3 - seed})
        return run._replace(recipe={**run.recipe, "tasks": tasks})

    text = [a_made_run(f"a-{seed}", seed, {0: -10, 50: -5, 100: -4 - seed}) for seed in (0, 1)]

    def tuned_pair(name: str, tasks: list[Any]) -> list[Run]:
        return [tuned(name, seed, tasks) for seed in (0, 1)]

    own = {"kind": "files", "name": "own", "train": ["a.jsonl"]}
    moved = {**own, "train": ["b.jsonl"]}
    runs = [
        tuned(name, seed, tasks) for name, tasks in (("b", [own]), ("c", [moved]), ("d", ["rte"])) for seed in (0, 1)
    ]
    rows = compare(group_by_recipe([*text, *runs]), None, None, 1).rows
    assert [row.verdict for row in rows] == [Verdict.BASELINE, *[Verdict.OTHER_TASKS] * 3]
    assert rows[1].over is rows[1].speed.factors[0] is None
    rows = compare(group_by_recipe(runs), None, None, 1).rows
    assert [row.verdict for row in rows] == [Verdict.BASELINE, Verdict.NO_DIFFERENCE, Verdict.OTHER_TASKS]
    both = [*tuned_pair("e", ["rte", own]), *tuned_pair("f", [own, "rte"])]
    rows = compare(group_by_recipe([*both, *tuned_pair("g", ["rte", {**own, "target": "x"}])]), None, None, 1).rows
    assert [row.verdict for row in rows] == [Verdict.BASELINE, Verdict.NO_DIFFERENCE, Verdict.OTHER_TASKS]


def test_scores_of_tasks_are_compared_by_hand() -> None:
    """Differences within a seed 1, 2 and 3: Student's interval is 2 plus or minus 4.3027 / sqrt(3)."""

    def tuned(name: str, scores: Mapping[str, Sequence[float]]) -> list[Run]:
        runs = [a_made_run(f"{name}-{seed}", seed, {0: -10, 100: -3}) for seed in range(3)]
        results = [{task: {"score": {"value": values[seed]}} for task, values in scores.items()} for seed in range(3)]
        return [run._replace(result={"step": 100, "tasks": tasks}) for run, tasks in zip(runs, results, strict=True)]

    base = tuned("a", {"rte": (50, 60, 70), "cb": (10, 20, 30)})
    better = tuned("b", {"rte": (51, 62, 73), "own": (1, 1, 1)})
    found = compare(group_by_recipe([*base, *better]), None, None, 1)
    assert found.task_gains.keys() == {"b"}
    assert found.task_gains["b"].keys() == {"rte"}
    effect = found.task_gains["b"]["rte"]
    half = 4.3027 / 3**0.5
    assert (effect.spread.mean, *effect.interval) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)
    assert effect.verdict == Verdict.NO_DIFFERENCE
    table = next(table for table in tables(Report(found)) if table.title == "Gains in tasks")
    assert table.rows[0][:3] == ("rte", "b", Verdict.NO_DIFFERENCE)
    assert json.loads(json.dumps(to_json(Report(found))))["task_gains"]["b"]["rte"]["mean"] == 2


def test_runs_without_an_evaluation_in_common_are_not_compared() -> None:
    rare = [a_made_run(f"a-{seed}", seed, {0: -10, 50: -4, 100: -3}) for seed in (0, 1)]
    often = [a_made_run(f"b-{seed}", seed, {0: -10, 20: -6, 40: -3}) for seed in (0, 1)]
    found = compare(group_by_recipe([*rare, *often]), None, None, 1)
    assert (found.window, found.common_step) == (None, None)
    assert [row.verdict for row in found.rows] == [Verdict.BASELINE, Verdict.NO_COMMON_STEP]
    assert found.rows[1].over is found.rows[1].at_common is None
    assert any(not lacking(note, "eval.every_steps") for note in found.notes)
    begun = compare(group_by_recipe([a_made_run(f"{name}-0", 0, {0: -5.0}) for name in "ab"]), None, None, 1)
    assert begun.rows[1].over is None, "an evaluation at step 0 says nothing of training"


def test_a_branch_is_not_compared_with_its_parent_where_it_began() -> None:
    parent = a_made_run("a-0", 0, {0: -5, 50: -4, 100: -3})
    branch = a_made_run("b-0", 0, {100: -3, 150: -2})
    branch = branch._replace(recipe={**branch.recipe, "start": {"checkpoint": "a/step-00000100", "keep": "run"}})
    found = compare(group_by_recipe([parent, branch]), None, None, 1)
    assert (found.window, found.rows[1].over, found.rows[1].verdict) == (None, None, Verdict.NO_COMMON_STEP)
    assert any(not lacking(note, "branch parent") for note in found.notes)
    longer = a_made_run("a-0", 0, {0: -5, 50: -4, 100: -3, 150: -2.5})
    found = compare(group_by_recipe([longer, branch]), None, None, 1)
    assert (found.window, found.rows[1].over.spread.mean) == ((150,), 0.5)


def test_smoothed_values_are_of_the_same_evaluations() -> None:
    even = a_made_run("a-0", 0, {0: -9, 40: -5, 60: -4, 80: -3, 100: -2})
    uneven = a_made_run("b-0", 0, {0: -9, 40: -5, 60: -4, 70: -3, 90: -2})
    found = compare(group_by_recipe([even, uneven]), None, None, 2)
    assert (found.window, found.common_step) == ((40, 60), 50), "(70, 90) has the mean step of (60, 100), not its steps"
    assert compare(group_by_recipe([even, uneven]), None, None, 3).rows[1].verdict == Verdict.NO_COMMON_STEP


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 5, 20, 21, 40, 1000])
def test_the_bounds_of_students_t_hold_95_percent(freedom: float) -> None:
    """Integrate the density, with t = tan(angle): the integrand is cos(angle) ** (freedom - 1)."""
    bound = np.arctan(t_95(freedom) / freedom**0.5)
    weights = np.array([1, *([4, 2] * 2000)[:-1], 1])

    def integral(end: float) -> float:
        angles = np.linspace(0, end, len(weights))
        return float((np.cos(angles) ** (freedom - 1) * weights).sum() * end)

    assert integral(bound) / integral(np.pi / 2) == pytest.approx(0.95, abs=5e-5)
