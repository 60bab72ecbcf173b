"""The runs in folders, read with their recipes and compared. No torch is imported."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchcli.errors import CheckpointError, RecipeError
from switchcli.recipe import yaml_nodes
from switchcli.report import task_results
from switchcli.report.comparison import compare
from switchcli.report.console import Console
from switchcli.report.run_report import Report
from switchcli.report.runs import Run, read
from switchcli.report.series import Series, group_by_recipe


def compare_runs(
    folders: Sequence[Path],
    console: Console,
    *,
    baseline: Path | None = None,
    quality: float | None = None,
    smooth: int = 1,
) -> Report:
    """Compare the runs in the folders. A folder or file that cannot be read is left out, with a warning.

    The runs are compared with the `baseline`, the first when None, for how soon they reach a `quality`, that which the
    baseline ends with when None, by means over `smooth` evaluations.

    Raises:
        CheckpointError: none of them is a run.
        RecipeError: the baseline is none of them.
    """
    once: dict[str, Path] = {}
    for folder in folders:
        once.setdefault(os.path.realpath(folder), folder)
    files = [folder for folder in once.values() if folder.is_file()]
    runs = [run for folder in once.values() if folder not in files and (run := _read(folder, console)) is not None]
    if not runs:
        for file in files:  # beside runs they are passed over: `runs/*` names logs too
            console.warning(f"{file}: is no run: it is a file")
        raise CheckpointError(
            "none of the folders is a run: name some that `switchcli pretrain`, `finetune`, `distill` or `eval` wrote"
        )
    every = group_by_recipe(runs)
    trained = [one for one in every if one.runs[0].verb != "eval"]
    base = None if baseline is None else _baseline(baseline, once, trained)
    comparison = compare(trained, base, quality, smooth) if trained else None
    found = Report(comparison, [one for one in every if one not in trained], ())
    notes = [note for run in runs for note in run.notes]
    if not task_results.by_tokens(found.runs_by_label):
        notes.append(
            "Held-out texts of runs or evaluations whose tokenizers differ, or are not known, are compared by bits a "
            "byte alone."
        )
    if comparison is not None:
        notes = [*comparison.notes, *notes]
    for note in notes:
        console.warning(note)
    return found._replace(notes=notes)


def _baseline(said: Path, once: Mapping[str, Path], trained: Sequence[Series]) -> str:
    """The name of the run that is meant, by whatever path."""
    names = [run.name for one in trained for run in one.runs]
    if not names:
        raise RecipeError(f"--baseline {said}: there is nothing to compare: the folders are evaluations alone")
    name = str(once.get(os.path.realpath(said), said))
    if name not in names:
        raise RecipeError(f"--baseline {said}: is none of the runs: name one of {', '.join(names)}")
    return name


def _read(folder: Path, console: Console) -> Run | None:
    try:
        recipe = _recipe(folder / "recipe.yaml")
    except RecipeError as error:
        console.warning(f"{error}: the recipe is left out")
        recipe = {}
    try:
        return read(folder, recipe)
    except CheckpointError as error:
        console.warning(str(error))
        return None


def _recipe(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    found = yaml_nodes.plain(yaml_nodes.read_file(path))
    return found if isinstance(found, Mapping) else {}
