"""Series: runs that differ by their seed alone, and their curves together: the mean, from least to most."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.report.runs import Curve, Floats, Run
from switchcli.report.safe_text import one_line

OF_NO_FIGURE = (
    *("description", "log", "checkpoint"),
    *("train.seed", "train.device", "train.workers", "train.batches_ahead"),
)
"""Keys of a recipe by which runs of one series may differ."""


class SeedSpread(NamedTuple):
    """A figure over the seeds of a series."""

    mean: float
    least: float
    most: float

    def text(self, form: str) -> str:
        """The mean, and what it lies between where it does."""
        if self.least == self.most:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} ({self.least:{form}} to {self.most:{form}})"


def seed_spread(values: Iterable[float | None]) -> SeedSpread | None:
    """Of the values that are known; None where none is."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return SeedSpread(float(np.mean(known)), min(known), max(known)) if known else None


class Band(NamedTuple):
    """A curve over the seeds of a series, at all steps that one of them has: of those that have come so far."""

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats


class Series(NamedTuple):
    """Runs of one recipe, in the order in which they were named."""

    label: str
    runs: tuple[Run, ...]

    @property
    def recipe(self) -> Mapping[str, Any]:
        return self.runs[0].recipe


def group_by_recipe(runs: Sequence[Run]) -> list[Series]:
    """The series of `runs`, in their order, each with a label of its own; an evaluation is one by itself.

    Of the loads only those of a series' first run are kept, which are drawn: they are most of what is held.
    """
    groups: dict[str, list[Run]] = {}
    for run, own in zip(runs, _own(runs), strict=True):
        members = groups.setdefault(own, [])
        members.append(run._replace(loads={}) if members else run)
    names = _names(runs)
    found: dict[str, Series] = {}
    for members in groups.values():
        label = _stem([names[run.name] for run in members])
        if label in found:
            label = names[members[0].name]
        while label in found:
            label += "'"
        found[label] = Series(label, tuple(members))
    return [*found.values()]


def _own(runs: Sequence[Run]) -> list[str]:
    """What the runs of one series have in common: their settings, but for the seed in the paths of other runs.

    Where several seeds name the very same path, a number in it that is one of them is no seed.
    """
    as_named = [_key(run, flatten(run.recipe, OF_NO_FIGURE)) for run in runs]
    seeds = defaultdict[str, set[str]](set)
    for run, own in zip(runs, as_named, strict=True):
        seeds[own].add(str(run.seed))
    return [own if len(seeds[own]) > 1 else _key(run, settings(run)) for run, own in zip(runs, as_named, strict=True)]


def _key(run: Run, values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True) if run.recipe else run.name


def settings(run: Run) -> dict[str, Any]:
    """What tells the run's recipe from others: `teacher-8-{train.seed}` for `teacher-8-0` in a path, where 0 is the
    run's seed."""
    number = rf"(?<![\d.]){re.escape(str(run.seed))}(?=/|\Z)"
    last = re.compile(f"{number}(?!.*{number})")
    return {
        key: last.sub("{train.seed}", value) if isinstance(value, str) and "/" in value else value
        for key, value in flatten(run.recipe, OF_NO_FIGURE).items()
    }


def flatten(tree: Mapping[Any, Any], without: Sequence[str] = (), path: str = "") -> dict[str, Any]:
    """A recipe's values by dotted key; those of a list of settings by their place in it."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        here = f"{path}{key}"
        inner = value
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            inner = dict(enumerate(value))
        if here in without:
            continue
        if isinstance(inner, Mapping) and inner:
            found |= flatten(inner, without, f"{here}.")
        else:
            found[here] = value
    return found


def differences(series: Sequence[Series]) -> dict[str, list[Any]]:
    """The keys that series differ in, with the value of each series; `None` where it has no such key."""
    trees = [settings(one.runs[0]) for one in series]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    values = {key: [tree.get(key) for tree in trees] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def band(curves: Sequence[Curve]) -> Band | None:
    """The mean of the curves on straight lines between their points, each from its first to its last step."""
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return None
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    values = np.stack([curve.at(steps) for curve in curves])
    ends = np.array([[curve.steps[0], curve.steps[-1]] for curve in curves])
    there = (ends[:, :1] <= steps) & (steps <= ends[:, 1:])
    some = there.any(axis=0)
    steps, values, there = steps[some], values[:, some], there[:, some]
    mean = np.where(there, values, 0).sum(axis=0) / there.sum(axis=0)
    least, most = (np.where(there, values, bound) for bound in (np.inf, -np.inf))
    return Band(steps, mean, least.min(axis=0), most.max(axis=0))


def smooth(curve: Curve, evaluations: int) -> Curve:
    """The mean over so many evaluations on end, at the mean of their steps; over all where there are fewer."""
    width = min(evaluations, len(curve.steps))
    if width <= 1:
        return curve
    return Curve(*(np.convolve(part, np.full(width, 1 / width), mode="valid") for part in curve))


def downsample(values: Floats, most: int) -> NDArray[np.int64]:
    """Places of at most `most` values: the first, the last, and the least and the most of each stretch between."""
    if len(values) <= most:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), max(1, (most - 2) // 2))
    places = [place for stretch in stretches for place in _extremes(values, stretch)]
    return np.unique([0, *places, len(values) - 1])


def _extremes(values: Floats, stretch: NDArray[np.int64]) -> tuple[int, int]:
    return int(stretch[np.argmin(values[stretch])]), int(stretch[np.argmax(values[stretch])])


def _names(runs: Sequence[Run]) -> dict[str, str]:
    """The last part of each folder's name, or the whole where two end alike."""
    last = {run.name: one_line(Path(run.name).name or run.name) for run in runs}
    return last if len(set(last.values())) == len(last) else {name: one_line(name) for name in last}


def _stem(names: Sequence[str]) -> str:
    """What the names begin with, without the number of the seed: `dense` of `dense-0` and `dense-1`."""
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    stem = "".join(letters[0] for letters in alike)
    if any(name[len(stem) :][:1].isdigit() for name in names):
        stem = re.sub(r"\d+$", "", stem)
    stem = re.sub(r"[-_./= ]*(seed)?[-_./= ]*$", "", stem)
    return stem or names[0]
