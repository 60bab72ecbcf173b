"""`switchcli report`: runs compared, or the routing of checkpoints. No torch until that one is asked for."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchcli.commands import _exit
from switchcli.commands._options import Json, Quiet
from switchcli.errors import RecipeError
from switchcli.report.console import Console, print_json

if TYPE_CHECKING:
    from switchcli.report.html_page import HtmlTable
    from switchcli.report.run_report import Report

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN ...",
            help="Folders of runs; with --routing one checkpoint, or two, and KEY=VALUE as of `switchcli eval`.",
            show_default=False,
        ),
    ],
    routing: Annotated[
        bool,
        typer.Option(
            "--routing", help="What each expert of a checkpoint takes, on its held-out text; of two, how they differ."
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with all figures.", show_default=False)] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as SVG, PNG and CSV.", show_default=False)
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help="What to compare with; the first when absent.")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(metavar="FIGURE", help="What is to be reached; absent: what the baseline ends with."),
    ] = None,
    smooth: Annotated[int, typer.Option(min=1, help="Take means over so many evaluations.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare runs: quality, speed-up, routing, rates; as tables, as a page, as figures."""
    with _exit.interruptible(saves_nothing=True):
        console = Console(quiet=quiet)
        if figures is not None:
            from switchcli.report.charts import require_renderer

            require_renderer()
        if routing:
            if (baseline, quality, smooth) != (None, None, 1):
                raise RecipeError("--routing looks at checkpoints alone: leave out --baseline, --quality and --smooth")
            _report_routing(runs, html, figures, as_json, console)
        else:
            from switchcli.runs.run_comparison import compare_runs

            folders = [*map(Path, runs)]
            found = compare_runs(folders, console, baseline=baseline, quality=quality, smooth=smooth)
            _report_runs(found, html, figures, as_json)


def _report_runs(found: "Report", html: Path | None, figures: Path | None, as_json: bool) -> None:
    """Write the page and the figures that are asked for, and print the tables or the JSON object on stdout."""
    from switchcli.report import run_report
    from switchcli.report.charts import write_files
    from switchcli.report.html_page import write_page

    if html is not None:
        write_page(html, run_report.title(found), run_report.parts(found))
    if figures is not None:
        write_files(run_report.every_figure(found), run_report.every_table(found), figures)
    if as_json:
        print_json(run_report.to_json(found))
    else:
        _show(run_report.tables(found))


def _report_routing(
    arguments: Sequence[str], html: Path | None, figures: Path | None, as_json: bool, console: Console
) -> None:
    """Measure the routing of `CHECKPOINT [CHECKPOINT] [KEY=VALUE ...]`, and write and print it as `_report_runs`."""
    from switchcli.report import routing_page, routing_tables
    from switchcli.report.charts import write_files
    from switchcli.report.html_page import write_page
    from switchcli.runs.routing_survey import survey_checkpoints

    overrides = [one for one in arguments if "=" in one and not Path(one).is_dir()]
    paths = [Path(one) for one in arguments if one not in overrides]
    survey = survey_checkpoints(paths, overrides, console)
    if html is not None:
        write_page(html, routing_page.title(survey), routing_page.parts(survey))
    if figures is not None:
        write_files(routing_page.every_figure(survey), routing_page.token_tables(survey), figures)
    if as_json:
        print_json(survey)
    else:
        _show(routing_tables.tables(survey))


def _show(tables: Iterable["HtmlTable"]) -> None:
    console = Console(stream=sys.stdout)
    for table in tables:
        console.rows(*table)
