"""The data of an evaluation: the texts and the tasks of its recipe, as a loaded model was trained to read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from switchcli.data.config import DataSpec, TextObjective, TextSpec
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.pipeline import PreparedTexts
from switchcli.data.prepare.prepared_text import HELD_OUT
from switchcli.data.task_batches import InterleavedRows
from switchcli.distributed.context import DistributedContext
from switchcli.errors import DataError, RecipeError
from switchcli.recipe.schema import EvalRecipe, TextRecipe
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.inputs import text_sets
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.inputs.task_data import digests_of, report_task_sets, scored_examples_of
from switchcli.runs.inputs.train_data import check_same_data
from switchcli.runs.inputs.trained_recipe import trained_recipe
from switchcli.tasks import tokens
from switchcli.tasks.config import tasks_of
from switchcli.terminal.console import Console
from switchcli.training.loss import packed_cross_entropy
from switchcli.training.measure import Evaluator
from switchcli.training.validation import HeldOutText

BATCH_ROWS = 16
"""Minimum rows of a batch for the cross-entropy. They are rounded up to whole routing groups."""


class EvalData(NamedTuple):
    """What an evaluation measures a model on."""

    evaluators: tuple[Evaluator, ...]
    """One for each capacity to measure with. They differ in nothing else."""
    prepared: PreparedTexts | None
    """The text, tokenized; None without one."""


def build_eval_data(
    handle: CheckpointHandle, recipe: EvalRecipe, context: DistributedContext, console: Console
) -> EvalData:
    """Read the texts and the tasks. Warn on the main rank about what the model does not know. Collective.

    Raises:
        RecipeError: rows of that length do not suit the objective of the model.
        DataError: the text or the tasks cannot be used, or the ranks read different ones.
    """
    tasks = tasks_of(recipe.tasks)
    trained = trained_recipe(handle)
    if trained is not None and (new_tasks := [name for name in tasks if name not in trained.named_tasks]):
        context.main_only(lambda: _warn_about_new_tasks(handle.path, trained, new_tasks, console))
    scored = context.main_first(
        lambda: scored_examples_of(tasks.values(), recipe.data, recipe.scoring, handle.tokenizer)
    )
    check_same_data(digests_of(scored, handle.tokenizer), context)
    prepared, texts = None, dict[str, HeldOutText]()
    if recipe.text is not None:
        data = _data_spec(trained, recipe.text, recipe.data.inputs_length)
        sequences = recipe.text.sequences
        prepared = context.main_first(
            lambda: text_sets.prepare_texts(data, sequences, console, handle.tokenizer, needed=(HELD_OUT,))
        )
        check_same_data(prepared.digests(), context)
        texts = text_sets.held_out_rows(prepared, data, sequences, console)
    context.main_only(lambda: report_task_sets(tasks.values(), scored, recipe.scoring.split, handle.tokenizer, console))
    labeled = {examples.task.name: labeled_rows(examples) for examples in scored if examples.packed.num_rows}
    # transformers gives each example its own slots, where examples that are packed into a row share them.
    is_packed = bool(recipe.tasks) and trained is None
    evaluators = tuple(
        Evaluator(handle.tokenizer, texts, scored, recipe.scoring, capacity, BATCH_ROWS, context, console, labeled)
        for capacity in recipe.eval.capacities or ("dropless" if is_packed else None,)
    )
    return EvalData(evaluators, prepared)


def labeled_rows(examples: tokens.ScoredExamples) -> HeldOutText:
    """Return the labeled examples of a task, packed into rows, as a text to measure the cross-entropy on."""
    rows = InterleavedRows([examples.packed]).rows
    return HeldOutText(rows, examples.packed.num_rows, objective=packed_cross_entropy)


def training_identity(handle: CheckpointHandle, recipe: EvalRecipe, prepared: PreparedTexts | None) -> str | None:
    """Return the digest of training rows made of this text as the model's were, "" if none can be made.

    None if the recipe names other text than that of the model's own recipe.
    """
    trained, text = trained_recipe(handle), recipe.text
    if prepared is None or text is None or not isinstance(trained, TextRecipe):
        return None
    if (text.corpora, text.held_out_fraction) != (trained.data.corpora, trained.data.held_out_fraction):
        return None
    try:
        return text_sets.training_identity(trained, prepared)
    except (DataError, RecipeError):  # no such rows can be made of this text
        return ""


def _data_spec(trained: TrainingRecipe | None, text: TextSpec, inputs_length: int) -> DataSpec:
    """Return the data of the model's run with this text, in rows of `inputs_length`."""
    data = (trained and trained.text) or DataSpec(objective=SpanCorruption(inputs_length=inputs_length))
    objective = data.objective
    if inputs_length != objective.inputs_length:
        objective = _with_length(objective, inputs_length)
    changes = {"corpora": text.corpora, "held_out_fraction": text.held_out_fraction, "objective": objective}
    return data.model_copy(update=changes)


def _warn_about_new_tasks(path: Path, trained: TrainingRecipe, names: Sequence[str], console: Console) -> None:
    """Print a warning that the model at `path` was not trained on the tasks of these names."""
    if trained.verb == "pretrain":
        effect = "was pre-trained alone: it does not know the form of the answers, and its scores will be near 0"
    else:
        effect = (
            f"was not trained on a task of the name {' or '.join(names)}: if it answers in another form, it scores 0"
        )
    console.warning(f"{path} {effect}; `switchcli finetune` teaches it")


def _with_length(objective: TextObjective, inputs_length: int) -> TextObjective:
    """Return the objective with rows of another length. Raises RecipeError if it does not allow that length."""
    try:
        return type(objective).model_validate({**objective.model_dump(), "inputs_length": inputs_length})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(
            f"data.inputs_length ({inputs_length}) does not suit the objective of the checkpoint's run ({reason}): "
            f"leave it out for rows of {objective.inputs_length} tokens"
        ) from None
