"""The plan of a recipe's step on given devices, with the keys that give it."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.distributed.parallel_spec import check_world
from switchcli.errors import RecipeError
from switchcli.planner import devices
from switchcli.planner.meshes import Machine, Plan, Planner
from switchcli.recipe import library, resolve, yaml_nodes
from switchcli.recipe.schema import PretrainRecipe, validate_standalone
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.devices.costs import describe, planner_of

SIZES_RECIPE = "pretrain/base"
"""The recipe with which a model size is planned, because a size has no batch and no number of steps: T5's and the
paper's pre-training on C4."""
TIMES = f"Times: FLOPs of a step over {devices.UTILIZATION:.0%} of the data sheets' FLOP/s, not measured on a GPU."
"""The statement of a plan on how far its times are from measurements."""
_SECONDS_PER_DAY = 24 * 60 * 60


class RecipePlan(NamedTuple):
    """The plan of a recipe's step on given devices, with the keys that give it."""

    name: str
    """The recipe or the size, as the user named it."""
    given: tuple[str, ...]
    """The KEY=VALUE that the user gave."""
    recipe: TrainingRecipe
    planner: Planner
    machine: Machine
    meshes: Plan
    devices_needed: int | None
    """The smallest power of two of such devices that the step fits on; None if no number of them suffices."""

    @property
    def about(self) -> dict[str, Any]:
        """The parameters, FLOPs and tokens of the run, as `describe` returns them."""
        return describe(self.recipe)

    @property
    def overrides(self) -> list[str]:
        """The KEY=VALUE that give this step on its first mesh: behind the planned recipe, or behind any recipe of
        `switchcli pretrain` if a size was planned. Empty if it does not fit."""
        best = self.meshes.best
        if best is None:
            return []
        recipe, mesh, keys = self.recipe, best.mesh, {}
        if self.name in SIZES:
            keys["model.size"] = self.name
            if recipe.model.num_experts > 1:
                keys["model.router.group_sequences"] = str(recipe.model.group_sequences)
            keys["data.objective.inputs_length"] = str(recipe.inputs_length)
            keys["train.batch_tokens"] = str(recipe.train.batch_tokens)
            keys["train.precision"] = recipe.train.precision
        keys |= {key: value for key, _, value in (override.partition("=") for override in self.given)}
        keys["train.microbatch_tokens"] = str(best.microbatch * recipe.inputs_length)
        if recipe.parallel.auto:  # the keys below are the mesh that it would choose
            from_user = keys.get("parallel") == "auto" or "parallel.auto" in keys
            keys = {key: value for key, value in keys.items() if (key, value) != ("parallel", "auto")}
            keys.pop("parallel.auto", None)
            keys |= {} if from_user else {"parallel.auto": "false"}
        keys["parallel.data"] = str(mesh.data)
        for key in ("model", "expert", "shard"):
            if getattr(mesh, key) != getattr(recipe.parallel, key):
                keys[f"parallel.{key}"] = str(getattr(mesh, key))
        return [f"{key}={value}" for key, value in keys.items()]

    @property
    def step_seconds(self) -> float | None:
        """The seconds of a step by `Planner.seconds`; None if the rates of the devices are not known."""
        return self.planner.seconds(self.machine)

    @property
    def days(self) -> float | None:
        """Days of the recipe's steps, without evaluation, checkpoints and stops."""
        return self.step_seconds and self.recipe.train.steps * self.step_seconds / _SECONDS_PER_DAY

    def to_json(self) -> dict[str, Any]:
        machine = self.machine
        return {
            "name": self.name,
            **self.about,
            "flops_per_step": self.planner.flops_per_step,
            "optimizer_flops_per_step": self.planner.optimizer_flops_per_step,
            "activation_checkpointing": self.recipe.train.activation_checkpointing,
            "machine": {
                **machine._asdict(),
                "usable_bytes": machine.usable_bytes,
                "reserved_fraction": devices.RESERVED_FRACTION,
                "flops": machine.flops_per_second(self.planner.step.product_bytes),
                "utilization": devices.UTILIZATION,
            },
            "step_seconds": self.step_seconds,
            "days": self.days,
            "times": TIMES,
            "devices_needed": self.devices_needed,
            "overrides": self.overrides,
            "fits": [
                {
                    **fit.mesh._asdict(),
                    "microbatch_tokens": fit.microbatch * self.recipe.inputs_length,
                    "bytes": {**fit.bytes._asdict(), "total": fit.bytes.total},
                }
                for fit in self.meshes.fits
            ],
            "refused": [
                {**rejection.mesh._asdict(), "kind": rejection.kind, "reason": rejection.reason}
                for rejection in self.meshes.rejected
            ],
        }


def plan_recipe(name: str, overrides: Sequence[str], machine: Machine) -> RecipePlan:
    """Resolve the recipe or the size, and plan its step on every mesh that the recipe allows.

    Raises:
        RecipeError: there is no such recipe or size, a key breaks a rule, or the recipe's mesh needs another number of
            devices.
    """
    recipe = _recipe(name, overrides)
    check_world(recipe.parallel, machine.devices)
    planner = planner_of(recipe, fused=recipe.train.device != "cpu")
    meshes, needed = planner.plan(machine), planner.fewest_devices(machine)
    return RecipePlan(name, tuple(overrides), recipe, planner, machine, meshes, needed)


def plan_sizes(
    overrides: Sequence[str], machine: Machine, show: Callable[[int], None] = lambda count: None
) -> list[RecipePlan]:
    """Plan a step of `SIZES_RECIPE` with each model size, in the order of their parameters.

    All have the same steps, batch and precision. Sizes that the overrides do not suit, such as `parallel.expert=8` a
    dense one, are left out. `show` is called with the number of sizes that are done.

    Raises:
        RecipeError: the overrides name a size, or suit none.
    """
    if any(override.partition("=")[0] == "model.size" for override in overrides):
        raise RecipeError("model.size: all sizes are planned: name this one as the argument, or leave the key out")
    plans, first_error = [], None
    for number, size in enumerate(SIZES, start=1):
        show(number)
        try:
            plans.append(plan_recipe(size, overrides, machine))
        except RecipeError as error:
            first_error = first_error or error
    if first_error and not plans:
        raise first_error
    return sorted(plans, key=lambda plan: plan.about["parameters"])


def _recipe(name: str, overrides: Sequence[str]) -> TrainingRecipe:
    if name in SIZES:
        return recipe_of_size(name, overrides)
    if not Path(name).suffix and not Path(name).exists() and name not in library.recipe_names():
        close = difflib.get_close_matches(name, [*SIZES, *library.recipe_names()], n=1)
        hint = f"Did you mean {close[0]}?" if close else "`switchcli recipes list` shows the recipes that ship."
        raise RecipeError(f"{yaml_nodes.display_key(name)}: no such size or recipe. {hint}")
    source = resolve.read(name, overrides)
    recipe = validate_standalone(source, name)
    if not isinstance(recipe, TrainingRecipe):
        raise RecipeError(
            f"{yaml_nodes.display_key(name)}: a recipe of `switchcli eval` trains nothing: name one that trains"
        )
    if recipe.verb != "pretrain" and source.merge().stated("model.d_model") is None:
        raise RecipeError(f"{yaml_nodes.display_key(name)}: its model is a checkpoint's: say which, by model.size=NAME")
    return recipe


def recipe_of_size(name: str, overrides: Sequence[str]) -> PretrainRecipe:
    """Return `SIZES_RECIPE` with the size, and without its microbatches, so that the plan may choose them.

    Its routing groups are the smallest with at least one target token for each expert, which recipes must have.
    """
    source = resolve.read(SIZES_RECIPE, [f"model.size={name}", "train.microbatch_tokens=null", *overrides])
    router = {"group_sequences": _group_sequences(source)}
    tree = source.merge(resolve.layer({"model": {"router": router}}, f"the size {name}"))
    return resolve.validate(tree, PretrainRecipe)


def _group_sequences(source: resolve.Source) -> int:
    """Return the smallest power of two of rows whose targets have a token for each expert."""
    experts = source.merge().stated("model.num_experts")
    # A dense model, because with experts the recipe may break the rule that is solved here.
    data_keys = tuple(key for key in source.overrides if key.startswith(("data.", "train.")))
    dense = source._replace(overrides=data_keys).merge()
    targets_length = resolve.validate(dense, PretrainRecipe).targets_length
    group_sequences = 1
    while isinstance(experts, int) and group_sequences * targets_length < experts:
        group_sequences *= 2
    return group_sequences
