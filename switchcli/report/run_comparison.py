"""Read runs with their recipes, and compare them. Imports no torch."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from switchcli.errors import CheckpointError, RecipeError
from switchcli.recipe import yaml_nodes
from switchcli.report import task_results
from switchcli.report.comparison import compare, named_keys
from switchcli.report.run_report import Report
from switchcli.report.runs import Run, read
from switchcli.report.series import Series, group_by_recipe
from switchcli.system import publish
from switchcli.terminal.console import Console


def compare_runs(
    folders: Sequence[Path],
    console: Console,
    *,
    baseline: Path | None = None,
    quality: float | None = None,
    smooth: int = 1,
) -> Report:
    """Compare the runs in the folders. A folder or file that cannot be read is skipped with a warning, which is a note.

    So is a run that another one of them replaced (`a.before-1` beside `a`, as `runs/*` names them) and that is not the
    baseline.

    `baseline` is the run to compare with, the first complete one if None. Each run is timed to reach `quality`, the
    last value of the baseline if None, in a running mean over `smooth` evaluations.

    Raises:
        CheckpointError: none of the folders is a run.
        RecipeError: a folder does not exist, or the baseline is not among the runs.
    """
    # A link to nothing is there: it may come from `runs/*`.
    if missing := [folder for folder in folders if not os.path.lexists(folder)]:
        raise RecipeError(*(f"{folder}: no such folder" for folder in missing))
    by_real_path: dict[str, Path] = {}  # a folder that is named twice is one run
    for folder in folders:
        by_real_path.setdefault(os.path.realpath(folder), folder)
    skipped = [*_leave_out_archived(by_real_path, baseline)]
    files = [path for path in by_real_path.values() if path.is_file()]
    runs = []
    for path in by_real_path.values():
        run = None if path in files else _read(path, skipped)
        if run is not None:
            runs.append(run)
    for note in skipped:
        console.warning(note)
    if not runs:
        for file in files:  # ignored if there are runs, because `runs/*` names log files too
            console.warning(f"{file}: is no run: it is a file")
        raise CheckpointError(
            "none of the folders is a run: name some that `switchcli pretrain`, `finetune`, `distill` or `eval` wrote"
        )
    all_series = group_by_recipe(runs)
    trained = [series for series in all_series if series.runs[0].verb != "eval"]
    evaluations = [series for series in all_series if series not in trained]
    baseline_name = None if baseline is None else _baseline_name(baseline, by_real_path, trained)
    comparison = compare(trained, baseline_name, quality, smooth) if trained else None
    report = Report(comparison, evaluations, ())
    notes = [note for run in runs for note in run.notes]
    if not task_results.by_tokens(report.runs_by_label):
        notes.append(
            "Held-out texts of runs or evaluations whose tokenizers differ, or are not known, are compared only by "
            "bits per byte."
        )
    if keys := task_results.differing_settings([series.runs[0] for series in evaluations]):
        notes.append(f"The evaluations differ in {named_keys(keys)}: their metrics can hardly be compared.")
    if comparison is not None:
        notes = [*comparison.notes, *notes]
    for note in notes:
        console.warning(note)
    return report._replace(notes=[*notes, *skipped])


def _leave_out_archived(by_real_path: dict[str, Path], baseline: Path | None) -> Iterator[str]:
    """Remove archived runs whose successor is there too, and yield a note on each."""
    for path, folder in [*by_real_path.items()]:
        successor = by_real_path.get(publish.replaced_by(path), folder)
        if successor != folder and (baseline is None or path != os.path.realpath(baseline)):
            del by_real_path[path]
            yield (
                f"{folder}: was replaced by {successor}: left out; name it by --baseline to compare the two, or leave "
                f"{successor} out"
            )


def _baseline_name(baseline: Path, by_real_path: Mapping[str, Path], trained: Sequence[Series]) -> str:
    """Return the name of the baseline among the runs, where it may have another path to the same folder."""
    names = [run.name for series in trained for run in series.runs]
    if not names:
        raise RecipeError(f"--baseline {baseline}: there is nothing to compare: all folders are evaluations")
    name = str(by_real_path.get(os.path.realpath(baseline), baseline))
    if name not in names:
        raise RecipeError(f"--baseline {baseline}: is none of the runs: name one of {', '.join(names)}")
    return name


def _read(folder: Path, notes: list[str]) -> Run | None:
    """Return the run in the folder. Without a readable recipe it has an empty one. None if it is no run.

    What is wrong with the folder is appended to `notes`.
    """
    try:
        recipe = _recipe(folder / "recipe.yaml")
    except RecipeError as error:
        notes.append(f"{error}: the recipe is left out")
        recipe = {}
    try:
        return read(folder, recipe)
    except CheckpointError as error:
        notes.append(str(error))
        return None


def _recipe(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    recipe = yaml_nodes.plain(yaml_nodes.read_file(path))
    return recipe if isinstance(recipe, Mapping) else {}
