"""`switchcli prune`: a trained model with fewer experts. No torch until it runs."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from switchcli.commands import _exit
from switchcli.commands._options import Checkpoint, Destination, Json, Measured, Quiet, split_arguments
from switchcli.report.console import Console, print_json

app = typer.Typer()


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
    """Print the figures before and after, and what each layer has lost, on stdout."""
    from switchcli.runs.run_dir import program_name

    console = Console(stream=sys.stdout)
    headings = ("", "before", "after")
    rows = [[name, *(f"{result[name][when]:,}" for when in headings[1:])] for name in ("experts", "parameters")]
    for name, one in result["held_out"].items():
        rows.append([f"neg. log perplexity of {name}", *(f"{one[when]:.4f}" for when in headings[1:])])
    console.rows(f"{result['destination']}: by {result['by']}, capacity {result['capacity']}", headings, rows)
    layers = result["layers"].items()
    console.rows(
        "tokens whose expert is gone",
        ("layer", "share", "wo times", "kept"),
        (
            [name, f"{one['lost_fraction']:.1%}", f"{one['wo']:.3f}", " ".join(map(str, one["kept"]))]
            for name, one in layers
        ),
    )
    console.message()
    console.message(f"Next: {program_name()} {result['next']}")
