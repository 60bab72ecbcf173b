"""`switchcli prune`: a trained model with fewer experts. Imports torch only when it runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from switchcli.commands._options import (
    Checkpoint,
    Destination,
    EvalArguments,
    Json,
    Quiet,
    epilog,
    split_arguments,
)
from switchcli.commands._result import Line, finish
from switchcli.terminal.console import Console
from switchcli.terminal.table import Table, Value
from switchcli.terminal.units import binary, percent

app = typer.Typer()


@app.command(
    epilog=epilog(
        "how-to/upcycle-and-prune",
        "switchcli prune runs/quickstart/switch runs/small --experts 4",
        "switchcli prune runs/quickstart/switch runs/half --experts 4 --json",
    )
)
def prune(
    checkpoint: Checkpoint,
    destination: Destination,
    experts: Annotated[int, typer.Option(metavar="N", help="Number of experts that each sparse layer keeps.")],
    arguments: EvalArguments = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove the experts that held-out text uses least, to serve a smaller model."""
    from switchcli.runs.models import pruning

    recipe, overrides = split_arguments(arguments or [])
    result = pruning.prune(
        checkpoint,
        destination,
        recipe,
        overrides,
        Console(quiet=quiet),
        experts=experts,
    )
    finish(result, as_json, _shown(result))


def _shown(result: Mapping[str, Any]) -> Iterator[Table | Line]:
    """Yield the metrics before and after, and the tokens that each layer lost."""
    from switchcli.terminal.safe_text import program_name

    times = ("before", "after")
    rows: list[Sequence[Value]] = [
        (name, *(result[name][time] for time in times)) for name in ("experts", "parameters")
    ]
    rows.append(("bytes", *(binary(result["bytes"][time]) for time in times)))
    for name, held_out in result["held_out"].items():
        rows.append((f"loss of {name}", *(f"{-held_out[time]:.4f}" for time in times)))
        if held_out["bits_per_byte"]["after"] is not None:
            rows.append((f"bits per byte of {name}", *(f"{held_out['bits_per_byte'][time]:.4f}" for time in times)))
    yield Table(("", *times), rows, f"{result['destination']}: capacity {result['capacity']}")
    layer_rows = [
        (name, percent(layer["lost_fraction"]), f"{layer['wo']:.3f}", " ".join(map(str, layer["kept"])))
        for name, layer in result["layers"].items()
    ]
    yield Table(("layer", "share", "wo times", "kept"), layer_rows, "tokens whose expert was removed")
    yield Line("")
    yield Line("Next:")
    yield Line(f"  {program_name()} {result['next']}")
