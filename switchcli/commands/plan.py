"""`switchcli plan`: the cost of a training step on given devices, and the meshes that fit. Imports torch late."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchcli.commands import _completion
from switchcli.commands._help import epilog
from switchcli.commands._options import Json, split_arguments
from switchcli.commands._result import finish
from switchcli.errors import RecipeError
from switchcli.report.console import main_console
from switchcli.report.safe_text import shell_words
from switchcli.report.table import Table
from switchcli.report.units import gib, number, parse_bytes, si

if TYPE_CHECKING:
    from switchcli.planner.plan import Fit, Machine
    from switchcli.runs.devices.planning import RecipePlan

app = typer.Typer()

_DEFAULT_MEMORY = 80 * 2**30
"""Bytes of one device without --gpu and --memory."""
_LEAST_MEMORY = 10**6
"""Bytes of --memory from which on it is believed. `80` alone would be 80 bytes."""
_OWN_RECIPE = "RECIPE"
"""Stands for the user's recipe in the command behind which the keys of a size belong."""
_CONSOLE_ROWS = 12
"""The number of meshes that the console shows. --json and --html have all."""

_FIT_COLUMNS = (
    *("mesh", "expert", "shard", "micro"),
    *("weights", "grads", "optim", "activ", "buffers", "total"),
    *("seconds", "bound by"),
)
_LAPTOP_COLUMNS = ("key", "value", "try", "reason")
_SIZE_COLUMNS = ("size", "parameters", "fits", "needs", "mesh", "expert", "shard", "GiB", "tokens/s", "days")


@app.command(
    epilog=epilog(
        "how-to/plan",
        "switchcli plan --gpu h100 --devices 8",
        "switchcli plan quickstart/switch model.num_experts=64 --html plan.html",
    )
)
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE|SIZE] [KEY=VALUE ...]",
            help="A recipe, or a model size such as switch-c, and recipe keys to set. Default: every size.",
            autocompletion=_completion.first_recipe,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A known device, such as h100 or rtx-4090. An unknown name lists them.",
        ),
    ] = None,
    devices: Annotated[int, typer.Option(metavar="N", min=1, help="Number of devices.")] = 8,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one device. Default: that of --gpu, or 80GiB.")
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="FLOP/s that one device reaches. Default: 40 % of --gpu's, or 312e12."),
    ] = None,
    memory_bandwidth: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="Bytes/s of a device's own memory. Default: --gpu's, or 2e12."),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="Bytes/s that a device sends within its node. Default: --gpu's, or 300e9."),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="Bytes/s that a device sends to other nodes. Default: 25e9."),
    ] = None,
    node_devices: Annotated[int, typer.Option(metavar="N", min=1, help="Number of devices in a node.")] = 8,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write an HTML page with every mesh, or every size, to this file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute which models and meshes fit on given devices, with bytes per device and times; no GPU is needed.

    The exit code is 1 if nothing fits.
    """
    from switchcli.recipe.sizes import SIZES
    from switchcli.report.html_page import write_page
    from switchcli.runs.devices import planning

    rates = {"flops": flops, "memory_bandwidth": memory_bandwidth, "bandwidth": bandwidth, "network": network}
    machine = _machine(gpu, devices, memory, rates, node_devices)
    name, overrides = split_arguments(arguments or [])
    tables: Callable[[int | None], Iterator[Table]]  # with at most so many rows of meshes
    if name is None:
        with main_console().counting("planning", len(SIZES)) as show:
            plans = planning.plan_sizes(overrides, machine, show)
        title, result, tables = "every size", planning.sizes_to_json(plans), lambda max_rows: _size_tables(plans)
    else:
        plans = [planning.plan_recipe(name, overrides, machine)]
        title, result, tables = name, plans[0].to_json(), partial(_step_tables, plans[0])
    if name is not None and (warning := planning.muon_warning(plans[0].recipe)):
        main_console().warning(warning)
    if html is not None:
        write_page(html, f"switchcli plan: {title}", tables(None))
    fits = any(one.meshes.best for one in plans)
    finish(result, as_json, tables(_CONSOLE_ROWS), exit_code=0 if fits else 1)


def _machine(
    gpu: str | None, devices: int, memory: str | None, rates: dict[str, float | None], node_devices: int
) -> "Machine":
    """Return the devices that the options describe; the memory and the rates that are not None replace the GPU's.

    Raises:
        RecipeError: a value is not possible, or there is no such GPU.
    """
    from switchcli.planner.plan import Machine

    machine = Machine(devices, _DEFAULT_MEMORY) if gpu is None else Machine.of_gpu(devices, gpu)
    if memory is not None:
        memory_bytes = parse_bytes(memory)
        if memory_bytes is None:
            raise RecipeError(f"--memory ({memory!r}) is no size: write it as 80GiB, 24GB or 512MiB")
        if memory_bytes < _LEAST_MEMORY:
            raise RecipeError(
                f"--memory ({memory!r}) is {memory_bytes:,} bytes, which no device has: add a unit, as 80GiB"
            )
        machine = machine._replace(memory_bytes=memory_bytes)
    given: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
    for name, rate in given.items():
        if not 0 < rate < float("inf"):
            raise RecipeError(f"--{name.replace('_', '-')} ({rate:g}) must be more than 0, and a number: try 3e11")
    if "flops" in given:
        machine = machine._replace(float32_flops=None)
    return machine._replace(**given, node_devices=node_devices)


# Every size


def _size_tables(plans: Sequence["RecipePlan"]) -> Iterator[Table]:
    """Yield the tables of all sizes: the devices, what fits, and the keys to paste."""
    from switchcli.runs.devices.planning import SIZES_RECIPE

    first = plans[0]
    rows = [
        *_device_rows(first),
        ("recipe", SIZES_RECIPE),
        ("steps", number(first.about["steps"])),
        ("input tokens", si(first.about["input_tokens"])),
    ]
    if not any(one.meshes.best for one in plans):
        rows.append(("none fits: the smallest because", first.meshes.reasons()[0][0]))
    yield Table(("", ""), rows, "Every size", _assumptions(first))
    note = (
        "needs: the smallest power of two of such devices, - where the batch cannot be shared by enough of them. "
        "Input tokens a second of all devices, and days for the tokens of the recipe."
    )
    title = "Sizes on their fastest mesh, GiB a device"
    yield Table(_SIZE_COLUMNS, [*map(_size_row, plans)], title, note)
    yield from _keys_to_paste(_OWN_RECIPE, plans)


def _keys_to_paste(recipe: str, plans: Sequence["RecipePlan"]) -> Iterator[Table]:
    """Yield a table of the keys of each plan that fits, under the command that starts a rank for each device."""
    title = f"Keys for your {_OWN_RECIPE}, to paste after" if recipe == _OWN_RECIPE else "Keys to paste after"
    command = _start(recipe, plans[0].recipe.verb, plans[0].machine)
    if keys := [(shell_words(*one.overrides),) for one in plans if one.meshes.best]:
        yield Table(("",), keys, f"{title}: {command}")


def _start(recipe: str, verb: str, machine: "Machine") -> str:
    """Return the command that starts a rank for each device: within a node, or on each of several nodes."""
    checkpoint = {"finetune": " --model CHECKPOINT", "distill": " --teacher CHECKPOINT"}.get(verb, "")
    devices, command = machine.devices, f"switchcli {shell_words(verb, recipe)}{checkpoint}"
    if devices <= machine.node_devices:
        return command + (f" --processes {devices}" if devices > 1 else "")
    # The nodes have equally many ranks.
    nodes = next(n for n in range(math.ceil(devices / machine.node_devices), devices + 1) if devices % n == 0)
    return f"torchrun --nnodes {nodes} --nproc-per-node {devices // nodes} -m {command}"


def _size_row(row: "RecipePlan") -> tuple[str, ...]:
    parameters, needed, fit = si(row.about["parameters"]), _devices_needed(row), row.meshes.best
    if fit is None:
        return (row.name, parameters, "no", needed, *["-"] * (len(_SIZE_COLUMNS) - 4))
    times = (si(row.tokens_per_second(fit)), _days(row.days(fit)))
    return (row.name, parameters, "yes", needed, *_mesh_cells(fit), gib(fit.bytes.total), *times)


def _devices_needed(plan: "RecipePlan") -> str:
    return "-" if plan.devices_needed is None else f"{plan.devices_needed:,}"


# One recipe or size


def _step_tables(plan: "RecipePlan", max_rows: int | None) -> Iterator[Table]:
    """Yield the tables of one plan, those of meshes and reasons with at most `max_rows` rows if that is not None."""
    from switchcli.recipe.sizes import SIZES

    fits, rejected = plan.meshes
    yield Table(("", ""), [*_summary(plan)], plan.name, _assumptions(plan))
    if settings := plan.laptop_settings:
        yield Table(_LAPTOP_COLUMNS, settings, "Keys that this recipe sets for a laptop")
    if fits:
        title = f"Meshes that fit, the fastest first: GiB a device, seconds a step{_truncation(fits, max_rows)}"
        yield Table(_FIT_COLUMNS, [*map(_fit_row, fits[:max_rows])], title)
        yield from _keys_to_paste(_OWN_RECIPE if plan.name in SIZES else plan.name, [plan])
    if rejected:
        reasons = [(reason, str(meshes)) for reason, meshes in plan.meshes.reasons()]
        yield Table(("why", "meshes"), reasons[:max_rows], f"Refused{_truncation(reasons, max_rows)}")


def _summary(plan: "RecipePlan") -> Iterator[tuple[str, str]]:
    """Yield the rows of the table about the model, the batch, the devices and the fastest mesh."""
    sizes, (fits, rejected) = plan.about, plan.meshes
    yield "parameters", number(sizes["parameters"])
    yield "of the experts", number(sizes["expert_parameters"])
    yield "outside the experts", number(sizes["dense_parameters"])
    yield "that a token meets", number(sizes["active_parameters"])
    yield "FLOPs a sequence, forward", si(sizes["flops_per_sequence"])
    yield "FLOPs a step, forward and backward", si(plan.planner.flops_per_step)
    if flops := plan.planner.optimizer_flops_per_step:
        yield "FLOPs a step of the optimizer", si(flops)
    yield "activation checkpointing", plan.recipe.train.activation_checkpointing
    yield "sequences a step", number(sizes["sequences_per_step"])
    yield "tokens of a sequence", f"{sizes['inputs_length']:,} + {sizes['targets_length']:,}"
    yield "sequences of a routing group", number(plan.recipe.model.group_sequences)
    yield from _device_rows(plan)
    yield "fewest devices, a power of two", _devices_needed(plan)
    yield "meshes that fit", f"{len(fits)} of {len(fits) + len(rejected)}"
    if fits:
        yield "input tokens/s on the fastest", si(plan.tokens_per_second(fits[0]))
        yield f"days for {sizes['steps']:,} steps on it", _days(plan.days(fits[0]))


def _truncation(rows: Sequence[Any], max_rows: int | None) -> str:
    """Return the end of a table's title that says that rows are left out, if some are."""
    return "" if max_rows is None or len(rows) <= max_rows else f": {max_rows} of {len(rows)}, --json has all"


def _fit_row(fit: "Fit") -> tuple[str, ...]:
    size = fit.bytes
    buffers = size.copies + size.dispatch + size.vocabulary
    sizes = (size.weights, size.gradients, size.optimizer, size.activations, buffers, size.total)
    return (
        *_mesh_cells(fit),
        str(fit.microbatch),
        *map(gib, sizes),
        f"{fit.step_seconds:.3g}",
        fit.bound_by.replace("_", " "),
    )


def _mesh_cells(fit: "Fit") -> tuple[str, ...]:
    mesh = fit.mesh
    return (f"{mesh.data} x {mesh.model}", str(mesh.expert), mesh.shard)


# The devices


def _device_rows(plan: "RecipePlan") -> list[tuple[str, str]]:
    """Return what the plan is told of the devices."""
    machine = plan.machine
    return [
        ("devices", f"{machine.devices:,}" + (f" x {machine.gpu}" if machine.gpu else "")),
        ("memory of each", f"{gib(machine.memory_bytes)} GiB"),
        ("that a plan may fill", f"{gib(machine.usable_bytes)} GiB"),
        ("FLOP/s that each reaches", si(machine.product_flops(plan.product_bytes))),
    ]


def _assumptions(plan: "RecipePlan") -> str:
    """Return what the plan assumes of the devices, and how far its times are from measurements."""
    from switchcli.planner.devices import RESERVED_FRACTION
    from switchcli.runs.devices.planning import TIMES

    machine = plan.machine
    reserve = f"{RESERVED_FRACTION:.0%} of the memory is left to CUDA's context, buffers and fragmentation."
    reached = machine.utilization(plan.product_bytes)
    if reached is not None:
        products = "float32" if plan.product_bytes == 4 else "bfloat16"
        source = "as given" if machine.float32_flops is None else "an assumption, not a measurement"
        rate = f"The FLOP/s are {reached:.0%} of the data sheet's in {products}: {source}."
    elif machine.flops == machine._field_defaults["flops"]:
        rate = "The FLOP/s are those of an A100's data sheet, which no program reaches: name a --gpu, or give --flops."
    else:
        rate = "The FLOP/s are as given."
    return f"{reserve} {rate} {TIMES}"


def _days(days: float) -> str:
    """Return days in three significant digits: `0.0188`, `1.69`, `12,345`; what is too short for them is `< 0.01`."""
    if days < 0.01:
        return "< 0.01"
    return f"{days:,.0f}" if days >= 100 else f"{days:.3g}"
