"""The plan of every model size on given devices: which sizes fit, how fast, and with which keys."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from switchcli.errors import RecipeError
from switchcli.metric_names import TOKENS_PER_SECOND
from switchcli.planner.plan import Machine
from switchcli.recipe.schema import PretrainRecipe
from switchcli.recipe.sizes import SIZES
from switchcli.runs.planning import SIZES_RECIPE, TIMES, StepPlan, describe, machine_to_json, plan_step


class SizePlans(NamedTuple):
    """The plans of all sizes on the same devices, with the same batch."""

    machine: Machine
    rows: tuple[StepPlan, ...]

    @property
    def recipe(self) -> PretrainRecipe:
        """The recipe of one of the sizes: all have the same steps, batch and precision."""
        recipe = self.rows[0].recipe
        assert isinstance(recipe, PretrainRecipe)
        return recipe

    def to_json(self) -> dict[str, Any]:
        about = describe(self.recipe)
        return {
            "recipe": SIZES_RECIPE,
            "steps": about["steps"],
            "input_tokens": about["input_tokens"],
            "machine": machine_to_json(self.machine, self.rows[0].product_bytes),
            "times": TIMES,
            "sizes": [_row_to_json(row) for row in self.rows],
        }


def plan_sizes(
    overrides: Sequence[str], machine: Machine, show: Callable[[int], None] = lambda count: None
) -> SizePlans:
    """Plan a step of `SIZES_RECIPE` with each model size, in the order of their parameters.

    Sizes that the overrides do not suit, such as `parallel.expert=8` a dense one, are left out. `show` is
    called with the number of sizes that are done.

    Raises:
        RecipeError: the overrides name a size, or suit none.
    """
    if any(override.partition("=")[0] == "model.size" for override in overrides):
        raise RecipeError("model.size: all sizes are planned: name this one as the argument, or leave the key out")
    rows, first_error = [], None
    for count, size in enumerate(SIZES, start=1):
        show(count)
        try:
            rows.append(plan_step(size, overrides, machine))
        except RecipeError as error:
            first_error = first_error or error
    if first_error and not rows:
        raise first_error
    rows.sort(key=lambda row: describe(row.recipe)["parameters"])
    return SizePlans(machine, tuple(rows))


def _row_to_json(row: StepPlan) -> dict[str, Any]:
    """Return the row of a size. What follows from a mesh is null where none fits."""
    about, best = describe(row.recipe), row.best
    return {
        "size": row.name,
        "parameters": about["parameters"],
        "active_parameters": about["active_parameters"],
        "fits": best is not None,
        "devices_needed": row.devices_needed,
        "mesh": best and best.mesh._asdict(),
        "microbatch_tokens": best and best.microbatch * row.recipe.inputs_length,
        "device_bytes": best and best.bytes.total,
        "step_seconds": best and best.step_seconds,
        TOKENS_PER_SECOND: best and row.tokens_per_second(best),
        "days": best and row.days(best),
        "overrides": row.overrides,
    }
