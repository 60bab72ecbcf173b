"""`switchcli plan`: the cost of a training step on given devices, and the meshes that fit. Imports torch late."""

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
    from switchcli.runs.planning import StepPlan

app = typer.Typer()

_CONSOLE_ROWS = 12
"""The number of meshes that the console shows. --json and --html have all."""

_FIT_HEADINGS = (
    *("mesh", "expert", "shard", "micro"),
    *("weights", "grads", "optim", "activ", "buffers", "total"),
    *("seconds", "bound by"),
)
_COLLECTIVE_HEADINGS = ("what", "kind", "axis", "ranks", "calls a step", "each", "sent a step")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|SIZE", help="A recipe, or a model size such as switch-c.")],
    devices: Annotated[int, typer.Option(help="Number of devices.")] = 8,
    overrides: Overrides = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of one device, such as 80GiB.")] = "80GiB",
    flops: Annotated[float, typer.Option(help="FLOP/s that one device reaches.")] = 312e12,
    memory_bandwidth: Annotated[float, typer.Option(help="Bytes/s between a device and its own memory.")] = 2e12,
    bandwidth: Annotated[float, typer.Option(help="Bytes/s that a device sends within its node.")] = 300e9,
    network: Annotated[float, typer.Option(help="Bytes/s that a device sends to other nodes.")] = 25e9,
    node_devices: Annotated[int, typer.Option(help="Number of devices in a node.")] = 8,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page with every mesh to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, bytes per device and collective, seconds per step: which mesh fits. No GPU is needed."""
    with _exit.interruptible(saves_nothing=True):
        from switchcli.runs import planning

        rates = {"flops": flops, "memory_bandwidth": memory_bandwidth, "bandwidth": bandwidth, "network": network}
        machine = _machine(devices, memory, rates, node_devices)
        step_plan = planning.plan_step(recipe, overrides or [], machine)
        if html is not None:
            _write_html(step_plan, html)
        if as_json:
            print_json(step_plan.to_json())
        else:
            _show(step_plan)


def _machine(devices: int, memory: str, rates: dict[str, float], node_devices: int) -> "Machine":
    """Return the devices that the options describe. Raises RecipeError for a value that is not possible."""
    from switchcli.planner.plan import Machine

    if devices < 1:
        raise RecipeError(f"--devices ({devices}) must be at least 1")
    if node_devices < 1:
        raise RecipeError(f"--node-devices ({node_devices}) must be at least 1")
    memory_bytes = parse_bytes(memory)
    if memory_bytes is None:
        raise RecipeError(f"--memory ({memory!r}) is no size: write it as 80GiB, 24GB or 512MiB")
    for name, rate in rates.items():
        if not 0 < rate < float("inf"):
            raise RecipeError(f"--{name.replace('_', '-')} ({rate:g}) must be more than 0, and a number: try 3e11")
    return Machine(devices, memory_bytes, **rates, node_devices=node_devices)


def _show(step_plan: "StepPlan") -> None:
    """Print the plan on stdout."""
    console = Console(stream=sys.stdout)
    console.table(step_plan.name, _summary(step_plan))
    for table in _tables(step_plan, _CONSOLE_ROWS):
        console.rows(*table)


def _write_html(step_plan: "StepPlan", file: Path) -> None:
    """Write the plan with every mesh as an HTML page."""
    from switchcli.report.html_page import HtmlTable, page

    summary = [(key, value if isinstance(value, str) else number(value)) for key, value in _summary(step_plan).items()]
    tables = [HtmlTable("Model and batch", ("", ""), summary), *_tables(step_plan, None)]
    text = page(f"switchcli plan {step_plan.name}", tables)
    with disk_errors(file, "give another file by --html"):
        publish.write_file(file, text)


def _summary(step_plan: "StepPlan") -> dict[str, str | float]:
    """Return the rows of the table about the model, the batch and the devices."""
    from switchcli.runs.planning import describe

    sizes, machine, meshes = describe(step_plan.recipe), step_plan.machine, step_plan.plan
    return {
        "parameters": sizes["parameters"],
        "of the experts": sizes["expert_parameters"],
        "outside the experts": sizes["dense_parameters"],
        "that a token meets": sizes["active_parameters"],
        "FLOPs a sequence, forward": si(sizes["flops_per_sequence"]),
        "FLOPs a step, forward and backward": si(step_plan.flops_per_step),
        "activation checkpointing": step_plan.recipe.train.activation_checkpointing,
        "sequences a step": sizes["sequences_per_step"],
        "tokens of a sequence": f"{sizes['inputs_length']:,} + {sizes['targets_length']:,}",
        "sequences of a routing group": step_plan.recipe.model.group_sequences,
        "devices": f"{machine.devices:,} of {gib(machine.memory_bytes)} GiB",
        "meshes that fit": f"{len(meshes.fits)} of {len(meshes.fits) + len(meshes.rejected)}",
    }


def _tables(step_plan: "StepPlan", max_rows: int | None) -> Iterator["HtmlTable"]:
    """Yield the tables of meshes and reasons, each with at most `max_rows` rows if that is not None."""
    from switchcli.report.html_page import HtmlTable

    fits, rejected = step_plan.plan
    if fits:
        title = f"Meshes that fit, the fastest first: GiB a device, seconds a step{_truncation(fits, max_rows)}"
        yield HtmlTable(title, _FIT_HEADINGS, map(_fit_row, fits[:max_rows]))
        if collectives := [*map(_collective_row, fits[0].collectives)]:
            yield HtmlTable(f"Collectives of {fits[0].mesh}, on each device", _COLLECTIVE_HEADINGS, collectives)
    if rejected:
        reasons = [(reason, str(meshes)) for reason, meshes in step_plan.plan.reasons()]
        yield HtmlTable(f"Refused{_truncation(reasons, max_rows)}", ("why", "meshes"), reasons[:max_rows])


def _truncation(rows: Sequence[Any], max_rows: int | None) -> str:
    """Return the end of a table's title that says that rows are left out, if some are."""
    return "" if max_rows is None or len(rows) <= max_rows else f": {max_rows} of {len(rows)}, --json has all"


def _fit_row(fit: "Fit") -> tuple[str, ...]:
    mesh, size = fit.mesh, fit.bytes
    buffers = size.copies + size.dispatch + size.vocabulary
    sizes = (size.weights, size.gradients, size.optimizer, size.activations, buffers, size.total)
    mesh_cells = (f"{mesh.data} x {mesh.model}", str(mesh.expert), mesh.shard, str(fit.microbatch))
    return (*mesh_cells, *map(gib, sizes), f"{fit.step_seconds:.3g}", fit.bound_by)


def _collective_row(call: "Collective") -> tuple[str, ...]:
    numbers = (f"{call.ranks:,}", f"{call.calls:,}", binary(call.payload_bytes), binary(call.network_bytes))
    return (call.what, call.kind, call.axis, *numbers)
