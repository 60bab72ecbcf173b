"""Series: runs that differ only in their seed, their common label, and the mean and range of their curves."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.report.runs import Curve, Floats, Run
from switchcli.terminal.safe_text import one_line

IGNORED_KEYS = (
    *("description", "log", "checkpoint"),
    *("train.seed", "train.device"),
)
"""Keys of a recipe in which runs of one series may differ: they change no metric, or differ with the seed."""

MAX_LABEL_KEYS = 3
"""Keys that the label of a series names, at most."""


class SeedSpread(NamedTuple):
    """A metric over the seeds of a series."""

    mean: float
    least: float
    most: float

    def text(self, write: str | Callable[[float], str]) -> str:
        """Return `mean (least to most)`, or the mean alone where all are equal, in a format or by a function."""
        mean, least, most = (f"{value:{write}}" if isinstance(write, str) else write(value) for value in self)
        return mean if self.least == self.most else f"{mean} ({least} to {most})"


def seed_spread(values: Iterable[float | None]) -> SeedSpread | None:
    """Return the spread of the values that are known and finite, or None where there is none."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return SeedSpread(float(np.mean(known)), min(known), max(known)) if known else None


class Series(NamedTuple):
    """Runs of one recipe, in the order in which they were named."""

    label: str
    runs: tuple[Run, ...]


def by_seed(series: Series) -> dict[int | None, Run]:
    """Return the runs of a series by seed; of several runs with one seed, which are one measurement, the first."""
    runs: dict[int | None, Run] = {}
    for run in series.runs:
        runs.setdefault(run.seed, run)
    return runs


def group_by_recipe(runs: Sequence[Run]) -> list[Series]:
    """Return the series of `runs` in their order, each with a unique label. An evaluation is a series by itself.

    Only the first run of a series keeps its loads: no other run's are drawn, and they take most of the memory.
    """
    groups: dict[str, list[Run]] = {}
    for run, identity in zip(runs, _identities(runs), strict=True):
        members = groups.setdefault(identity, [])
        members.append(run._replace(loads={}) if members else run)
    # The last component of each folder's name, or the full names where two of them are equal.
    names = {run.name: one_line(Path(run.name).name or run.name) for run in runs}
    if len(set(names.values())) < len(names):
        names = {name: one_line(name) for name in names}
    series: dict[str, Series] = {}
    for members in groups.values():
        label = _common_label([names[run.name] for run in members])
        if label in series:
            label = names[members[0].name]
        while label in series:
            label += "'"
        series[label] = Series(label, tuple(members))
    return _named_by_settings([*series.values()])


def _named_by_settings(series: list[Series]) -> list[Series]:
    """Return the series with `num_experts=4` as label in place of a bare value, as a sweep names the folders of a grid.

    Labels with a letter stay, and so do those of series that differ in other keys than a grid would have.
    """
    if len(series) < 2 or any(re.search(r"[^\W\d]", one.label) for one in series):
        return series
    values_of = differences(series)
    names = [key.rpartition(".")[2] for key in values_of]
    labels = [
        ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        for values in zip(*values_of.values(), strict=True)
    ]
    if not 0 < len(names) <= MAX_LABEL_KEYS or len(set(labels)) < len(series):
        return series
    return [one._replace(label=one_line(label)) for one, label in zip(series, labels, strict=True)]


def _identities(runs: Sequence[Run]) -> list[str]:
    """Return a text per run that is equal for the runs of one series: their settings, without seeds in paths.

    If runs with different seeds use the same path, a number in it that equals a seed is not treated as a seed.
    """
    exact = [_identity(run, _values(run)) for run in runs]
    seeds = defaultdict[str, set[str]](set)
    for run, identity in zip(runs, exact, strict=True):
        seeds[identity].add(str(run.seed))
    return [
        identity if len(seeds[identity]) > 1 else _identity(run, settings(run))
        for run, identity in zip(runs, exact, strict=True)
    ]


def _identity(run: Run, values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True) if run.recipe else run.name


def settings(run: Run) -> dict[str, Any]:
    """Return the recipe's values by dotted key, with the run's seed in paths replaced.

    `runs/teacher-8-0` of a run with seed 0 becomes `runs/teacher-8-{train.seed}`.
    """
    seed = rf"(?<![\d.]){re.escape(str(run.seed))}(?=/|\Z)"  # a whole number at the end of a path's component
    last_seed = re.compile(f"{seed}(?!.*{seed})")
    return {
        key: last_seed.sub("{train.seed}", value) if isinstance(value, str) and "/" in value else value
        for key, value in _values(run).items()
    }


def _values(run: Run) -> dict[str, Any]:
    """Return the recipe's values by dotted key. A path in the current folder is the same if it is absolute."""
    here = f"{Path.cwd()}/"

    def relative(value: Any) -> Any:
        if isinstance(value, list):
            return [*map(relative, value)]
        return value.removeprefix(here) if isinstance(value, str) else value

    return {key: relative(value) for key, value in flatten(run.recipe, IGNORED_KEYS).items()}


def flatten(tree: Mapping[Any, Any], ignored: Sequence[str] = (), prefix: str = "") -> dict[str, Any]:
    """Return a recipe's values by dotted key, such as `data.corpora.0.kind` for a list of settings."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key, section = f"{prefix}{name}", value
        if key in ignored:
            continue
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            section = dict(enumerate(value))
        if isinstance(section, Mapping) and section:
            values |= flatten(section, ignored, f"{key}.")
        else:
            values[key] = value
    return values


def differences(series: Sequence[Series]) -> dict[str, list[Any]]:
    """Return the keys in which the series differ, with the value of each; None where a series has no such key."""
    return differing([settings(one.runs[0]) for one in series])


def differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys in which flat recipes differ, with the value of each; None where a recipe has no such key."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


class Band(NamedTuple):
    """A curve over the seeds of a series at S steps, [S] each. A run counts up to its own last step.

    At a step where a run has no value it is interpolated, but not from step 0.
    """

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats


def band(curves: Sequence[Curve]) -> Band | None:
    """Return the mean and range of C curves at all their steps, or None without a point.

    A curve counts from its first to its last step, interpolated on straight lines between its points. Between step 0
    and its next point it does not count, because it is steep there.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return None
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))  # [S]
    values = np.stack([curve.at(steps) for curve in curves])  # [C, S]
    first, last = np.array([[curve.steps[0], curve.steps[-1]] for curve in curves]).T[:, :, None]  # [C, 1] each
    in_training = np.array([[min(curve.steps[curve.steps > 0], default=np.inf)] for curve in curves])  # [C, 1]
    # Every step is a point of some curve, so that no column of the mask is empty.
    counts = ((in_training <= steps) & (steps <= last)) | ((first == 0) & (steps == 0))  # [C, S]
    mean = np.where(counts, values, 0).sum(axis=0) / counts.sum(axis=0)
    low, high = (np.where(counts, values, bound) for bound in (np.inf, -np.inf))
    return Band(steps, mean, low.min(axis=0), high.max(axis=0))


def smooth(curve: Curve, evaluations: int) -> Curve:
    """Return means over so many consecutive evaluations, at the mean of their steps; over all where there are fewer."""
    width = min(evaluations, len(curve.steps))
    if width <= 1:
        return curve
    return Curve(*(np.convolve(values, np.full(width, 1 / width), mode="valid") for values in curve))


def downsample(values: Floats, count: int) -> NDArray[np.int64]:
    """Return the indices of at most `count` values: the first, the last, and the extremes of each stretch between."""
    if len(values) <= count:
        return np.arange(len(values))
    kept = [0, len(values) - 1]
    for stretch in np.array_split(np.arange(len(values)), max(1, (count - 2) // 2)):  # two values of each, and the ends
        kept += [int(stretch[np.argmin(values[stretch])]), int(stretch[np.argmax(values[stretch])])]
    return np.unique(kept)


def _common_label(names: Sequence[str]) -> str:
    """Return the common ends of the names, without the number of the seed.

    For example `dense` for `dense-0` and `dense-1`, and `tuned-0.03` for `tuned-0-0.03` and `tuned-1-0.03`.
    """
    if len(names) == 1:
        return names[0]
    start = commonprefix(names)  # noqa: RUF071 (by characters)
    rests = [name[len(start) :] for name in names]
    if any(rest[:1].isdigit() for rest in rests):
        start = re.sub(r"\d+$", "", start)  # seeds 10 and 11 have a digit in common
    start = re.sub(r"[-_./= ]*(seed)?[-_./= ]*$", "", start)
    end = commonprefix([rest[::-1] for rest in rests])[::-1]  # noqa: RUF071
    end = re.sub(r"^[^-_/= ]*", "", end)  # seeds 10 and 20 have a digit in common
    return (start + end if start else end[1:]) or names[0]
