"""Branch a run: start a new run from a checkpoint of an existing one, with settings that a resume would refuse.

A branch continues the weights, the optimizer state, the steps and, if its data is that of the other run, the position
in the data. Its evaluations begin anew. The other run is only read, so it may be training.
"""

from collections.abc import Iterable

import torch

from switchcli.checkpoint.model_weights import load_weights
from switchcli.checkpoint.saved_state import BranchPoint
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import RecipeError
from switchcli.recipe.resolve import Difference, differences
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.inputs.trained_recipe import trained_recipe
from switchcli.runs.job.pins import BRANCH_FROM, WEIGHTS_ONLY
from switchcli.runs.job.run_dir import PLACE_OF_DATA
from switchcli.training.checkpointer import load_optimizer_state
from switchcli.training.optimizers import Optimizer
from switchcli.training.state import TrainState

_NAMES_OF_TEXT = ("data.tokenizer", "data.corpora")
"""Keys that say what the text is. A digest tells whether it is the same."""


def check(handle: CheckpointHandle, recipe: TrainingRecipe) -> None:
    """Raise RecipeError if a run of `recipe` takes no step after the checkpoint."""
    if recipe.train.steps <= handle.step:
        raise RecipeError(
            f"train.steps ({recipe.train.steps}): counts from the beginning of {handle.path.parents[1]}, and the "
            f"branch begins after step {handle.step}: take more, such as {2 * handle.step}, or an earlier checkpoint "
            f"({BRANCH_FROM} RUN@STEP)"
        )


def load(handle: CheckpointHandle, weights: ModelWeights, optimizer: Optimizer) -> None:
    """Load the weights and the optimizer state of the checkpoint into a new run.

    Raises:
        CheckpointError: the optimizer is of another kind, or has state that the checkpoint lacks.
    """
    assert handle.native is not None, "checked when it was opened"
    load_weights(weights, handle.weights())
    if optimizer.state():
        load_optimizer_state(
            optimizer, handle.native, weights.experts, f"take the optimizer of that run, or, {WEIGHTS_ONLY}."
        )


def begin(state: TrainState, handle: CheckpointHandle, recipe: TrainingRecipe, same_text: bool) -> str:
    """Set the state of a new run to that of the checkpoint, and return what became of the position in the data.

    Steps, seconds, target tokens and skipped steps go on. Evaluations, best values and metrics since the last record
    begin anew: they may be of other data or settings.

    Args:
        state: the state of the new run.
        handle: the checkpoint.
        recipe: the recipe of the new run.
        same_text: whether the data is that of the checkpoint, by its digest.
    """
    assert handle.native is not None, "checked when it was opened"
    saved = TrainState()
    saved.restore(handle.native.document("state.json"), torch.device("cpu"), with_metrics=False)
    state.step, state.seconds = saved.step, saved.seconds
    state.targets_seen, state.skipped_steps = saved.targets_seen, saved.skipped_steps
    trained = trained_recipe(handle)
    assert trained is not None, "checked when it was opened"
    changed = _first_data_change(differences(trained, recipe)) or ("" if same_text else "its text")
    rows, rows_before = recipe.rows_per_step, trained.rows_per_step
    input_tokens = saved.input_tokens(trained.train.batch_tokens)
    if changed:
        state.branch = BranchPoint(saved.step, input_tokens, -saved.step * rows, is_data_continued=False)
        return f"the data begins anew ({changed} is another)"
    # The first row of the next step, in the order of the data, is the one after the last row of that run.
    row_offset = saved.branch.row_offset + saved.step * (rows_before - rows)
    state.branch = BranchPoint(saved.step, input_tokens, row_offset)
    state.position = saved.position
    return "the data goes on where that run was"


def _first_data_change(changes: Iterable[Difference]) -> str | None:
    """Return the first key that changes which rows a step reads besides the text itself, or None."""
    for key, _, _ in changes:
        is_data = key.startswith(("data.", "tasks")) or key == "train.seed"
        is_place = PLACE_OF_DATA.match(key) or key.startswith(_NAMES_OF_TEXT)
        if is_data and not is_place and not key.endswith(".unreadable"):
            return key
    return None
