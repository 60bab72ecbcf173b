"""`switchcli convert`: a checkpoint to or from another layout. Imports torch only when it runs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from switchcli.commands import _exit
from switchcli.commands._options import Destination, Json, Quiet, epilog, refuse_option
from switchcli.commands._result import finish
from switchcli.errors import RecipeError
from switchcli.terminal.console import Console

app = typer.Typer()

_LAYOUTS: Final[Mapping[str, str]] = {
    "tokenizer": "switchcli",
    "revision": "switchcli",
    "unpickle": "switchcli",
    "license_": "huggingface",
}
"""The layout for which each option has a meaning."""
_LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@app.command(
    epilog=epilog(
        "how-to/transformers",
        "switchcli convert runs/quickstart/switch served --to huggingface",
        "switchcli convert google/switch-base-8 base-8 --to switchcli --unpickle",
    )
)
@_exit.interruptible()
def convert(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(help="A run's folder, a checkpoint's folder, a Hugging Face folder, or a name on the hub."),
    ],
    destination: Destination,
    to: Annotated[
        Literal["switchcli", "huggingface", "hf"],
        typer.Option(metavar="LAYOUT", help="The layout to write: switchcli, or huggingface (hf for short)."),
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The model's tokenizer.json or spiece.model, if SOURCE neither holds nor names one.",
        ),
    ] = None,
    revision: Annotated[str, typer.Option(metavar="NAME", help="Commit, tag or branch of a name on the hub.")] = "main",
    unpickle: Annotated[
        bool,
        typer.Option(
            "--unpickle",
            help="Also read pytorch_model.bin, a pickle, which can run code (it is read with weights_only=True).",
        ),
    ] = False,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="NAME",
            help="License for the model card, by its identifier on the hub, such as apache-2.0.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to or from the layout of transformers, completely or not at all."""
    from switchcli.runs.models import conversion

    layout = "huggingface" if to == "hf" else to
    for name, needed in _LAYOUTS.items():
        if layout != needed:
            refuse_option(context, name, f"only for --to {needed}, and this is --to {layout}: leave it out")
    if Path(source).exists():
        refuse_option(context, "revision", f"only for a name on the hub, and {source} is a folder: leave it out")
    if license_ is not None and not _LICENSE.fullmatch(license_):
        raise RecipeError(f"--license ({license_}): give an identifier of the hub, such as apache-2.0 or cc-by-4.0")
    console = Console(quiet=quiet)
    if layout == "switchcli":
        result = conversion.to_switchcli(
            source, destination, console, tokenizer=tokenizer, revision=revision, unpickle=unpickle
        )
    else:
        result = conversion.to_huggingface(Path(source), destination, console, license_)
    console.message(f"{result['parameters']:,} parameters in {destination}")
    finish(result, as_json)
