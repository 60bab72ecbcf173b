"""`switchcli prune`: a trained model with fewer experts. Imports torch only when it runs."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from switchcli.commands import _exit
from switchcli.commands._help import epilog
from switchcli.commands._options import Checkpoint, Destination, EvalArguments, Json, Quiet, split_arguments
from switchcli.report.console import Console, print_json

app = typer.Typer()


@app.command(
    epilog=epilog(
        "how-to/upcycle-and-prune",
        "switchcli prune runs/quickstart/switch runs/small --experts 4",
        "switchcli prune runs/quickstart/switch runs/small --experts 4 --by merge",
    )
)
def prune(
    checkpoint: Checkpoint,
    destination: Destination,
    experts: Annotated[int, typer.Option(metavar="N", help="Number of experts that each sparse layer keeps.")],
    arguments: EvalArguments = None,
    by: Annotated[
        Literal["drop", "merge"],
        typer.Option(
            metavar="drop|merge",
            help="Drop the other experts, or average each into the one with the most similar router row.",
        ),
    ] = "drop",
    gate: Annotated[
        Literal["scaled", "raw"],
        typer.Option(
            metavar="scaled|raw",
            help="Scale wo to correct for gates that rise among fewer experts, or leave it.",
        ),
    ] = "scaled",
    sequences: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of held-out rows of text, and of examples per task, to measure on. Default: the recipe's.",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove the experts that held-out text uses least from each sparse layer, to serve a smaller model."""
    with _exit.interruptible(saves_nothing=True):
        from switchcli.runs import pruning

        recipe, overrides = split_arguments(arguments or [])
        result = pruning.prune(
            checkpoint,
            destination,
            recipe,
            overrides,
            Console(quiet=quiet),
            experts=experts,
            by=by,
            gate=gate,
            sequences=sequences,
        )
        if as_json:
            print_json(result)
        else:
            _show(result)


def _show(result: Mapping[str, Any]) -> None:
    """Print the metrics before and after, and the tokens that each layer lost, on stdout."""
    from switchcli.report.program import program_name

    console = Console(stream=sys.stdout)
    headings = ("", "before", "after")
    rows = [[name, *(f"{result[name][when]:,}" for when in headings[1:])] for name in ("experts", "parameters")]
    for name, held_out in result["held_out"].items():
        rows.append([f"loss of {name}", *(f"{-held_out[when]:.4f}" for when in headings[1:])])
    console.rows(f"{result['destination']}: by {result['by']}, capacity {result['capacity']}", headings, rows)
    layer_rows = [
        [name, f"{layer['lost_fraction']:.1%}", f"{layer['wo']:.3f}", " ".join(map(str, layer["kept"]))]
        for name, layer in result["layers"].items()
    ]
    console.rows("tokens whose expert was removed", ("layer", "share", "wo times", "kept"), layer_rows)
    console.message()
    console.message("Next:")
    console.message(f"  {program_name()} {result['next']}")
