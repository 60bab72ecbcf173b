"""The verbs that make one checkpoint of another: convert, upcycle, prune. No torch until one runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from switchcli.commands import exit
from switchcli.commands.arguments import A_CHECKPOINT, Checkpoint, Destination, Json, Measured, Overrides, Quiet
from switchcli.report.console import Console
from switchcli.report.output import print_json

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
    with exit.stoppable():
        from switchcli.commands import convert

        console = Console(quiet=quiet)
        options = convert.Options(tokenizer, revision, unpickle)
        if to == "switchcli":
            result = convert.to_switchcli(source, destination, options)
        else:
            result = convert.to_huggingface(Path(source), destination, options, console)
        console.message(f"{result['parameters']:,} parameters in {destination}")
        if as_json:
            print_json(result)


@app.command()
def upcycle(
    dense: Annotated[Path, typer.Argument(help=f"A dense model. {A_CHECKPOINT}", show_default=False)],
    destination: Destination,
    experts: Annotated[int, typer.Option(help="Experts in each sparse layer.", show_default=False)],
    overrides: Overrides = None,
    gate: Annotated[
        Literal["scaled", "raw"],
        typer.Option(help="Make up for gates below 1, so that nothing is lost at first; or copy as it is."),
    ] = "scaled",
    noise: Annotated[
        float, typer.Option(help="Normal noise on each expert's weights, as a multiple of their root mean square.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of routers and noise.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A Switch model that begins where a dense one ended: experts are copies of its feed-forwards."""
    with exit.stoppable(saves_nothing=True):
        from switchcli.commands import upcycle

        options = upcycle.Options(experts, gate, noise, seed)
        console = Console(quiet=quiet)
        result = upcycle.upcycle(dense, destination, overrides or [], options, console)
        for line in upcycle.said(result):
            console.message(line)
        if as_json:
            print_json(result)


@app.command()
def prune(
    checkpoint: Checkpoint,
    destination: Destination,
    experts: Annotated[int, typer.Option(help="Experts that each sparse layer keeps.", show_default=False)],
    arguments: Measured = None,
    by: Annotated[
        Literal["drop", "merge"],
        typer.Option(help="Leave the others out, or average them into those whose router rows are most alike."),
    ] = "drop",
    gate: Annotated[
        Literal["scaled", "raw"], typer.Option(help="Make up for gates that rise among fewer experts, or do not.")
    ] = "scaled",
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Held-out rows of text, and examples of each task, to measure it on; absent: as the recipe says.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fewer experts, for serving: those that held-out text asks for least are taken out of each sparse layer."""
    with exit.stoppable(saves_nothing=True):
        from switchcli.commands import prune

        options = prune.Options(experts, by, gate, sequences)
        result = prune.prune(checkpoint, destination, arguments or [], options, Console(quiet=quiet))
        if as_json:
            print_json(result)
        else:
            prune.show(result)
