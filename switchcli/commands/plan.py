"""`switchcli plan`: the cost of a training step on given devices, and the meshes that fit. Imports torch late."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli.commands._options import Json, complete_first_recipe, epilog, split_arguments
from switchcli.commands._result import Line, finish
from switchcli.errors import RecipeError
from switchcli.terminal.console import main_console
from switchcli.terminal.safe_text import shell_words
from switchcli.terminal.table import Table
from switchcli.terminal.units import gib, number, parse_bytes, si

if TYPE_CHECKING:
    from switchcli.plan.recipe_plan import RecipePlan
    from switchcli.planner.meshes import Fit, Machine

app = typer.Typer()

_DEFAULT_MEMORY = 80 * 2**30
"""Bytes of one device without --gpu and --memory."""
_CONSOLE_ROWS = 6
"""The number of meshes, and of reasons, that the console shows. --json has all."""

_MESH_COLUMNS = ("mesh", "expert", "shard")
_BYTES_COLUMNS = ("micro", "state", "activ", "buffers", "GiB")


@app.command(
    epilog=epilog(
        "how-to/plan",
        "switchcli plan --gpu h100 --devices 8",
        "switchcli plan quickstart/switch model.num_experts=64 --memory 24GiB",
    )
)
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE|SIZE] [KEY=VALUE ...]",
            help="A recipe, or a model size such as switch-c, and recipe keys to set. Default: every size.",
            autocompletion=complete_first_recipe,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A known device, such as h100 or rtx-4090. An unknown name lists them.",
        ),
    ] = None,
    num_devices: Annotated[int, typer.Option("--devices", metavar="N", min=1, help="Number of devices.")] = 8,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one device. Default: that of --gpu, or 80GiB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute which models and meshes fit on given devices, with the bytes of each device; no GPU is needed.

    The exit code is 1 if nothing fits.
    """
    from switchcli.plan import recipe_plan
    from switchcli.recipe.sizes import SIZES
    from switchcli.runs.devices.costs import muon_warning

    machine = _machine(gpu, num_devices, memory)
    name, overrides = split_arguments(arguments or [])
    if name is None:
        with main_console().counting("planning", len(SIZES)) as show:
            plans = recipe_plan.plan_sizes(overrides, machine, show)
        result, shown = {"sizes": [one.to_json() for one in plans]}, _show_sizes(plans)
    else:
        plans = [recipe_plan.plan_recipe(name, overrides, machine)]
        result, shown = plans[0].to_json(), _show_recipe(plans[0])
        if warning := muon_warning(plans[0].recipe):
            main_console().warning(warning)
    finish(result, as_json, shown, exit_code=0 if any(one.meshes.best for one in plans) else 1)


def _machine(gpu: str | None, num_devices: int, memory: str | None) -> "Machine":
    """Return the devices that the options describe. Raises RecipeError for an impossible size or an unknown GPU."""
    from switchcli.planner.meshes import Machine

    machine = Machine(num_devices, _DEFAULT_MEMORY) if gpu is None else Machine.of_gpu(num_devices, gpu)
    if memory is None:
        return machine
    memory_bytes = parse_bytes(memory)
    if memory_bytes is None:
        raise RecipeError(f"--memory ({memory!r}) is no size: write it as 80GiB, 24GB or 512MiB")
    return machine._replace(memory_bytes=memory_bytes)


def _show_sizes(plans: Sequence["RecipePlan"]) -> Iterator[Table | Line]:
    """Yield what fits of every size."""
    from switchcli.plan.recipe_plan import SIZES_RECIPE

    about = plans[0].about
    rows = []
    for one in plans:
        fit, needs = one.meshes.best, number(one.devices_needed) if one.devices_needed else "-"
        cells = (*_mesh_cells(fit), gib(fit.bytes.total), _days(one.days)) if fit else ["-"] * 5
        rows.append((one.name, si(one.about["parameters"]), needs, *cells))
    yield Table(
        ("size", "parameters", "needs", *_MESH_COLUMNS, "GiB", "days"),
        rows,
        f"Each size as {SIZES_RECIPE}, on {_devices(plans[0])}",
        "needs: fewest devices (a power of two), - if the batch is too small to split among enough. "
        f"GiB: of a device. days: for {si(about['input_tokens'])} tokens. " + _assumptions(),
    )
    if not any(one.meshes.best for one in plans):
        yield Line(f"None fits. The smallest: {plans[0].meshes.reasons()[0][0]}")
    yield Line("Keys to paste: switchcli plan SIZE with the same options")


def _show_recipe(plan: "RecipePlan") -> Iterator[Table | Line]:
    """Yield the numbers of one recipe or size, its meshes, and the keys of the first one."""
    about, (fits, rejected) = plan.about, plan.meshes
    rows = [
        ("parameters", number(about["parameters"])),
        ("of the experts", number(about["expert_parameters"])),
        ("active for a token", number(about["active_parameters"])),
        ("FLOPs of a step", si(plan.planner.flops_per_step)),
        (
            "batch",
            f"{about['sequences_per_step']:,} x ({about['inputs_length']:,} + {about['targets_length']:,}) tokens",
        ),
        ("devices", _devices(plan)),
        ("fewest devices", number(plan.devices_needed) if plan.devices_needed else "-"),
    ]
    if fits and plan.days is not None:
        rows.append((f"days for {about['steps']:,} steps", _days(plan.days)))
    if flops := plan.planner.optimizer_flops_per_step:
        rows.insert(4, ("FLOPs of the optimizer", si(flops)))
    yield Table(("", ""), rows, plan.name, _assumptions())
    if fits:
        title = f"Meshes that fit, GiB of a device{_truncation(fits)}"
        yield Table((*_MESH_COLUMNS, *_BYTES_COLUMNS), [*map(_fit_row, fits[:_CONSOLE_ROWS])], title)
        yield Line("Keys of the first mesh")
        yield Line(shell_words(*plan.overrides), wrap=False)
    if rejected:
        reasons = [(reason, str(meshes)) for reason, meshes in plan.meshes.reasons()]
        yield Table(("why", "meshes"), reasons[:_CONSOLE_ROWS], f"Refused{_truncation(reasons)}")


def _fit_row(fit: "Fit") -> tuple[str, ...]:
    size = fit.bytes
    state = size.weights + size.gradients + size.optimizer
    sizes = (state, size.activations, size.copies + size.dispatch + size.vocabulary, size.total)
    return (*_mesh_cells(fit), str(fit.microbatch), *map(gib, sizes))


def _mesh_cells(fit: "Fit") -> tuple[str, ...]:
    mesh = fit.mesh
    return (f"{mesh.data} x {mesh.model}", str(mesh.expert), mesh.shard)


def _devices(plan: "RecipePlan") -> str:
    machine = plan.machine
    name = machine.gpu or "devices"
    return f"{machine.devices:,} {name}, {gib(machine.usable_bytes)} of {gib(machine.memory_bytes)} GiB each"


def _truncation(rows: Sequence[Any]) -> str:
    """Return the end of a table's title that says that rows are left out, if some are."""
    return f" ({_CONSOLE_ROWS} of {len(rows)}; --json has all)" if len(rows) > _CONSOLE_ROWS else ""


def _assumptions() -> str:
    """Return what a plan assumes of the devices."""
    from switchcli.plan.recipe_plan import TIMES
    from switchcli.planner.devices import RESERVED_FRACTION

    return f"{RESERVED_FRACTION:.0%} of the memory stays free. {TIMES}"


def _days(days: float | None) -> str:
    """Return days: `12,345`, `16.9`, `0.02`, `< 0.01`."""
    if days is None:
        return "-"
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}" if days >= 0.01 else "< 0.01"
