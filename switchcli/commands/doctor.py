"""`switchcli doctor`: whether a Switch model is sound, and a checkpoint's files are whole. No torch until it runs."""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli.commands._options import Json, Overrides
from switchcli.errors import CheckpointError, RecipeError
from switchcli.report.console import Console, print_json

if TYPE_CHECKING:
    from switchcli.runs.diagnosis import Diagnosis

app = typer.Typer()

_STYLES = MappingProxyType({"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"})


@app.command()
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RECIPE",
            help="A run's folder, one checkpoint's, a Hugging Face folder; or a recipe, for its initial weights.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    checkpoint_files: Annotated[
        bool,
        typer.Option(
            "--checkpoint-files",
            help="Read the files of a checkpoint, or of all of a run, through instead: exit code 4 if one is damaged.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Is this Switch model sound? Router gradient, precision, padding, balance, dead experts; exit code 1 if not."""
    from switchcli.runs import diagnosis

    if checkpoint_files:
        if overrides:
            raise RecipeError(f"--checkpoint-files takes no KEY=VALUE ({overrides[0]}): leave it out")
        verified = diagnosis.verify(model)
        if as_json:
            print_json(verified)
        else:
            _show_files(verified)
        raise typer.Exit(0 if verified["whole"] else CheckpointError.exit_code)
    found = diagnosis.diagnose(model, overrides or [], Console())
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    if not found.sound:
        raise typer.Exit(1)


def _show(diagnosis: "Diagnosis") -> None:
    """Print a line for each probe on stdout, and below it what to do if the model did not pass."""
    console = Console(stream=sys.stdout)
    weights = "initial weights" if diagnosis.initialised else "trained weights"
    sparse = f"{diagnosis.layers} sparse layers of {diagnosis.experts} experts" if diagnosis.layers else "a dense model"
    console.message(f"{diagnosis.model}: {sparse}, {weights}, in the code of {diagnosis.code}", "bold")
    width = max(len(finding.probe) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        console.message(f"{finding.verdict}  {finding.probe:{width}}  {finding.figure}", _STYLES[finding.verdict])
        if finding.advice:
            console.message(f"{'':{6 + width + 2}}{finding.advice}")
    failed, warned = diagnosis.count("fail"), diagnosis.count("warn")
    ending = "sound" if diagnosis.sound else "not sound"
    console.message(f"{ending}: {failed} of {len(diagnosis.findings)} probes failed, {warned} with a warning", "bold")


def _show_files(verified: Mapping[str, Any]) -> None:
    """Print a line for each checkpoint on stdout, and which of them loading takes."""
    console, loaded = Console(stream=sys.stdout), verified["loaded"]
    for path, damage in verified["damage"].items():
        console.message(f"damaged  {damage}" if damage else f"whole    {path}", "bold red" if damage else "green")
    console.message(f"loading takes {loaded}" if loaded else "none is whole: loading refuses", "bold")
