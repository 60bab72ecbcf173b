"""`switchcli doctor`: check a model's computation, or a checkpoint's files. Imports torch only when it runs."""

from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from switchcli.commands._options import A_CHECKPOINT, Json, Overrides, complete_recipes, epilog
from switchcli.commands._result import Line, finish
from switchcli.errors import CheckpointError, RecipeError
from switchcli.recipe import library
from switchcli.recipe.yaml_nodes import display_key
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import capitalize

if TYPE_CHECKING:
    from switchcli.doctor.diagnosis import Diagnosis
    from switchcli.doctor.subject import Subject

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
            autocompletion=complete_recipes,
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
    console = Console()
    if not Path(model).is_dir() or model in library.recipe_names():
        subject = _initial_model(model, overrides or [])
    elif overrides:
        raise RecipeError(
            f"{model}: an existing model takes no KEY=VALUE ({overrides[0].partition('=')[0]}): leave it out"
        )
    else:
        subject = diagnosis.open_subject(Path(model), console)
    diagnosed = diagnosis.diagnose(model, subject, console)
    finish(diagnosed.to_json(), as_json, _probe_lines(diagnosed), exit_code=0 if diagnosed.sound else 1)


def _initial_model(name: str, overrides: list[str]) -> "Subject":
    """Return the model of a recipe with its initial weights.

    Raises RecipeError for a broken recipe, and if there is neither a recipe nor a folder of that name.
    """
    from switchcli import api
    from switchcli.doctor.subject import initial_model
    from switchcli.runs.inputs.loading import on_the_hub

    try:
        path = library.locate(name)
    except RecipeError as error:
        if Path(name).exists():
            raise
        missing, hint = str(error).removeprefix(f"{display_key(name)}: "), on_the_hub(name)
        raise RecipeError(f"{name}: no such folder, and {missing}{hint and f' {capitalize(hint)}.'}") from error
    recipe = api.Recipe.load(path, overrides)
    if recipe.verb != "pretrain":
        raise RecipeError(f"{name}: a recipe of {recipe.verb}: doctor probes checkpoints, and recipes of pretrain")
    spec = recipe.spec
    return initial_model(spec.model, spec.train.seed, spec.train.router_dtype)


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
