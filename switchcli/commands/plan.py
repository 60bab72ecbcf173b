"""`switchcli plan`: what a recipe or a size takes on so many devices, and which meshes fit it. No device is needed."""

import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli import publish
from switchcli.distributed.mesh import ParallelSpec, check_world
from switchcli.errors import RecipeError, disk_errors
from switchcli.model.flops import FORWARD_AND_BACKWARD
from switchcli.planner.plan import Fit, Machine, Plan
from switchcli.planner.step import Mesh
from switchcli.planner.traffic import Collective
from switchcli.recipe import library, resolve, yaml_nodes
from switchcli.recipe.schema import PretrainRecipe, standing_alone
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console
from switchcli.report.html_page import HtmlTable, page
from switchcli.report.units import binary, gib, number, parse_bytes, si
from switchcli.runs.describe import describe
from switchcli.runs.mesh_choice import plan_of

BATCH_TOKENS = 2**20
"""Of a size, which has no batch: the paper's."""
ROWS = 12
"""Meshes that people are shown; --json and --html have all."""

_FIT_HEADINGS = (
    *("mesh", "expert", "shard", "micro"),
    *("weights", "grads", "optim", "activ", "buffers", "total"),
    *("seconds", "bound by"),
)
_CALL_HEADINGS = ("what", "kind", "axis", "ranks", "calls a step", "each", "sent a step")


class Options(NamedTuple):
    """The options of `switchcli plan`, as they are written."""

    devices: int
    memory: str
    flops: float
    memory_bandwidth: float
    bandwidth: float
    network: float
    node_devices: int


class Planned(NamedTuple):
    """A plan, and of what."""

    name: str
    recipe: TrainingRecipe
    machine: Machine
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **describe(self.recipe),
            "flops_per_step": _flops_per_step(self.recipe),
            "activation_checkpointing": self.recipe.train.activation_checkpointing,
            "machine": self.machine._asdict(),
            "fits": [_fit_to_json(fit, self.recipe) for fit in self.plan.fits],
            "refused": [
                {**refusal.mesh._asdict(), "kind": refusal.kind, "reason": refusal.reason}
                for refusal in self.plan.refused
            ],
        }


def _fit_to_json(fit: Fit, recipe: TrainingRecipe) -> dict[str, Any]:
    return {
        **fit.mesh._asdict(),
        "microbatch_tokens": fit.microbatch * recipe.inputs_length,
        "bytes": {**fit.bytes._asdict(), "total": fit.bytes.total},
        "collectives": [{**call._asdict(), "wire_bytes": call.wire_bytes} for call in fit.collectives],
        "seconds": {**fit.seconds, "step": fit.step_seconds},
        "bound_by": fit.bound_by,
    }


def planned(name: str, overrides: Sequence[str], options: Options) -> Planned:
    """Resolve the recipe or the size, and plan its step.

    Raises:
        RecipeError: no such recipe or size, a key or an option that breaks a rule, a mesh that is not of the devices.
    """
    machine = _machine(options)
    recipe = _recipe(name, overrides)
    said = recipe.parallel
    check_world(said, machine.devices)
    found = plan_of(recipe, machine, fused=recipe.train.device != "cpu")
    if not said.is_open:
        fits = (one for one in found.fits if _is_said(one.mesh, said))
        found = Plan(tuple(fits), tuple(one for one in found.refused if _is_said(one.mesh, said)))
    return Planned(name, recipe, machine, found)


def _is_said(mesh: Mesh, said: ParallelSpec) -> bool:
    """Whether the recipe leaves that mesh open."""
    shard = said.shard if mesh.data > 1 else "none"
    return (said.expert, said.model, shard) == mesh[1:] and said.data in (None, mesh.data)


def _machine(options: Options) -> Machine:
    if options.devices < 1:
        raise RecipeError(f"--devices ({options.devices}) must be at least 1")
    if options.node_devices < 1:
        raise RecipeError(f"--node-devices ({options.node_devices}) must be at least 1")
    if (memory := parse_bytes(options.memory)) is None:
        raise RecipeError(f"--memory ({options.memory!r}) is no size: write it as 80GiB, 24GB or 512MiB")
    rates = {name: getattr(options, name) for name in ("flops", "memory_bandwidth", "bandwidth", "network")}
    for name, rate in rates.items():
        if not 0 < rate < float("inf"):
            raise RecipeError(f"--{name.replace('_', '-')} ({rate:g}) must be more than 0, and a number: try 3e11")
    return Machine(options.devices, memory, **rates, node_devices=options.node_devices)


def _recipe(name: str, overrides: Sequence[str]) -> TrainingRecipe:
    if name in SIZES:
        return _of_size(name, overrides)
    if not Path(name).suffix and not Path(name).exists() and name not in library.names():
        near = difflib.get_close_matches(name, [*SIZES, *library.names()], n=1)
        hint = f"Did you mean {near[0]}?" if near else "`switchcli recipes list` shows the recipes that ship."
        raise RecipeError(f"{yaml_nodes.name_of(name)}: no such size or recipe. {hint}")
    recipe = standing_alone(name, overrides)
    if not isinstance(recipe, TrainingRecipe):
        raise RecipeError(
            f"{yaml_nodes.name_of(name)}: a recipe of `switchcli eval` trains nothing: name one that does"
        )
    tree = resolve.load(name, overrides)
    if recipe.verb != "pretrain" and resolve.stated(tree, "model.d_model") is None:
        raise RecipeError(f"{yaml_nodes.name_of(name)}: its model is a checkpoint's: say which, by model.size=NAME")
    return recipe


def _of_size(name: str, overrides: Sequence[str]) -> PretrainRecipe:
    """A size in the paper's batch and in bfloat16, in the smallest groups that hold a token for each expert."""
    below: dict[str, Any] = {"train": {"steps": 1, "batch_tokens": BATCH_TOKENS, "precision": "selective"}}
    where, keys = f"the size {name}", [f"model.size={name}", *overrides]
    rows = resolve.load(None, [key for key in overrides if key.startswith("data.")], resolve.layer(below, where))
    length = resolve.validate(rows, PretrainRecipe).targets_length
    experts = resolve.stated(resolve.load(None, keys), "model.num_experts")
    sequences = 1
    while isinstance(experts, int) and sequences * length < experts:
        sequences *= 2
    below["model"] = {"router": {"group_sequences": sequences}}
    tree = resolve.load(None, keys, resolve.layer(below, where))
    return resolve.validate(tree, PretrainRecipe)


def _flops_per_step(recipe: TrainingRecipe) -> int:
    """The model's: what activation checkpointing computes again is in the seconds alone."""
    return FORWARD_AND_BACKWARD * recipe.rows_per_step * int(describe(recipe)["flops_per_sequence"])


def show(planned: Planned) -> None:
    """The plan on stdout, for people."""
    console = Console(stream=sys.stdout)
    console.table(planned.name, _figures(planned))
    for table in _tables(planned, ROWS):
        console.rows(*table)


def write_html(planned: Planned, file: Path) -> None:
    """The same as one page, with every mesh."""
    figures = HtmlTable(
        "Model and batch", ("", ""), [(key, _written(value)) for key, value in _figures(planned).items()]
    )
    text = page(f"switchcli plan {planned.name}", [figures, *_tables(planned, None)])
    with disk_errors(file, "give another file by --html"):
        publish.write_file(file, text)


def _written(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)


def _figures(planned: Planned) -> dict[str, str | float]:
    found, machine = describe(planned.recipe), planned.machine
    return {
        "parameters": found["parameters"],
        "of the experts": found["expert_parameters"],
        "outside the experts": found["dense_parameters"],
        "that a token meets": found["active_parameters"],
        "FLOPs a sequence, forward": si(found["flops_per_sequence"]),
        "FLOPs a step, forward and backward": si(_flops_per_step(planned.recipe)),
        "activation checkpointing": planned.recipe.train.activation_checkpointing,
        "sequences a step": found["sequences_per_step"],
        "tokens of a sequence": f"{found['inputs_length']:,} + {found['targets_length']:,}",
        "sequences of a routing group": planned.recipe.model.group_sequences,
        "devices": f"{machine.devices:,} of {gib(machine.memory_bytes)} GiB",
        "meshes that fit": f"{len(planned.plan.fits)} of {len(planned.plan.fits) + len(planned.plan.refused)}",
    }


def _tables(planned: Planned, most: int | None) -> Iterator[HtmlTable]:
    """Of meshes and reasons at most so many."""
    fits, refused = planned.plan
    if fits:
        title = f"Meshes that fit, the fastest first: GiB a device, seconds a step{_more(fits, most)}"
        yield HtmlTable(title, _FIT_HEADINGS, map(_fit_row, fits[:most]))
        if calls := [*map(_call_row, fits[0].collectives)]:
            yield HtmlTable(f"Collectives of {fits[0].mesh}, on each device", _CALL_HEADINGS, calls)
    if refused:
        # The ways to shard one mesh are one line, of the way that needs least.
        lines: dict[object, tuple[str, int]] = {}
        for one in sorted(refused, key=lambda one: (one.kind == "memory", one.bytes_needed)):
            key = one.mesh._replace(shard="none") if one.kind == "memory" else one.reason
            words = f"{one.mesh}: {one.reason}" if one.kind == "memory" else one.reason
            first, meshes = lines.get(key, (words, 0))
            lines[key] = (first, meshes + 1)
        rows = [(words, str(meshes)) for words, meshes in lines.values()]
        yield HtmlTable(f"Refused{_more(rows, most)}", ("why", "meshes"), rows[:most])


def _more(rows: Sequence[Any], most: int | None) -> str:
    return "" if most is None or len(rows) <= most else f": {most} of {len(rows)}, --json has all"


def _fit_row(fit: Fit) -> tuple[str, ...]:
    mesh, taken = fit.mesh, fit.bytes
    buffers = taken.copies + taken.dispatch + taken.vocabulary
    sizes = (taken.weights, taken.gradients, taken.optimizer, taken.activations, buffers, taken.total)
    place = (f"{mesh.data} x {mesh.model}", str(mesh.expert), mesh.shard, str(fit.microbatch))
    return (*place, *map(gib, sizes), f"{fit.step_seconds:.3g}", fit.bound_by)


def _call_row(call: Collective) -> tuple[str, ...]:
    numbers = (f"{call.ranks:,}", f"{call.calls:,}", binary(call.payload_bytes), binary(call.wire_bytes))
    return (call.what, call.kind, call.axis, *numbers)
