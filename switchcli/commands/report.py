"""`switchcli report`: compare runs, and the routing of a checkpoint. Imports torch only for the routing."""

from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands._options import Json, Quiet, epilog
from switchcli.commands._result import finish
from switchcli.recipe import library
from switchcli.terminal.console import Console

app = typer.Typer()


@app.command(
    epilog=epilog(
        "how-to/read-a-report",
        "switchcli report runs/quickstart/dense runs/quickstart/switch",
        "switchcli report --routing runs/quickstart/switch --html report.html",
    )
)
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN ...",
            help="Folders of runs. With --routing: runs or checkpoints, one of them with experts, and KEY=VALUE as for "
            "`switchcli eval`.",
        ),
    ],
    routing: Annotated[
        bool,
        typer.Option("--routing", help="Add which held-out tokens each expert gets."),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with all charts to this file.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Write the charts as SVG, PNG and CSV files to this folder."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The run to compare with. Default: the first complete one.")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            min=0.0,
            help="Value of the held-out metric that each run is timed to reach. Default: the baseline's last.",
        ),
    ] = None,
    smooth: Annotated[int, typer.Option(metavar="N", min=1, help="Number of evaluations in a running mean.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare runs by quality, speed-up, routing and throughput, as tables, an HTML page or charts."""
    from switchcli.report import run_report
    from switchcli.report.charts import require_renderer, write_files
    from switchcli.report.html_page import write_page
    from switchcli.report.run_comparison import compare_runs
    from switchcli.report.run_report import Report

    console = Console(quiet=quiet)
    if figures is not None:
        require_renderer()
    folders = [*map(Path, runs)]
    if routing:
        overrides = [argument for argument in runs if library.is_override(argument)]
        checkpoints = [Path(argument) for argument in runs if argument not in overrides]
        # A checkpoint that is no run, such as a converted one, has no metrics to compare.
        folders = [path for path in checkpoints if (path / "metrics.jsonl").is_file()]
    report = Report()
    if folders or baseline is not None or not routing:
        report = compare_runs(folders, console, baseline=baseline, quality=quality, smooth=smooth)
    if routing:
        from switchcli.report.routing_survey import survey_routing

        report = report._replace(routing=survey_routing(checkpoints, overrides, console))
    parts = [*run_report.parts(report)] if html is not None or figures is not None else []
    if html is not None:
        write_page(html, run_report.title(report), parts)
    if figures is not None:
        drawn = [figure for part in parts for figure in part.figures]
        write_files(drawn, run_report.every_table(report), figures)
    finish(run_report.to_json(report), as_json, run_report.tables(report))
    for path in (html, figures):
        if path is not None:
            console.message(f"wrote {path}")
