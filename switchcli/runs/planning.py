"""The plan of a step on given devices, of a recipe or a size: which meshes fit, and what they take."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.distributed.mesh import ParallelSpec, check_world
from switchcli.errors import RecipeError
from switchcli.model.flops import FORWARD_AND_BACKWARD
from switchcli.planner.plan import Fit, Machine, Plan
from switchcli.planner.step import Mesh
from switchcli.recipe import library, resolve, yaml_nodes
from switchcli.recipe.schema import PretrainRecipe, resolve_standalone
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.runs.describe import describe
from switchcli.runs.mesh_choice import plan_of

BATCH_TOKENS = 2**20
"""Of a size, which has no batch: the paper's."""


class Planned(NamedTuple):
    """A plan, and of what."""

    name: str
    recipe: TrainingRecipe
    machine: Machine
    plan: Plan

    @property
    def flops_per_step(self) -> int:
        """The model's FLOPs. Those that activation checkpointing computes again are in the seconds alone."""
        return FORWARD_AND_BACKWARD * self.recipe.rows_per_step * int(describe(self.recipe)["flops_per_sequence"])

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **describe(self.recipe),
            "flops_per_step": self.flops_per_step,
            "activation_checkpointing": self.recipe.train.activation_checkpointing,
            "machine": self.machine._asdict(),
            "fits": [_fit_to_json(fit, self.recipe) for fit in self.plan.fits],
            "refused": [
                {**refusal.mesh._asdict(), "kind": refusal.kind, "reason": refusal.reason}
                for refusal in self.plan.rejected
            ],
        }


def _fit_to_json(fit: Fit, recipe: TrainingRecipe) -> dict[str, Any]:
    return {
        **fit.mesh._asdict(),
        "microbatch_tokens": fit.microbatch * recipe.inputs_length,
        "bytes": {**fit.bytes._asdict(), "total": fit.bytes.total},
        "collectives": [{**call._asdict(), "wire_bytes": call.network_bytes} for call in fit.collectives],
        "seconds": {**fit.seconds, "step": fit.step_seconds},
        "bound_by": fit.bound_by,
    }


def plan_step(name: str, overrides: Sequence[str], machine: Machine) -> Planned:
    """Resolve the recipe or the size, and plan its step.

    Raises:
        RecipeError: no such recipe or size, a key that breaks a rule, a mesh that is not of the devices.
    """
    recipe = _recipe(name, overrides)
    said = recipe.parallel
    check_world(said, machine.devices)
    found = plan_of(recipe, machine, fused=recipe.train.device != "cpu")
    if not said.is_unset:
        fits = (one for one in found.fits if _is_said(one.mesh, said))
        found = Plan(tuple(fits), tuple(one for one in found.rejected if _is_said(one.mesh, said)))
    return Planned(name, recipe, machine, found)


def _is_said(mesh: Mesh, said: ParallelSpec) -> bool:
    """Whether the recipe leaves that mesh open."""
    shard = said.shard if mesh.data > 1 else "none"
    return (said.expert, said.model, shard) == mesh[1:] and said.data in (None, mesh.data)


def _recipe(name: str, overrides: Sequence[str]) -> TrainingRecipe:
    if name in SIZES:
        return _of_size(name, overrides)
    if not Path(name).suffix and not Path(name).exists() and name not in library.recipe_names():
        near = difflib.get_close_matches(name, [*SIZES, *library.recipe_names()], n=1)
        hint = f"Did you mean {near[0]}?" if near else "`switchcli recipes list` shows the recipes that ship."
        raise RecipeError(f"{yaml_nodes.display_key(name)}: no such size or recipe. {hint}")
    recipe = resolve_standalone(name, overrides)
    if not isinstance(recipe, TrainingRecipe):
        raise RecipeError(
            f"{yaml_nodes.display_key(name)}: a recipe of `switchcli eval` trains nothing: name one that does"
        )
    tree = resolve.load(name, overrides)
    if recipe.verb != "pretrain" and resolve.stated(tree, "model.d_model") is None:
        raise RecipeError(f"{yaml_nodes.display_key(name)}: its model is a checkpoint's: say which, by model.size=NAME")
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
