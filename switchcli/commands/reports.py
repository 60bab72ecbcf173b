"""The verb report: runs compared, or the routing of checkpoints. No torch until that one is asked for."""

from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands import exit
from switchcli.commands.arguments import Json, Quiet
from switchcli.errors import RecipeError
from switchcli.report.console import Console
from switchcli.report.output import print_json

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
    with exit.stoppable(saves_nothing=True):
        from switchcli.commands import report

        options = report.Options(baseline, quality, smooth)
        if routing:
            _routing(runs, options == report.Options(), html, figures, as_json, Console(quiet=quiet))
            return
        found = report.report([*map(Path, runs)], options, Console(quiet=quiet))
        if html is not None:
            report.write_html(found, html)
        if figures is not None:
            report.write_figures(found, figures)
        if as_json:
            print_json(report.to_json(found))
        else:
            report.show(found)


def _routing(
    arguments: list[str], alone: bool, html: Path | None, figures: Path | None, as_json: bool, console: Console
) -> None:
    if not alone:
        raise RecipeError("--routing looks at checkpoints alone: leave out --baseline, --quality and --smooth")
    from switchcli.commands import routing

    survey = routing.surveyed(arguments, console)
    if html is not None:
        routing.write_html(survey, html)
    if figures is not None:
        routing.write_figures(survey, figures)
    if as_json:
        print_json(survey)
    else:
        routing.show(survey)
