"""`switchcli pretrain`: a recipe into a trained, evaluated, resumable model, on plain text."""

from collections.abc import Callable
from functools import partial
from typing import Any

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.batch import Batch
from switchcli.data.config import DataSpec
from switchcli.data.prepare.pipeline import Prepared
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import Runtime
from switchcli.distributed.layout import Weights
from switchcli.errors import RecipeError
from switchcli.model.init import initial_weights
from switchcli.model.packing import segments_of
from switchcli.recipe.schema import OnText, PretrainRecipe
from switchcli.report.console import Console
from switchcli.runs import text_sets, warm_start
from switchcli.runs.data import Text
from switchcli.runs.mesh_choice import runtime_of
from switchcli.runs.run_dir import Options, claim
from switchcli.runs.trainer import NUM_SAMPLES, Training, Verb
from switchcli.runs.warm_start import Starting
from switchcli.spec import PAD
from switchcli.train import memory
from switchcli.train.loss import Objective, cross_entropy, packed_cross_entropy
from switchcli.train.optimizers import Optimizer


def pretrain(pretraining: Starting[PretrainRecipe], options: Options) -> dict[str, Any]:
    """Train what is left of the run in `options.out`; its result, also in result.json, or {} off the main rank.

    Raises:
        Interrupted: stopped by a signal, after saving.
        SwitchError: as each part says.
    """
    recipe, opened = pretraining
    runtime = runtime_of(recipe)
    console = Console(quiet=options.quiet or not runtime.is_main)
    with (
        claim(options, recipe, runtime, console) as folder,
        memory.explained(recipe.model, recipe.optimizer, runtime.device),
    ):

        def text() -> Text:
            if recipe.start is None:
                return text_of(recipe, lambda: _by_its_own(recipe, folder, console), runtime, console)
            tokenizer = warm_start.tokenizer_of(opened, folder, runtime)
            return text_of(recipe, lambda: cut_by(tokenizer, recipe, console), runtime, console)

        def begin(weights: Weights, optimizer: Optimizer) -> None:
            if recipe.start is None:
                weights.fill(initial_weights(recipe.model, recipe.train.seed, weights.experts))
            else:
                warm_start.begin(recipe.start, opened, weights, optimizer)

        verb = Verb(objective_of(recipe.data), text, begin)
        result = Training(recipe, folder, runtime, console, verb).run()
        runtime.close()
    return result


def text_of(recipe: OnText, prepared: Callable[[], Prepared], runtime: Runtime, console: Console) -> Text:
    """Rows of the recipe's text. Raises DataError as each part says."""
    found = runtime.on_main(prepared) or prepared()  # the main rank fills the cache that the others read
    data, rows_per_step = recipe.data, recipe.rows_per_step
    read = (text_sets.live if data.access == "stream" else text_sets.prepared)(recipe, found, runtime, console)
    held_out = text_sets.held_out(found, data.rows, recipe.eval.sequences)

    def check() -> None:
        found.check()  # of a stream what it is evaluated on
        read.check()

    return Text(
        found.tokenizer,
        read.identity,
        read.rows,
        held_out,
        _first_of_each(next(iter(held_out.values())).rows(0, NUM_SAMPLES)),
        shown=lambda step: {"mixture": read.mixture.compared(step * rows_per_step)} if read.mixture else {},
        stream=read.stream,
        former_identity=read.former_identity,
        check=check,
    )


def objective_of(data: DataSpec) -> Objective:
    """What is minimised, by how rows are packed."""
    return packed_cross_entropy if data.packing == "documents" else cross_entropy


def _first_of_each(batch: Batch) -> Batch:
    """The first text of each row alone."""
    return Batch(*(ids.where(text == 0, PAD) for ids, text in zip(batch, segments_of(*batch), strict=True)))


def fits(recipe: OnText, tokenizer: Tokenizer) -> None:
    """Raise a RecipeError for a vocabulary that is larger than the model's, a DataError for one that will not do for
    what is asked of the text."""
    pieces, rows = tokenizer.vocab_size, recipe.model.vocab_size
    if pieces > rows:
        raise RecipeError(
            f"model.vocab_size ({rows}) must be at least the {pieces} pieces of the tokenizer: try {pieces}"
        )
    recipe.data.rows.build(tokenizer)


def cut_by(tokenizer: Tokenizer, recipe: OnText, console: Console) -> Prepared:
    """The recipe's text as ids of a vocabulary that is there."""
    return text_sets.found(recipe.data, recipe.eval.sequences, console, tokenizer, partial(fits, recipe))


def _by_its_own(recipe: OnText, folder: RunFolder, console: Console) -> Prepared:
    """The same by the vocabulary that the run began with: one trained again need not be the same."""
    if folder.tokenizer.exists():
        first = Tokenizer.read(folder.tokenizer)
        return cut_by(first, recipe, console)
    found = text_sets.found(recipe.data, recipe.eval.sequences, console, accept=partial(fits, recipe))
    folder.write_tokenizer(found.tokenizer.to_json())
    return found
