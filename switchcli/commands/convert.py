"""`switchcli convert`: a checkpoint to or from the Hugging Face layout. Imports torch only when it runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from switchcli.commands import _exit
from switchcli.commands._options import Destination, Json, Quiet
from switchcli.errors import RecipeError
from switchcli.report.console import Console, print_json

app = typer.Typer()


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A run's folder, a checkpoint's folder, a Hugging Face folder, or a name on the hub."),
    ],
    destination: Destination,
    to: Annotated[Literal["switchcli", "huggingface"], typer.Option(help="The layout to write.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="The model's tokenizer.json or spiece.model, if SOURCE neither holds nor names one."),
    ] = None,
    revision: Annotated[str, typer.Option(help="Commit, tag or branch of a name on the hub.")] = "main",
    unpickle: Annotated[
        bool,
        typer.Option(
            "--unpickle",
            help="Also read pytorch_model.bin, a pickle, which can run code (it is read with weights_only=True).",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to or from the T5 or SwitchTransformers layout of transformers, completely or not at all."""
    with _exit.interruptible():
        from switchcli.runs import conversion

        console = Console(quiet=quiet)
        if to == "switchcli":
            result = conversion.to_switchcli(
                source, destination, tokenizer=tokenizer, revision=revision, unpickle=unpickle
            )
        else:
            is_set = {"--tokenizer": tokenizer is not None, "--revision": revision != "main", "--unpickle": unpickle}
            if unused := [option for option in is_set if is_set[option]]:
                raise RecipeError(
                    f"{', '.join(unused)}: only for --to switchcli, and this is --to huggingface: leave it out"
                )
            result = conversion.to_huggingface(Path(source), destination, console)
        console.message(f"{result['parameters']:,} parameters in {destination}")
        if as_json:
            print_json(result)
