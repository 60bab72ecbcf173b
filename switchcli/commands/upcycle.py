"""`switchcli upcycle`: a sparse model made of copies of a smaller model. Imports torch only when it runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from switchcli.commands._help import epilog
from switchcli.commands._options import A_CHECKPOINT, Destination, Json, Overrides, Quiet
from switchcli.commands._result import finish
from switchcli.report.console import Console

app = typer.Typer()


@app.command(
    epilog=epilog(
        "how-to/upcycle-and-prune",
        "switchcli upcycle runs/quickstart/dense runs/sparse --experts 8",
        "switchcli upcycle runs/sparse runs/grown --experts 16",
    )
)
def upcycle(
    source: Annotated[Path, typer.Argument(metavar="MODEL", help=f"A dense or a sparse model. {A_CHECKPOINT}")],
    destination: Destination,
    experts: Annotated[
        int,
        typer.Option(
            metavar="N", help="Number of experts in each sparse layer: a multiple of those of a sparse MODEL."
        ),
    ],
    overrides: Overrides = None,
    gate: Annotated[
        Literal["scaled", "raw"],
        typer.Option(
            metavar="scaled|raw",
            help="Scale weights to correct for gates below 1, so that outputs stay equal, or copy them.",
        ),
    ] = "scaled",
    noise: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            help="Standard deviation of noise on copied experts, as a multiple of the weights' root mean square.",
        ),
    ] = 0.0,
    redraw: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Share of each copied expert's hidden units that are drawn anew, with the mean and standard deviation "
            "of what they replace (drop-upcycling).",
        ),
    ] = 0.0,
    router_noise: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            show_default=False,
            help="Standard deviation of noise on copied router rows, as a multiple of that of the router's weights. "
            "With 0 no token reaches the copies under top-1. Default: 0.01 for a sparse MODEL.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of new routers, noise and redrawn units.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a sparse model of copies of a dense model's feed-forwards or their parts, or of a sparse model's experts."""
    from switchcli.model.surgery.upcycle import CopyNoise
    from switchcli.runs.models import upcycling

    console = Console(quiet=quiet)
    copy_noise = CopyNoise(noise, redraw, router_noise, seed)
    result = upcycling.upcycle(
        source, destination, overrides or [], console, experts=experts, gate=gate, noise=copy_noise
    )
    for line in _summary(result):
        console.message(line)
    finish(result, as_json)


def _summary(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line about the model, one about each stack, and one with the next command."""
    from switchcli.report.program import program_name

    yield f"{result['parameters']:,} parameters in {result['destination']}"
    noise = result["router_noise"]  # None for a dense model, whose routers are new
    source = "dense" if noise is None else "smaller"
    for stack, correction in result["corrections"].items():
        layers = sum(layer.startswith(stack) for layer in result["layers"])
        routers = f"fresh routers times {correction['router']:g}" if noise is None else f"router noise of {noise:g}"
        factors = f"wo times {correction['wo']:g}, {routers}"
        if correction["exact"]:
            start = f"as the {source} model, where no token is dropped"
        elif correction["exact_without_noise"]:
            redraw = result["redraw"]
            but = (
                f"but for {redraw:.0%} of the copies' hidden units, drawn anew"
                if redraw
                else "but for rounding or noise"
            )
            start = f"as the {source} model {but}, where no token is dropped"
        else:
            start = f"with other outputs than the {source} model's"
        experts = f"{result['experts']} experts"
        if result["parts"] > 1:
            experts += f", {result['parts']} to a copy"
        yield f"{stack}: {layers} layers of {experts}; {factors}: begins {start}"
    yield "Next:"
    yield f"  {program_name()} {result['next']}"
