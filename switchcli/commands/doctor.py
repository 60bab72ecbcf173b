"""`switchcli doctor`: check a model's computation, or a checkpoint's files. Imports torch only when it runs."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from switchcli.commands import _completion
from switchcli.commands._help import epilog
from switchcli.commands._options import A_CHECKPOINT, Json, Overrides
from switchcli.commands._result import Line, finish
from switchcli.errors import CheckpointError, RecipeError
from switchcli.terminal.console import Console

if TYPE_CHECKING:
    from switchcli.doctor.diagnosis import Diagnosis

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
    from switchcli.doctor import diagnosis

    if checkpoint_files:
        if overrides:
            raise RecipeError(f"--checkpoint-files takes no KEY=VALUE ({overrides[0].partition('=')[0]}): leave it out")
        verified = diagnosis.verify(model)
        exit_code = 0 if verified["complete"] else CheckpointError.exit_code
        lines = [
            Line(f"damaged  {damage}", "bold red") if damage else Line(f"complete {path}", "green")
            for path, damage in verified["damage"].items()
        ]
        loaded = verified["loaded"]
        lines.append(Line(f"loading takes {loaded}" if loaded else "none is complete: loading refuses", "bold"))
        finish(verified, as_json, lines, exit_code=exit_code)
        return
    diagnosed = diagnosis.diagnose(model, overrides or [], Console())
    finish(diagnosed.to_json(), as_json, _probe_lines(diagnosed), exit_code=0 if diagnosed.sound else 1)


def _probe_lines(diagnosis: "Diagnosis") -> Iterator[Line]:
    """Yield a line for each probe, with advice below a probe that the model did not pass."""
    weights = "initial weights" if diagnosis.initialized else "trained weights"
    sparse = f"{diagnosis.layers} sparse layers of {diagnosis.experts} experts" if diagnosis.layers else "a dense model"
    yield Line(f"{diagnosis.model}: {sparse}, {weights}", "bold")
    width = max(len(finding.probe) for finding in diagnosis.findings)
    indent = len("pass  ") + width + len("  ")
    for finding in diagnosis.findings:
        yield Line(f"{finding.verdict}  {finding.probe:{width}}  {finding.measured}", _STYLES[finding.verdict])
        if finding.advice:
            yield Line(f"{'':{indent}}{finding.advice}")
    failed, warned = diagnosis.count("fail"), diagnosis.count("warn")
    conclusion = "sound" if diagnosis.sound else "not sound"
    probes = f"{failed} of {len(diagnosis.findings)} probes failed, {warned} with a warning"
    yield Line(f"{conclusion}: {probes}", "bold")
