"""What a training run prints at its start: what it will do, where, and how to stop it."""

from typing import TYPE_CHECKING, Final

from switchcli.runs.devices.costs import describe, muon_warning
from switchcli.runs.inputs.train_data import TrainData
from switchcli.terminal.units import si

if TYPE_CHECKING:
    from switchcli.runs.train.trainer import Trainer

STOPPING: Final = "stopping: this step is finished and saved first; Ctrl-C again ends at once without saving"
"""The answer to the first Ctrl-C in a terminal."""


def announce(run: "Trainer") -> None:
    """Print what the run will do, where, and how to stop it. A run that is complete does nothing more."""
    recipe, state, context, console = run.recipe, run.state, run.context, run.console
    steps, done, batch_tokens = recipe.train.steps, state.step, recipe.train.batch_tokens
    if done == steps:
        return
    first = f", from step {done:,}" if done else ""
    total = state.input_tokens(batch_tokens) + (steps - done) * batch_tokens
    ranks = f", {context.world} ranks" if context.world > 1 else ""
    parameters = describe(recipe)["parameters"]
    console.message(
        f"training {parameters:,} parameters for {steps:,} steps of {batch_tokens:,} tokens{first}: "
        f"{si(total)} tokens, on {context.device.type}{ranks}"
    )
    if context.is_main and (warning := muon_warning(recipe)):
        console.warning(warning)
    held_out, examples = sum(text.num_rows for text in run.evaluator.texts.values()), _num_examples(run.data)
    answers = f" and answering {examples:,} examples" if examples else ""
    evaluating, saving = _times(recipe.eval.every_steps, steps), _times(recipe.checkpoint.save_every_steps, steps)
    console.message(
        f"evaluating on {held_out:,} held-out sequences{answers} {evaluating}, saving a checkpoint {saving}"
    )
    console.message(
        f"writing to {run.folder.path}/; Ctrl-C saves and stops, and {run.folder.same_command} goes on from there"
    )


def _times(every: int, steps: int) -> str:
    """Return when something happens that a run of `steps` steps does every so many of them, and at its end."""
    return f"every {every:,} steps" if every < steps else "at the end"


def not_measured(data: TrainData) -> str:
    """Return what takes time and is not measured before the first evaluation: answering the examples of tasks."""
    examples = _num_examples(data)
    return f"plus the time to evaluate {examples:,} examples" if examples else ""


def _num_examples(data: TrainData) -> int:
    return sum(len(scored.examples) for scored in data.evaluator.tasks)
