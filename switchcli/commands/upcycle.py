"""`switchcli upcycle`: a sparse model made of copies of a dense one. Imports torch only when it runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from switchcli.commands._options import A_CHECKPOINT, Destination, Json, Overrides, Quiet, epilog
from switchcli.commands._result import finish
from switchcli.terminal.console import Console

app = typer.Typer()


@app.command(
    epilog=epilog(
        "how-to/upcycle-and-prune",
        "switchcli upcycle runs/quickstart/dense runs/sparse --experts 8",
        "switchcli upcycle runs/quickstart/dense runs/noisy --experts 8 --noise 0.01",
    )
)
def upcycle(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help=f"A dense model. {A_CHECKPOINT}")],
    destination: Destination,
    experts: Annotated[
        int,
        typer.Option(metavar="N", help="Number of experts in each sparse layer."),
    ],
    overrides: Overrides = None,
    noise: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            help="Standard deviation of noise on copied experts, as a multiple of the weights' root mean square.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the routers and the noise.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a dense model into a sparse one by copying its feed-forward layers, or their parts."""
    from switchcli.runs.models import upcycling

    console = Console(quiet=quiet)
    result = upcycling.upcycle(source, destination, overrides or [], console, experts=experts, noise=noise, seed=seed)
    for line in _summary(result):
        console.message(line)
    finish(result, as_json)


def _summary(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line about the model, one about each stack, and one with the next command."""
    from switchcli.terminal.safe_text import program_name

    yield f"{result['parameters']:,} parameters in {result['destination']}"
    for stack, correction in result["corrections"].items():
        layers = sum(layer.startswith(stack) for layer in result["layers"])
        factors = f"output weights x {correction['wo']:g}, routers x {correction['router']:g}"
        if correction["exact"]:
            start = "equals the dense model as long as no token is dropped"
        elif correction["exact_without_noise"]:
            start = "equals the dense model but for rounding or noise, as long as no token is dropped"
        else:
            start = "differs from the dense model"
        experts = f"{result['experts']} experts"
        if result["parts"] > 1:
            experts += f", {result['parts']} to a copy"
        yield f"{stack}: {layers} layers of {experts}; {factors}: {start}"
    yield "Next:"
    yield f"  {program_name()} {result['next']}"
