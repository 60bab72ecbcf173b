"""The data of a run on plain text. With a stream, only its held-out text is prepared."""

from functools import partial
from itertools import chain
from typing import Any

from switchcli.data.batch import Batch
from switchcli.data.prepare.pipeline import PreparedTexts
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.errors import RecipeError
from switchcli.model.attention import segment_ids
from switchcli.recipe.schema import TextRecipe
from switchcli.runs.inputs import text_sets
from switchcli.runs.inputs.train_data import NUM_SAMPLES, RunData, TrainData, check_same_data
from switchcli.spec import PAD
from switchcli.terminal.console import Console, main_console


class TextRunData(RunData):
    """Rows of plain text, and held-out text."""

    def __init__(self, recipe: TextRecipe, context: DistributedContext, console: Console) -> None:
        super().__init__(recipe, context, console)
        self.objective = text_sets.text_loss(recipe.data)

    @classmethod
    def open_inputs(cls, recipe: Any, tokenizer: Tokenizer | None) -> float | None:
        named = recipe.data.tokenizer
        if tokenizer is None and named.kind != "train":
            tokenizer = named.load()
        if tokenizer is not None:
            check_tokenizer_fits(recipe, tokenizer)
        corpora = [*chain.from_iterable(recipe.data.texts().values())]
        for corpus in corpora:
            next(corpus.documents())  # raises an error if there is none
        sizes = [corpus.text_bytes() for corpus in corpora]
        if None in sizes:
            return None
        epochs_per_step = recipe.train.batch_tokens * text_sets.BYTES_PER_TOKEN / sum(filter(None, sizes))
        text_sets.warn_of_large_step("about ", epochs_per_step, recipe, main_console())
        return float(recipe.train.steps * epochs_per_step)

    def build(self, tokenizer: Tokenizer | None) -> TrainData:
        recipe, context, console = self._recipe, self._context, self._console
        if tokenizer is None:
            prepared = self._prepare_with_own_tokenizer()
        else:
            prepared = context.main_first(lambda: _prepare(tokenizer, recipe, console))
        check_same_data(prepared.digests(), context)
        source, identity = text_sets.train_rows(recipe, prepared, context, console)
        held_out = text_sets.held_out_rows(prepared, recipe.data, recipe.eval.sequences, console)
        first_text = next(iter(held_out.values()))
        evaluator = self._evaluator(prepared.tokenizer, held_out)
        return TrainData(identity, source, evaluator, _first_segments(first_text.rows(0, NUM_SAMPLES)))

    def _prepare_with_own_tokenizer(self) -> PreparedTexts:
        """Return the text, tokenized by the tokenizer that the recipe names or trains."""
        recipe, context, console = self._recipe, self._context, self._console
        accept = partial(check_tokenizer_fits, recipe)
        main = context.main_only(
            lambda: text_sets.prepare_texts(recipe.data, recipe.eval.sequences, console, accept=accept)
        )
        # One rank trains the vocabulary: another training may order words of equal frequency otherwise.
        tokenizer_text = context.all_gather_text(main.tokenizer.to_json() if main else "")[0]
        return context.main_first(lambda: main or _prepare(Tokenizer.from_json(tokenizer_text), recipe, console))


def _first_segments(batch: Batch) -> Batch:
    """Return the first text of each packed row, with padding in place of the others."""
    inputs_segments, targets_segments = segment_ids(*batch)
    return Batch(batch.inputs_BS.where(inputs_segments == 0, PAD), batch.targets_BT.where(targets_segments == 0, PAD))


def check_tokenizer_fits(recipe: TextRecipe, tokenizer: Tokenizer, is_padded: bool = False) -> None:
    """Check that the tokenizer fits the model and the objective. `is_padded` says that the model will fit any.

    Raises:
        RecipeError: the vocabulary is larger than the model's.
        DataError: the objective needs more sentinels than the tokenizer has.
    """
    pieces, rows = tokenizer.vocab_size, recipe.model.vocab_size
    if pieces > rows and not is_padded:
        raise RecipeError(
            f"model.vocab_size ({rows}) must be at least the {pieces} pieces of the tokenizer: leave it out"
        )
    recipe.data.rows.build(tokenizer)


def _prepare(tokenizer: Tokenizer, recipe: TextRecipe, console: Console) -> PreparedTexts:
    """Return the recipe's text, tokenized by `tokenizer`. Raises like `check_tokenizer_fits` and `prepare_texts`."""
    return text_sets.prepare_texts(
        recipe.data, recipe.eval.sequences, console, tokenizer, partial(check_tokenizer_fits, recipe)
    )
