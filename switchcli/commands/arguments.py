"""Arguments and options that several verbs have, with their help."""

from pathlib import Path
from typing import Annotated

import typer

A_CHECKPOINT = "A run's folder, one checkpoint's, or a Hugging Face folder."
Checkpoint = Annotated[Path, typer.Argument(help=A_CHECKPOINT, show_default=False)]
Destination = Annotated[Path, typer.Argument(help="The new folder.", show_default=False)]
Recipe = Annotated[str, typer.Argument(help="A file, or the name of a recipe that ships.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Keys to set, by dotted path.", show_default=False)
]
Measured = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE ...]",
        help=r"What to measure, such as tasks=\[rte]; absent: what the checkpoint was trained on.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="What to start from: a run's folder, one checkpoint's, or a Hugging Face folder.",
        show_default=False,
    ),
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; runs/RECIPE when absent.", show_default=False)]
Resume = Annotated[bool, typer.Option(help="Go on with the run in the folder, or set it aside and begin anew.")]
Processes = Annotated[int, typer.Option(min=1, help="Ranks to start on this machine.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what the recipe comes to, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")]
