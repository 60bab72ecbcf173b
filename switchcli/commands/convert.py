"""`switchcli convert`: a checkpoint to or from the Hugging Face layout. No torch until it runs."""

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
        typer.Argument(help="A run's or checkpoint's folder, a Hugging Face folder or hub name.", show_default=False),
    ],
    destination: Destination,
    to: Annotated[Literal["switchcli", "huggingface"], typer.Option(help="The layout to write.", show_default=False)],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="The model's tokenizer.json or spiece.model, if SOURCE neither has nor names one.", show_default=False
        ),
    ] = None,
    revision: Annotated[str, typer.Option(help="Commit, tag or branch of a hub name.")] = "main",
    unpickle: Annotated[
        bool,
        typer.Option(
            "--unpickle",
            help="Read pytorch_model.bin too: a pickle, which can run code (read with weights_only=True).",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Into transformers' T5 or SwitchTransformers layout, or from it; whole or not at all."""
    with _exit.interruptible():
        from switchcli.runs import conversion

        console = Console(quiet=quiet)
        if to == "switchcli":
            result = conversion.to_switchcli(
                source, destination, tokenizer=tokenizer, revision=revision, unpickle=unpickle
            )
        else:
            given = {"--tokenizer": tokenizer is not None, "--revision": revision != "main", "--unpickle": unpickle}
            if names := [name for name, is_given in given.items() if is_given]:
                raise RecipeError(
                    f"{', '.join(names)}: of --to switchcli alone, and this is --to huggingface: leave it out"
                )
            result = conversion.to_huggingface(Path(source), destination, console)
        console.message(f"{result['parameters']:,} parameters in {destination}")
        if as_json:
            print_json(result)
