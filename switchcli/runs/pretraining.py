"""Pretraining: the training task of `switchcli pretrain`, and functions that all runs on plain text share."""

from functools import partial

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.batch import Batch
from switchcli.data.config import DataSpec
from switchcli.data.prepare.pipeline import PreparedTexts
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import RecipeError
from switchcli.model.init import initial_weights
from switchcli.model.packing import segment_ids
from switchcli.recipe.schema import PretrainRecipe, TextRecipe
from switchcli.report.console import Console
from switchcli.runs import text_sets, warm_start
from switchcli.runs.train_data import NUM_SAMPLES, TrainData, check_same_data
from switchcli.runs.training_task import TrainingTask
from switchcli.runs.warm_start import TrainJob
from switchcli.spec import PAD
from switchcli.training.loss import Objective, cross_entropy, packed_cross_entropy
from switchcli.training.optimizers import Optimizer


class Pretraining(TrainingTask):
    """Train on plain text, from scratch or from a checkpoint."""

    def __init__(
        self, job: TrainJob[PretrainRecipe], folder: RunFolder, context: DistributedContext, console: Console
    ) -> None:
        self._job, self._folder, self._context, self._console = job, folder, context, console
        self.validation_loss = text_loss(job.recipe.data)

    def build_data(self) -> TrainData:
        recipe, context, console = self._job.recipe, self._context, self._console
        # A resumed run uses the tokenizer in its folder, because one that is trained again may differ.
        if recipe.start is None and not (self._folder.is_resumed and self._folder.tokenizer.exists()):
            accept = partial(check_tokenizer_fits, recipe)
            main = context.main_only(
                lambda: text_sets.prepare_texts(recipe.data, recipe.eval.sequences, console, accept=accept)
            )
            # One rank trains the vocabulary: another training may order words of equal frequency otherwise.
            tokenizer_text = context.all_gather_text(main.tokenizer.to_json() if main else "")[0]
            prepared = context.main_first(
                lambda: main or prepare_with_tokenizer(Tokenizer.from_json(tokenizer_text), recipe, console)
            )
        else:
            tokenizer = warm_start.start_tokenizer(self._job, self._folder)
            prepared = context.main_first(lambda: prepare_with_tokenizer(tokenizer, recipe, console))
        return build_text_data(recipe, prepared, context, console)

    def init_weights(self, weights: ModelWeights, optimizer: Optimizer) -> None:
        recipe = self._job.recipe
        if recipe.start is None:
            weights.load_full(initial_weights(recipe.model, recipe.train.seed, weights.experts))
        else:
            warm_start.load_start(recipe.start, self._job.start, weights, optimizer, self._console)


def build_text_data(
    recipe: TextRecipe, prepared: PreparedTexts, context: DistributedContext, console: Console
) -> TrainData:
    """Return the training and held-out rows of the recipe's text.

    With a stream, `prepared` is only the held-out text.

    Raises:
        DataError: the text cannot be used, or the ranks read different texts.
    """
    check_same_data(prepared.digests(), context)
    rows = text_sets.train_rows(recipe, prepared, context, console)
    held_out = text_sets.held_out_rows(prepared, recipe.data.rows, recipe.eval.sequences)
    first_text = next(iter(held_out.values()))
    return TrainData(
        prepared.tokenizer,
        rows.identity,
        rows.source,
        held_out,
        _first_segments(first_text.rows(0, NUM_SAMPLES)),
    )


def text_loss(data: DataSpec) -> Objective:
    """Return the loss for rows that are packed as `data` says."""
    return packed_cross_entropy if data.packing == "documents" else cross_entropy


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


def prepare_with_tokenizer(tokenizer: Tokenizer, recipe: TextRecipe, console: Console) -> PreparedTexts:
    """Return the recipe's text, tokenized by `tokenizer`. Raises like `check_tokenizer_fits` and `prepare_texts`."""
    return text_sets.prepare_texts(
        recipe.data, recipe.eval.sequences, console, tokenizer, partial(check_tokenizer_fits, recipe)
    )
