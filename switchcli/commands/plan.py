"""`switchcli plan`: what a recipe or a size takes on given devices, and which meshes fit. No torch until it runs."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli import publish
from switchcli.commands import _exit
from switchcli.commands._options import Json, Overrides
from switchcli.errors import RecipeError, disk_errors
from switchcli.report.console import Console, print_json
from switchcli.report.units import binary, gib, number, parse_bytes, si

if TYPE_CHECKING:
    from switchcli.planner.plan import Fit, Machine
    from switchcli.planner.traffic import Collective
    from switchcli.report.html_page import HtmlTable
    from switchcli.runs.planning import Planned

app = typer.Typer()

ROWS = 12
"""Meshes that people are shown; --json and --html have all."""

_FIT_HEADINGS = (
    *("mesh", "expert", "shard", "micro"),
    *("weights", "grads", "optim", "activ", "buffers", "total"),
    *("seconds", "bound by"),
)
_CALL_HEADINGS = ("what", "kind", "axis", "ranks", "calls a step", "each", "sent a step")


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|SIZE", help="A recipe, or a size such as switch-c.", show_default=False)
    ],
    devices: Annotated[int, typer.Option(help="How many there are.")] = 8,
    overrides: Overrides = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of one device.")] = "80GiB",
    flops: Annotated[float, typer.Option(help="FLOP/s that a device reaches.")] = 312e12,
    memory_bandwidth: Annotated[float, typer.Option(help="Bytes a second of its own memory.")] = 2e12,
    bandwidth: Annotated[float, typer.Option(help="Bytes a second that a device sends within a node.")] = 300e9,
    network: Annotated[float, typer.Option(help="Bytes a second that a device sends to other nodes.")] = 25e9,
    node_devices: Annotated[int, typer.Option(help="Devices of a node.")] = 8,
    html: Annotated[Path | None, typer.Option(help="Write a page with every mesh.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, bytes a device, bytes a collective, seconds a step: which mesh fits. No GPU is needed."""
    with _exit.interruptible(saves_nothing=True):
        from switchcli.runs import planning

        rates = {"flops": flops, "memory_bandwidth": memory_bandwidth, "bandwidth": bandwidth, "network": network}
        machine = _machine(devices, memory, rates, node_devices)
        planned = planning.plan_step(recipe, overrides or [], machine)
        if html is not None:
            _write_html(planned, html)
        if as_json:
            print_json(planned.to_json())
        else:
            _show(planned)


def _machine(devices: int, memory: str, rates: dict[str, float], node_devices: int) -> "Machine":
    """Return the devices that the options describe. Raises RecipeError for an option that describes none."""
    from switchcli.planner.plan import Machine

    if devices < 1:
        raise RecipeError(f"--devices ({devices}) must be at least 1")
    if node_devices < 1:
        raise RecipeError(f"--node-devices ({node_devices}) must be at least 1")
    if (memory_bytes := parse_bytes(memory)) is None:
        raise RecipeError(f"--memory ({memory!r}) is no size: write it as 80GiB, 24GB or 512MiB")
    for name, rate in rates.items():
        if not 0 < rate < float("inf"):
            raise RecipeError(f"--{name.replace('_', '-')} ({rate:g}) must be more than 0, and a number: try 3e11")
    return Machine(devices, memory_bytes, **rates, node_devices=node_devices)


def _show(planned: "Planned") -> None:
    """Print the plan on stdout."""
    console = Console(stream=sys.stdout)
    console.table(planned.name, _figures(planned))
    for table in _tables(planned, ROWS):
        console.rows(*table)


def _write_html(planned: "Planned", file: Path) -> None:
    """Write the plan as a page, with every mesh."""
    from switchcli.report.html_page import HtmlTable, page

    figures = HtmlTable(
        "Model and batch", ("", ""), [(key, _written(value)) for key, value in _figures(planned).items()]
    )
    text = page(f"switchcli plan {planned.name}", [figures, *_tables(planned, None)])
    with disk_errors(file, "give another file by --html"):
        publish.write_file(file, text)


def _written(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)


def _figures(planned: "Planned") -> dict[str, str | float]:
    from switchcli.runs.describe import describe

    found, machine = describe(planned.recipe), planned.machine
    return {
        "parameters": found["parameters"],
        "of the experts": found["expert_parameters"],
        "outside the experts": found["dense_parameters"],
        "that a token meets": found["active_parameters"],
        "FLOPs a sequence, forward": si(found["flops_per_sequence"]),
        "FLOPs a step, forward and backward": si(planned.flops_per_step),
        "activation checkpointing": planned.recipe.train.activation_checkpointing,
        "sequences a step": found["sequences_per_step"],
        "tokens of a sequence": f"{found['inputs_length']:,} + {found['targets_length']:,}",
        "sequences of a routing group": planned.recipe.model.group_sequences,
        "devices": f"{machine.devices:,} of {gib(machine.memory_bytes)} GiB",
        "meshes that fit": f"{len(planned.plan.fits)} of {len(planned.plan.fits) + len(planned.plan.rejected)}",
    }


def _tables(planned: "Planned", most: int | None) -> Iterator["HtmlTable"]:
    """Yield the tables, of at most so many meshes and reasons."""
    from switchcli.report.html_page import HtmlTable

    fits, refused = planned.plan
    if fits:
        title = f"Meshes that fit, the fastest first: GiB a device, seconds a step{_more(fits, most)}"
        yield HtmlTable(title, _FIT_HEADINGS, map(_fit_row, fits[:most]))
        if calls := [*map(_call_row, fits[0].collectives)]:
            yield HtmlTable(f"Collectives of {fits[0].mesh}, on each device", _CALL_HEADINGS, calls)
    if refused:
        rows = [(reason, str(meshes)) for reason, meshes in planned.plan.reasons()]
        yield HtmlTable(f"Refused{_more(rows, most)}", ("why", "meshes"), rows[:most])


def _more(rows: Sequence[Any], most: int | None) -> str:
    return "" if most is None or len(rows) <= most else f": {most} of {len(rows)}, --json has all"


def _fit_row(fit: "Fit") -> tuple[str, ...]:
    mesh, taken = fit.mesh, fit.bytes
    buffers = taken.copies + taken.dispatch + taken.vocabulary
    sizes = (taken.weights, taken.gradients, taken.optimizer, taken.activations, buffers, taken.total)
    place = (f"{mesh.data} x {mesh.model}", str(mesh.expert), mesh.shard, str(fit.microbatch))
    return (*place, *map(gib, sizes), f"{fit.step_seconds:.3g}", fit.bound_by)


def _call_row(call: "Collective") -> tuple[str, ...]:
    numbers = (f"{call.ranks:,}", f"{call.calls:,}", binary(call.payload_bytes), binary(call.network_bytes))
    return (call.what, call.kind, call.axis, *numbers)
