"""`switchcli upcycle`: a Switch model that begins where a dense one ended. No torch until it runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from switchcli.commands import _exit
from switchcli.commands._options import A_CHECKPOINT, Destination, Json, Overrides, Quiet
from switchcli.report.console import Console, print_json

app = typer.Typer()


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
    with _exit.interruptible(saves_nothing=True):
        from switchcli.runs import upcycling

        console = Console(quiet=quiet)
        result = upcycling.upcycle(
            dense, destination, overrides or [], console, experts=experts, gate=gate, noise=noise, seed=seed
        )
        for line in _summary(result):
            console.message(line)
        if as_json:
            print_json(result)


def _summary(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line about the whole model, one about each stack, and the next command."""
    from switchcli.runs.run_dir import program_name

    yield f"{result['parameters']:,} parameters in {result['destination']}"
    for stack, one in result["corrections"].items():
        layers = sum(layer.startswith(stack) for layer in result["layers"])
        begins = "as the dense model, where no token is dropped" if one["exact"] else "otherwise than the dense model"
        factors = f"wo times {one['wo']:g}, fresh routers times {one['router']:g}"
        yield f"{stack}: {layers} layers of {result['experts']} experts; {factors}: begins {begins}"
    yield f"Next: {program_name()} {result['next']}"
