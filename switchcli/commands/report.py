"""`switchcli report`: compare runs, or the routing of checkpoints. Imports torch only for the routing."""

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchcli.commands import _completion, _exit
from switchcli.commands._help import epilog
from switchcli.commands._options import Json, Quiet
from switchcli.errors import RecipeError
from switchcli.report.console import Console, print_json

if TYPE_CHECKING:
    from switchcli.report.html_page import HtmlTable
    from switchcli.report.run_report import Report

app = typer.Typer()


@app.command(
    epilog=epilog(
        "how-to/read-a-report",
        "switchcli report runs/quickstart/dense runs/quickstart/switch",
        "switchcli report --routing runs/quickstart/switch --html routing.html",
    )
)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN ...",
            help="Folders of runs. With --routing: one or two checkpoints, and KEY=VALUE as for `switchcli eval`.",
            autocompletion=_completion.checkpoints_and_overrides,
        ),
    ],
    routing: Annotated[
        bool,
        typer.Option(
            "--routing",
            help="Report which held-out tokens each expert of a checkpoint gets, and how two checkpoints differ.",
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with all charts to this file.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Write the charts as SVG, PNG and CSV files to this folder."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run to compare with. Default: the first.")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Value of the held-out metric that each run is timed to reach. Default: the baseline's last.",
        ),
    ] = None,
    smooth: Annotated[int, typer.Option(metavar="N", min=1, help="Number of evaluations in a running mean.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare runs by quality, speed-up, routing and throughput, as tables, an HTML page or charts."""
    with _exit.interruptible(saves_nothing=True):
        console = Console(quiet=quiet)
        if figures is not None:
            from switchcli.report.charts import require_renderer

            require_renderer()
        if routing:
            if (baseline, quality, smooth) != (None, None, 1):
                raise RecipeError("--routing reads only checkpoints: leave out --baseline, --quality and --smooth")
            _report_routing(runs, html, figures, as_json, console)
        else:
            from switchcli.runs.run_comparison import compare_runs

            folders = [*map(Path, runs)]
            comparison = compare_runs(folders, console, baseline=baseline, quality=quality, smooth=smooth)
            _report_runs(comparison, html, figures, as_json, console)


def _report_runs(
    comparison: "Report", html: Path | None, figures: Path | None, as_json: bool, console: Console
) -> None:
    """Write the page and the charts if their paths are not None. Print the tables or the JSON object on stdout."""
    from switchcli.report import run_report
    from switchcli.report.charts import write_files
    from switchcli.report.html_page import write_page

    if html is not None:
        write_page(html, run_report.title(comparison), run_report.parts(comparison))
    if figures is not None:
        write_files(run_report.every_figure(comparison), run_report.every_table(comparison), figures)
    if as_json:
        print_json(run_report.to_json(comparison))
    else:
        _show(run_report.tables(comparison))
    _say_written(html, figures, console)


def _report_routing(
    arguments: Sequence[str], html: Path | None, figures: Path | None, as_json: bool, console: Console
) -> None:
    """Measure the routing of `CHECKPOINT [CHECKPOINT] [KEY=VALUE ...]`, then write and print it like `_report_runs`."""
    from switchcli.report import routing_page, routing_tables
    from switchcli.report.charts import write_files
    from switchcli.report.html_page import write_page
    from switchcli.runs.routing_survey import survey_checkpoints

    overrides = [argument for argument in arguments if "=" in argument and not os.path.lexists(argument)]
    paths = [Path(argument) for argument in arguments if argument not in overrides]
    survey = survey_checkpoints(paths, overrides, console)
    if html is not None:
        write_page(html, routing_page.title(survey), routing_page.parts(survey))
    if figures is not None:
        write_files(routing_page.every_figure(survey), routing_page.token_tables(survey), figures)
    if as_json:
        print_json(survey)
    else:
        _show(routing_tables.tables(survey))
    _say_written(html, figures, console)


def _say_written(html: Path | None, figures: Path | None, console: Console) -> None:
    for path in (html, figures):
        if path is not None:
            console.message(f"wrote {path}")


def _show(tables: Iterable["HtmlTable"]) -> None:
    """Print the tables on stdout."""
    console = Console(stream=sys.stdout)
    for table in tables:
        console.rows(*table)
