"""Series of seeds: who belongs together, what it is called, and its curve."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_folders import a_run

from switchcli.report.runs import Curve, Loads, Run, read
from switchcli.report.series import (
    band,
    by_seed,
    differences,
    downsample,
    flatten,
    group_by_recipe,
    seed_spread,
    smooth,
)

doubles = st.floats(-1e6, 1e6)


def runs(tmp_path: Path, *names: str, **recipes: int) -> list[Run]:
    """A run each, of a recipe that its name begins with."""
    found = []
    for seed, name in enumerate(names):
        kind = recipes.get(name, len(name.split("-")[0]))
        recipe = {"model": {"size": kind}, "train": {"seed": seed}, "log": {"every_steps": seed}}
        found.append(read(a_run(tmp_path / name), recipe))
    return found


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("dense-0", "switch-0", "dense-1"), ["dense", "switch-0"]),
        (("e8-seed0", "e8-seed1", "e16-seed0"), ["e8", "e16-seed0"]),
        (("e8_s10", "e8_s11"), ["e8_s"]),
        (("tuned-9-0.06", "tuned-19-0.06", "tuned-10-0.06"), ["tuned-0.06"]),
        (("0-wide", "1-wide"), ["wide"]),
        (("run1/a", "run1/b"), ["a"]),
        (("a/run", "bb/run"), None),
        (("aaa", "bbb"), ["aaa"]),
    ],
)
def test_runs_that_differ_by_their_seed_are_one_series(
    tmp_path: Path, names: tuple[str, ...], labels: list[str] | None
) -> None:
    found = group_by_recipe(runs(tmp_path, *names))
    assert [one.label for one in found] == (labels or [f"{tmp_path}/{name}" for name in names])
    assert sum(len(one.runs) for one in found) == len(names)


def test_a_path_in_the_current_folder_is_one_whether_absolute_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [
        read(a_run(tmp_path / f"a-{seed}"), {"data": {"paths": [path]}, "train": {"seed": seed}})
        for seed, path in enumerate(("text/a.txt", str(tmp_path / "text/a.txt")))
    ]
    assert len(group_by_recipe(found)) == 1


def test_labels_are_unique(tmp_path: Path) -> None:
    found = group_by_recipe(runs(tmp_path, "a-0", "a-1", "a-2", "a-3", **{"a-0": 1, "a-1": 2, "a-2": 1, "a-3": 2}))
    assert [len(one.runs) for one in found] == [2, 2]
    assert len({one.label for one in found}) == 2


def test_a_series_is_named_by_what_varies_after_the_seed(tmp_path: Path) -> None:
    names = ["tuned-0-0.03", "tuned-0-0.06", "tuned-1-0.03", "tuned-1-0.06"]
    found = group_by_recipe(runs(tmp_path, *names, **{name: int(name[-1]) for name in names}))
    assert [(one.label, len(one.runs)) for one in found] == [("tuned-0.03", 2), ("tuned-0.06", 2)]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("1-0", "1-1", "4-0", "4-1"), ["num_experts=1", "num_experts=4"]),
        (("dense-0", "dense-1", "4-0", "4-1"), ["dense", "4"]),
    ],
)
def test_a_series_of_a_sweep_is_named_by_key_and_value(
    tmp_path: Path, names: tuple[str, ...], labels: list[str]
) -> None:
    found = []
    for name in names:
        experts, seed = name.replace("dense", "1").split("-")
        recipe = {"model": {"num_experts": int(experts)}, "train": {"seed": int(seed)}}
        found.append(read(a_run(tmp_path / name), recipe))
    assert [one.label for one in group_by_recipe(found)] == labels


def of_teacher(name: str, seed: int, path: str) -> Run:
    """A run that learned from the run in `path`."""
    recipe = {"distill": {"teacher": path, "baseline": f"runs/small/dense-{seed}"}, "train": {"seed": seed}}
    loads = {"layer": Loads(np.zeros(1), np.ones((1, 2)))}
    return Run(f"{name}-{seed}", recipe, {}, {}, loads, {}, None, ())


@pytest.mark.parametrize(
    "where", ["runs/small/teacher-{experts}-{seed}", "a-8/teacher-{experts}-{seed}/checkpoints/step-00000008"]
)
def test_seeds_that_learned_from_the_teacher_of_their_own_seed_are_one_series(where: str) -> None:
    seeds = (0, 1, 2, 4, 8, 16)
    runs = [
        of_teacher(f"mixture-{experts}", seed, where.format(experts=experts, seed=seed))
        for experts in (4, 8, 16)
        for seed in seeds
    ]
    found = group_by_recipe(runs)
    assert [(one.label, [run.seed for run in one.runs]) for one in found] == [
        (f"mixture-{experts}", [*seeds]) for experts in (4, 8, 16)
    ]
    shown = [where.format(experts=experts, seed="{train.seed}") for experts in (4, 8, 16)]
    assert differences(found) == {"distill.teacher": shown}
    assert [bool(run.loads) for run in found[0].runs] == [True] + [False] * 5  # only the first's are drawn


def test_branches_of_the_runs_of_several_seeds_are_one_series() -> None:
    runs = []
    for seed in range(3):
        start = {"checkpoint": f"runs/dense-{seed}/checkpoints/step-00000100"}
        recipe = {"start": start, "train": {"seed": seed}}
        runs.append(of_teacher("warm", seed, "")._replace(recipe=recipe))
    assert [len(series.runs) for series in group_by_recipe(runs)] == [3]


def test_only_the_runs_own_seed_in_a_path_counts() -> None:
    other = [of_teacher("a", seed, f"runs/teacher-8-{seed + 1}") for seed in (0, 1)]
    assert len(group_by_recipe(other)) == 2
    one_teacher = [of_teacher("a", seed, "runs/teacher-8") for seed in (0, 1, 8)]
    baseless = [run._replace(recipe={**run.recipe, "distill": {"teacher": "runs/teacher-8"}}) for run in one_teacher]
    assert len(group_by_recipe(baseless)) == 1


@pytest.mark.parametrize("seed", [[1], {"a": 1}, "1", None])
def test_a_seed_that_is_no_integer_is_none(tmp_path: Path, seed: object) -> None:
    (series,) = group_by_recipe([read(a_run(tmp_path / "a"), {"train": {"seed": seed}})])
    assert [*by_seed(series)] == [None]


def test_differences_are_the_keys_that_differ() -> None:
    recipe = {"a": 1, "b": {"c": [1, 2], "d": [{"e": 1}, {"e": 2}]}, "train": {"seed": 1}}
    assert flatten(recipe) == {"a": 1, "b.c": [1, 2], "b.d.0.e": 1, "b.d.1.e": 2, "train.seed": 1}


def test_differences_between_series(tmp_path: Path) -> None:
    found = group_by_recipe(runs(tmp_path, "a-0", "bb-0"))
    assert differences(found) == {"model.size": [1, 2]}
    assert differences(found[:1]) == {}


def test_a_band_is_the_mean_of_those_that_have_come_so_far() -> None:
    long, short = (
        Curve(np.array([0.0, 10, 20]), np.array([0.0, 2, 4])),
        Curve(np.array([0.0, 5, 15]), np.array([3.0] * 3)),
    )
    found = band([long, short])
    assert found is not None
    assert found.steps.tolist() == [0, 5, 10, 15, 20]
    assert found.mean.tolist() == [1.5, 3, 2.5, 3, 4]  # at 5 the long one is not interpolated from step 0
    assert found.low.tolist() == [0, 3, 2, 3, 4]
    assert found.high.tolist() == [3, 3, 3, 3, 4]
    assert band([]) is None


@given(values=st.lists(doubles, min_size=1, max_size=200), most=st.integers(4, 50))
def test_thinned_curves_keep_their_ends_and_extremes(values: list[float], most: int) -> None:
    array = np.array(values)
    places = downsample(array, most)
    assert len(places) <= max(most, min(len(values), most))
    assert [*places] == sorted({*places.tolist()})
    assert places[0] == 0
    assert places[-1] == len(values) - 1
    assert array[places].min() == array.min()
    assert array[places].max() == array.max()


def test_a_thinned_curve_has_as_many_points_as_it_may() -> None:
    assert len(downsample(np.array([0.0, *[5.0, -5.0] * 99, 0.0]), 10)) == 10


@given(values=st.lists(doubles, min_size=1, max_size=20), evaluations=st.integers(1, 25))
def test_smoothed_curves_are_means_of_windows(values: list[float], evaluations: int) -> None:
    curve = Curve(np.arange(len(values)) * 10.0, np.array(values))
    found = smooth(curve, evaluations)
    width = min(evaluations, len(values))
    windows = [values[start : start + width] for start in range(len(values) - width + 1)]
    assert found.values == pytest.approx([sum(window) / width for window in windows], abs=1e-6)
    assert found.steps[-1] == pytest.approx(10 * (len(values) - 1 - (width - 1) / 2))


def test_a_spread_is_of_what_is_known() -> None:
    found = seed_spread([None, 1.0, float("nan"), 3.0])
    assert found == (2.0, 1.0, 3.0)
    assert found is not None
    assert found.text(".1f") == "2.0 (1.0 to 3.0)"
    assert seed_spread([1.0]).text(".1f") == "1.0"  # type: ignore[union-attr]
    assert seed_spread([None]) is None
