"""The teacher of a run: it is loaded once, and runs in each step."""

import math

from switchcli.distributed.context import DistributedContext
from switchcli.errors import RecipeError
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.transformer import SwitchTransformer
from switchcli.report.console import Console
from switchcli.runs.inputs.loading import CheckpointHandle, load_model
from switchcli.runs.train.distill_rules import Recipe
from switchcli.training.distillation import Teacher


class RunTeacher:
    """The teacher of a run on this rank."""

    def __init__(self, handle: CheckpointHandle, recipe: Recipe, context: DistributedContext, console: Console) -> None:
        """`handle` is its open checkpoint.

        Raises:
            RecipeError: the teacher cannot divide the rows of a microbatch into whole routing groups.
        """
        self._handle, self._recipe, self._context, self._console = handle, recipe, context, console
        self._settings, self._capacity = recipe.distill, recipe.eval.capacity or "dropless"
        context.main_first(self._check_microbatch_rows)
        self._model: SwitchTransformer | None = None

    def _check_microbatch_rows(self) -> None:
        """Raise RecipeError if the teacher cannot divide the rows of a microbatch into whole routing groups."""
        rows = self._recipe.microbatch_rows(self._context.dp_size)
        spec = self._handle.recipe.model
        # Encoder and decoder may have groups of different sizes. The rows must be a multiple of both.
        group, free = (
            math.lcm(*(spec.router_of(stack).group_size(by) for stack in spec.sparse_stacks))
            for by in (self._capacity, "dropless")
        )
        if self._settings.soft_fraction and rows % group:
            # Experts that choose their tokens count in groups in any mode.
            fix = "take eval.capacity=dropless, or" if rows % free == 0 else "take"
            raise RecipeError(
                f"eval.capacity ({self._capacity}): the teacher's routers count capacity over {group} sequences, "
                f"and a microbatch on {self._context.dp_size} ranks has {rows}: {fix} microbatches of a multiple of "
                f"{group * self._recipe.inputs_length} tokens"
            )

    def load(self) -> SwitchTransformer:
        """Return the model, which is loaded on the first call."""
        if self._model is None:
            self._model = load_model(self._handle, self._context.device)
            if self._recipe.train.compile:
                self._context.compile(self._model)
        return self._model

    def unload(self) -> None:
        """Free the memory of the model."""
        self._model = None

    def in_training(self) -> Teacher:
        """Return the teacher as it runs in each step: without dropout and noise."""
        model = self.load()
        evaluate_by(model, self._capacity)
        return Teacher(model, self._handle.recipe.train.precision)
