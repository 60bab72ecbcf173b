"""`switchcli doctor`: check a model's computation, or a checkpoint's files. Imports torch only when it runs."""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli.commands import _completion
from switchcli.commands._help import epilog
from switchcli.commands._options import A_CHECKPOINT, Json, Overrides
from switchcli.errors import CheckpointError, RecipeError
from switchcli.report.console import Console, print_json

if TYPE_CHECKING:
    from switchcli.runs.diagnosis import Diagnosis

app = typer.Typer()

_STYLES = MappingProxyType({"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"})


@app.command(
    epilog=epilog(
        "how-to/check-a-model",
        "switchcli doctor runs/quickstart/switch",
        "switchcli doctor runs/quickstart/switch --checkpoint-files",
    )
)
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RECIPE",
            help=f"{A_CHECKPOINT} Or a recipe, whose initial weights are checked.",
            autocompletion=_completion.recipes,
        ),
    ],
    overrides: Overrides = None,
    checkpoint_files: Annotated[
        bool,
        typer.Option(
            "--checkpoint-files",
            help="Verify the files of a checkpoint, or of all checkpoints of a run, instead. Exit code 4 if damaged.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check the computation of a model: router gradient, precision, padding, balance, dead experts.

    The exit code is 1 if a probe fails.
    """
    from switchcli.runs import diagnosis

    if checkpoint_files:
        if overrides:
            raise RecipeError(f"--checkpoint-files takes no KEY=VALUE ({overrides[0].partition('=')[0]}): leave it out")
        verified = diagnosis.verify(model)
        if as_json:
            print_json(verified)
        else:
            _show_files(verified)
        raise typer.Exit(0 if verified["complete"] else CheckpointError.exit_code)
    diagnosed = diagnosis.diagnose(model, overrides or [], Console())
    if as_json:
        print_json(diagnosed.to_json())
    else:
        _show_diagnosis(diagnosed)
    if not diagnosed.sound:
        raise typer.Exit(1)


def _show_diagnosis(diagnosis: "Diagnosis") -> None:
    """Print each probe on stdout, with advice below a probe that the model did not pass."""
    console = Console(stream=sys.stdout)
    weights = "initial weights" if diagnosis.initialized else "trained weights"
    sparse = f"{diagnosis.layers} sparse layers of {diagnosis.experts} experts" if diagnosis.layers else "a dense model"
    console.message(f"{diagnosis.model}: {sparse}, {weights}, in the code of {diagnosis.code}", "bold")
    width = max(len(finding.probe) for finding in diagnosis.findings)
    indent = len("pass  ") + width + len("  ")
    for finding in diagnosis.findings:
        console.message(f"{finding.verdict}  {finding.probe:{width}}  {finding.measured}", _STYLES[finding.verdict])
        if finding.advice:
            console.message(f"{'':{indent}}{finding.advice}")
    failed, warned = diagnosis.count("fail"), diagnosis.count("warn")
    conclusion = "sound" if diagnosis.sound else "not sound"
    probes = f"{failed} of {len(diagnosis.findings)} probes failed, {warned} with a warning"
    console.message(f"{conclusion}: {probes}", "bold")


def _show_files(verified: Mapping[str, Any]) -> None:
    """Print the state of each checkpoint on stdout, and which of them loading takes."""
    console = Console(stream=sys.stdout)
    loaded = verified["loaded"]
    for path, damage in verified["damage"].items():
        console.message(f"damaged  {damage}" if damage else f"complete {path}", "bold red" if damage else "green")
    console.message(f"loading takes {loaded}" if loaded else "none is complete: loading refuses", "bold")
