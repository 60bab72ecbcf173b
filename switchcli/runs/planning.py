"""The size of a recipe's model and run, and the plan of a training step on given devices."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.distributed.mesh import ParallelSpec, check_world
from switchcli.errors import RecipeError
from switchcli.model.flops import FORWARD_AND_BACKWARD, count
from switchcli.planner.plan import Fit, Machine, Plan
from switchcli.planner.step import Mesh
from switchcli.recipe import library, resolve, yaml_nodes
from switchcli.recipe.schema import PretrainRecipe, resolve_standalone
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.runs.mesh_choice import plan_of

BATCH_TOKENS = 2**20
"""Input tokens per step for the plan of a model size, which has no batch size of its own: the paper's batch."""


def describe(recipe: TrainingRecipe) -> dict[str, Any]:
    """Return the parameters, FLOPs and tokens of a run. No model is allocated and no text is read.

    FLOPs are those of the forward pass, by the formula of the paper's section 5.6.
    """
    cost = count(recipe.model, recipe.inputs_length, recipe.targets_length)
    input_tokens = recipe.train.steps * recipe.train.batch_tokens
    return {
        "parameters": cost.parameters,
        "dense_parameters": cost.dense,
        "expert_parameters": cost.expert,
        "active_parameters": cost.active,
        "flops_per_sequence": cost.flops,
        "inputs_length": recipe.inputs_length,
        "targets_length": recipe.targets_length,
        "sequences_per_step": recipe.rows_per_step,
        "steps": recipe.train.steps,
        "input_tokens": input_tokens,
        # A batch holds whole sequences, so the division is exact.
        "target_tokens": input_tokens // recipe.inputs_length * recipe.targets_length,
    }


def describe_as_yaml(recipe: TrainingRecipe) -> str:
    """Return the resolved recipe as YAML, with its description in comments at the top. The text is still a recipe."""
    comments = [f"# {name.replace('_', ' ')}: {value:,}\n" for name, value in describe(recipe).items()]
    return "".join([*comments, resolve.dump(recipe)])


class StepPlan(NamedTuple):
    """The plan of a training step, with the recipe and the devices that it is for."""

    name: str
    """The recipe or the size, as the user named it."""
    recipe: TrainingRecipe
    machine: Machine
    plan: Plan

    @property
    def flops_per_step(self) -> int:
        """The model's FLOPs. Recomputation by activation checkpointing counts only in the seconds of the plan."""
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
                {**rejection.mesh._asdict(), "kind": rejection.kind, "reason": rejection.reason}
                for rejection in self.plan.rejected
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


def plan_step(name: str, overrides: Sequence[str], machine: Machine) -> StepPlan:
    """Resolve the recipe or the size, and plan its step on every mesh that the recipe allows.

    Raises:
        RecipeError: there is no such recipe or size, a key breaks a rule, or the recipe's mesh needs another number of
            devices.
    """
    recipe = _recipe(name, overrides)
    parallel = recipe.parallel
    check_world(parallel, machine.devices)
    plan = plan_of(recipe, machine, fused=recipe.train.device != "cpu")
    if not parallel.is_unset:
        fits = tuple(fit for fit in plan.fits if _allows(parallel, fit.mesh))
        rejected = tuple(rejection for rejection in plan.rejected if _allows(parallel, rejection.mesh))
        plan = Plan(fits, rejected)
    return StepPlan(name, recipe, machine, plan)


def _allows(parallel: ParallelSpec, mesh: Mesh) -> bool:
    """Return whether the mesh is as the recipe says. Sharding matters only with several data-parallel ranks."""
    shard = parallel.shard if mesh.data > 1 else "none"
    if parallel.data not in (None, mesh.data):
        return False
    return (mesh.expert, mesh.model, mesh.shard) == (parallel.expert, parallel.model, shard)


def _recipe(name: str, overrides: Sequence[str]) -> TrainingRecipe:
    if name in SIZES:
        return _recipe_of_size(name, overrides)
    if not Path(name).suffix and not Path(name).exists() and name not in library.recipe_names():
        close = difflib.get_close_matches(name, [*SIZES, *library.recipe_names()], n=1)
        hint = f"Did you mean {close[0]}?" if close else "`switchcli recipes list` shows the recipes that ship."
        raise RecipeError(f"{yaml_nodes.display_key(name)}: no such size or recipe. {hint}")
    recipe = resolve_standalone(name, overrides)
    if not isinstance(recipe, TrainingRecipe):
        raise RecipeError(
            f"{yaml_nodes.display_key(name)}: a recipe of `switchcli eval` trains nothing: name one that trains"
        )
    tree = resolve.load(name, overrides)
    if recipe.verb != "pretrain" and resolve.stated(tree, "model.d_model") is None:
        raise RecipeError(f"{yaml_nodes.display_key(name)}: its model is a checkpoint's: say which, by model.size=NAME")
    return recipe


def _recipe_of_size(name: str, overrides: Sequence[str]) -> PretrainRecipe:
    """Return a recipe of the size with the paper's batch and selective precision.

    Its routing groups are the smallest with at least one target token for each expert, which recipes must have.
    """
    defaults: dict[str, Any] = {"train": {"steps": 1, "batch_tokens": BATCH_TOKENS, "precision": "selective"}}
    where, keys = f"the size {name}", [f"model.size={name}", *overrides]
    # The overrides of data alone give the length of a row's targets.
    data_keys = [key for key in overrides if key.startswith("data.")]
    data_tree = resolve.load(None, data_keys, resolve.layer(defaults, where))
    targets_length = resolve.validate(data_tree, PretrainRecipe).targets_length
    experts = resolve.stated(resolve.load(None, keys), "model.num_experts")
    group_sequences = 1
    while isinstance(experts, int) and group_sequences * targets_length < experts:
        group_sequences *= 2
    defaults["model"] = {"router": {"group_sequences": group_sequences}}
    tree = resolve.load(None, keys, resolve.layer(defaults, where))
    return resolve.validate(tree, PretrainRecipe)
