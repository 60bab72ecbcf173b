"""`switchcli audit`: repeat a part of a run's training and compare. Imports torch only when it runs."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from switchcli.commands._help import epilog
from switchcli.commands._options import Json, refuse_option
from switchcli.commands._result import Line, finish
from switchcli.errors import RecipeError
from switchcli.report.console import main_console

app = typer.Typer()

_VERDICTS = {
    "equal": "equal to the bit",
    "close": "losses within 0.01 nats, as expected with other hardware, threads or versions",
    "differs": "differs",
}
_STYLES = {"equal": "green", "close": "yellow", "differs": "bold red"}


@app.command(
    epilog=epilog(
        "how-to/audit-a-run",
        "switchcli audit runs/quickstart/switch",
        "switchcli audit runs/quickstart/switch --steps 600:800",
    )
)
def audit(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    segments: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of segments between kept checkpoints, chosen at random.")
    ] = 3,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="A:B",
            help="Repeat the steps after step A up to B; A is where the run began, mostly 0, or has a kept checkpoint.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Seed of the choice; by default nobody can foresee it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Repeat segments of a run from its checkpoints, recipe and data, and compare: bits, or losses elsewhere.

    A run that kept fewer than two checkpoints is repeated from the start for a twentieth of its steps, and its log is
    compared. The exit code is 1 if something differs.
    """
    from switchcli.runs.train import replay

    named = None
    if steps is not None:
        match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", steps)
        if match is None:
            raise RecipeError(f"--steps ({steps}): write two steps as A:B, such as 600:800")
        for name in ("segments", "seed"):
            refuse_option(context, name, "cannot be used with --steps, which names the segment: leave one out")
        named = replay.Segment(int(match[1]), int(match[2]))
    result = replay.audit(run, main_console(), segments=segments, steps=named, seed=seed)
    finish(result, as_json, _shown(result), exit_code=0 if result["sound"] else 1)


def _shown(result: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the findings, and the steps that were not checked."""
    drawn = "" if result["seed"] is None else f", segments by seed {result['seed']}"
    yield Line(f"{result['run']}{drawn}", "bold")
    for segment in result["segments"]:
        verdict, difference = segment["verdict"], segment["difference"]
        first, last = segment["segment"]
        compared = f"records: {segment['records']}, files of weights and optimizer state: {segment['tensor_files']}"
        yield Line(f"steps {first} to {last}: {_VERDICTS[verdict]} ({compared})", _STYLES[verdict])
        if difference:
            yield Line(f"  {difference}")
            if segment["machine_difference"]:
                yield Line(f"  {segment['machine_difference']}")
    gaps = ", ".join(f"{first} to {last}" for first, last in result["not_checked"])
    yield Line(f"not checked: steps {gaps}" if gaps else "all steps were checked")
