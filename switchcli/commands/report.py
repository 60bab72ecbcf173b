"""`switchcli report`: the runs in folders, compared: a table, a page, files of figures. No torch: it starts at once."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli import publish
from switchcli.errors import CheckpointError, RecipeError, disk_errors
from switchcli.recipe import yaml_nodes
from switchcli.report import charts, evidence, task_results
from switchcli.report.charts import Figure, Table
from switchcli.report.comparison import compare
from switchcli.report.console import Console
from switchcli.report.evidence import Report
from switchcli.report.html_page import Part, page
from switchcli.report.runs import Run, read
from switchcli.report.series import Series, differences, grouped


class Options(NamedTuple):
    """The options of `switchcli report`."""

    baseline: Path | None = None
    quality: float | None = None
    smooth: int = 1


def report(folders: Sequence[Path], options: Options, console: Console) -> Report:
    """What the folders hold; what cannot be read is warned of, and left out.

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
    every = grouped(runs)
    trained = [one for one in every if one.runs[0].verb != "eval"]
    base = None if options.baseline is None else _baseline(options.baseline, once, trained)
    comparison = compare(trained, base, options.quality, options.smooth) if trained else None
    found = Report(comparison, [one for one in every if one not in trained], ())
    notes = [note for run in runs for note in run.notes]
    if not task_results.by_tokens(found.holders):
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


def show(found: Report) -> None:
    """The tables on stdout, for people."""
    console = Console(stream=sys.stdout)
    for table in evidence.tables(found):
        console.rows(*table)


def to_json(found: Report) -> dict[str, Any]:
    """For scripts."""
    comparison = found.comparison
    rows = [] if comparison is None else [row.to_json() for row in comparison.rows]
    tables = {one.name: one.to_json() for one in evidence.scored(found)}
    named: dict[str, Any] = {}
    if comparison is not None:
        named = {
            "baseline": comparison.baseline.label,
            "measure": comparison.measure.figure,
            "common_step": comparison.common_step,
            "differences": {
                key: dict(zip([one.label for one in comparison.series], _json(values), strict=True))
                for key, values in differences(comparison.series).items()
            },
        }
    return {**named, "series": rows, "tables": tables, "notes": [*found.notes]}


def _json(values: Sequence[Any]) -> Any:
    """As JSON has them: what is no finite number is written out."""
    return json.loads(json.dumps(values), parse_constant=str)


def write_html(found: Report, file: Path) -> None:
    """The page."""
    counts = {"run": len(found.trained), "evaluation": len(found.evaluations)}
    said = [f"{count} {what}{'s' if count > 1 else ''}" for what, count in counts.items() if count]
    if found.comparison is not None and len(found.comparison.series) > 1:
        said[0] += f" in {len(found.comparison.series)} series"
    write_page(file, f"switchcli report: {', '.join(said)}", evidence.parts(found))


def write_figures(found: Report, folder: Path) -> None:
    """Each figure as of `write_each`; the table of all series as runs.csv, what their recipes differ in as
    recipes.csv, and the scores as tasks.csv, texts_neg_log_perplexity.csv and texts_bits_per_byte.csv."""
    tables = [one.table() for one in evidence.scored(found)]
    if found.comparison is not None:
        rows = [row.flat() for row in found.comparison.rows]
        tables.append(Table("runs", {key: [row[key] for row in rows] for key in rows[0]}))
        tables.append(evidence.difference_file(found.comparison))
    write_each(evidence.every_figure(found), tables, folder)


def write_page(file: Path, title: str, parts: Iterable[Part]) -> None:
    """Publish one page; its folder is made."""
    text = page(title, parts)
    with disk_errors(file, "give another file by --html"):
        file.parent.mkdir(parents=True, exist_ok=True)
        publish.write_file(file, text)


def write_each(figures: Iterable[Figure], tables: Iterable[Table], folder: Path) -> None:
    """Publish each figure as NAME.svg and NAME.png, its numbers and each further table as NAME.csv.

    Figures of one table share a file: held_out.csv for held_out_steps, _tokens, _wall_time and _flops, training.csv for
    training_steps and so on. No file is replaced before all are written.
    """
    contents: dict[str, str | bytes] = {}
    with disk_errors(folder, "give another folder by --figures"):  # before figures are drawn, which takes seconds
        folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        contents[f"{figure.name}.svg"] = charts.svg(figure)
        contents[f"{figure.name}.png"] = charts.png(figure)
        contents[f"{figure.table.name}.csv"] = figure.table.csv()
    contents |= {f"{table.name}.csv": table.csv() for table in tables}
    with disk_errors(folder, "give another folder by --figures"):
        publish.write_files(folder, contents)
