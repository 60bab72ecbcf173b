"""Build the training and held-out rows of a run on text, from prepared text or from a stream."""

import resource
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial

from switchcli.data.batch import BatchSource
from switchcli.data.config import DataSpec, RowObjective
from switchcli.data.dataset import TokenDataset, group_small_shards
from switchcli.data.prepare.cache import PrepareContext, default_cache
from switchcli.data.prepare.pipeline import (
    PreparedTexts,
    held_out_sample,
    load_tokenizer,
    prepare,
    source_digest,
)
from switchcli.data.prepare.prepared_text import HELD_OUT, SPLITS, TRAIN
from switchcli.data.prepare.store import digest_of
from switchcli.data.sources.records import RowCorpus
from switchcli.data.streaming import CorpusShards, StreamedTextSource, source_shards_of
from switchcli.data.text_batches import PreparedTextSource, num_hidden_bytes
from switchcli.data.text_mixture import TextMixture
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.errors import DataError
from switchcli.recipe.schema import TextRecipe
from switchcli.runs.inputs.train_data import UNKNOWN_LIMIT, check_same_data, unknown_fraction, warn_of_unknown
from switchcli.terminal.console import Console
from switchcli.terminal.table import Table
from switchcli.training.loss import Objective, cross_entropy, packed_cross_entropy
from switchcli.training.microbatches import STEPS_AHEAD
from switchcli.training.validation import HeldOutText

BYTES_PER_TOKEN = 4
"""The bytes of a token of English text with a vocabulary of 32,000 pieces, for text that is not tokenized yet."""
HELD_OUT_SEED = 0
"""The seed of held-out batches. It differs from the run's seed, so that all runs are measured on the same batches."""


def prepare_context(console: Console) -> PrepareContext:
    """Return a context that prepares with the default cache and all processors, and reports to the console."""
    return PrepareContext(default_cache(), console.track, console.counting, warn=console.warning, wait=console.waiting)


TrainRows = tuple[BatchSource, str]
"""The source of a run's training rows, and a digest of all that they depend on."""


def prepare_texts(
    data: DataSpec,
    sequences: int,
    console: Console,
    tokenizer: Tokenizer | None = None,
    accept: Callable[[Tokenizer], None] = lambda tokenizer: None,
    needed: Collection[str] = SPLITS,
) -> PreparedTexts:
    """Tokenize the text. For a stream, only as much held-out text as `sequences` rows of evaluation need.

    `tokenizer` replaces that of `data`. `accept` raises an error for an unfit tokenizer before any text is tokenized.
    Splits that are `needed` may not be empty.

    Raises:
        DataError: the text or the tokenizer cannot be used.
    """
    console.message(f"preparing {_described(data, tokenizer is None)}")
    context = prepare_context(console)._replace(accept=accept, needed=needed)
    if data.access == "prepared":
        return prepare(data, context, tokenizer)
    tokenizer = tokenizer or load_tokenizer(data, context)
    accept(tokenizer)
    return held_out_sample(data, context, tokenizer, sequences * data.rows.raw_tokens_per_row)


def _described(data: DataSpec, with_tokenizer: bool) -> str:
    """Return what is prepared, such as `text (python-stdlib) and tokenizer`."""
    kinds = ", ".join(dict.fromkeys(corpus.kind for corpus in data.corpora))
    what = "the held-out part of the stream" if data.access == "stream" else "text"
    trains = with_tokenizer and data.tokenizer.kind == "train"
    return f"{what} ({kinds}){' and tokenizer' if trains else ''}, cached for later runs"


def train_rows(recipe: TextRecipe, text: PreparedTexts, context: DistributedContext, console: Console) -> TrainRows:
    """Return the training rows of the recipe's text. With a stream, `text` is only the held-out text. Collective.

    Raises:
        DataError: the text cannot be used, or the ranks read different texts.
        RecipeError: the mixture or the stream cannot be made of these texts.
    """
    build = _streamed_rows if recipe.data.access == "stream" else _prepared_rows
    return build(recipe, text, context, console)


def training_identity(recipe: TextRecipe, text: PreparedTexts) -> str:
    """Return the identity of the rows that `train_rows` makes of the recipe's text, on any number of ranks.

    Raises:
        DataError: the text cannot be used.
        RecipeError: the mixture cannot be made of these texts.
    """
    data = recipe.data
    if data.access == "prepared":
        datasets = _datasets(text, TRAIN, data.rows, recipe.train.seed)
        return _prepared_identity(text, _prepared_mixture(recipe, text, datasets))
    # The shards of a hub's dataset are asked of the hub, which may be out of reach.
    mixture = None if data.mixture.kind == "joined" else _stream_mixture(recipe, _stream_source_shards(data))
    return _stream_identity(data, text.tokenizer, mixture)


def _prepared_rows(recipe: TextRecipe, text: PreparedTexts, context: DistributedContext, console: Console) -> TrainRows:
    """Return training rows of prepared text.

    Raises:
        DataError: a text is smaller than a row.
        RecipeError: the mixture cannot be made of these texts.
    """
    data, seed, batch_rows = recipe.data, recipe.train.seed, recipe.rows_per_step
    _raise_open_files_limit()  # two for each shard of the windows of each text
    datasets = _datasets(text, TRAIN, data.rows, seed)
    mixture = _prepared_mixture(recipe, text, datasets)
    if context.is_main:
        _report_training_text(text, datasets, mixture, recipe, console)
    source = PreparedTextSource([*datasets.values()], text.tokenizer, data.rows, seed, batch_rows, mixture)
    return source, _prepared_identity(text, mixture)


def _prepared_mixture(
    recipe: TextRecipe, text: PreparedTexts, datasets: Mapping[str, TokenDataset]
) -> TextMixture | None:
    """Return the mixture of the training rows. Raises RecipeError if it cannot be made of these texts."""
    rows_per_epoch = [dataset.rows_per_epoch for dataset in datasets.values()]
    tokens = [prepared.counts[TRAIN].tokens for prepared in text.texts.values()]
    num_rows = recipe.train.steps * recipe.rows_per_step
    return recipe.data.build_mixture(tokens, rows_per_epoch, num_rows, recipe.train.seed)


def _prepared_identity(text: PreparedTexts, mixture: TextMixture | None) -> str:
    return text.identity if mixture is None else digest_of({"text": text.identity, "mixture": mixture.identity})


def _streamed_rows(recipe: TextRecipe, text: PreparedTexts, context: DistributedContext, console: Console) -> TrainRows:
    """Return training rows that are read and tokenized during training. `text` is the prepared held-out text.

    Raises:
        DataError: the mixture depends on the sizes of texts, and one is not known; or the ranks read different texts.
        RecipeError: as `StreamedTextSource` says.
    """
    data = recipe.data
    shards = _stream_source_shards(data)
    mixture = _stream_mixture(recipe, shards)
    identity = _stream_identity(data, text.tokenizer, mixture)
    check_same_data({"the streamed text": identity}, context)  # so far only its held-out part was compared
    _raise_open_files_limit()  # each stream shard keeps a source shard of each text open
    source = StreamedTextSource(
        data,
        shards,
        text.tokenizer,
        mixture,
        recipe.train.seed,
        recipe.rows_per_step,
        (context.dp_rank, context.dp_size),
        kept_steps=STEPS_AHEAD + 2,
    )
    return source, identity


def _stream_source_shards(data: DataSpec) -> dict[str, CorpusShards]:
    return {label: source_shards_of(corpora) for label, corpora in data.texts().items()}


def _stream_mixture(recipe: TextRecipe, shards: Mapping[str, CorpusShards]) -> TextMixture | None:
    """Return the mixture of the training rows.

    Raises:
        DataError: the mixture depends on the sizes of texts, and one is not known.
        RecipeError: the mixture cannot be made of these texts.
    """
    data = recipe.data
    shard_sizes = {label: [shard.size for _, shard in text_shards] for label, text_shards in shards.items()}
    unknown = [label for label, sizes in shard_sizes.items() if None in sizes]
    if data.mixture.uses_sizes and unknown:
        raise DataError(
            f"data.mixture: the size of {unknown[0]} is not known before it is read, and kind {data.mixture.kind} "
            "needs it: take mixture.kind=weighted and a weight for each corpus, or access=prepared"
        )
    # Bytes stand for tokens, and for rows per epoch, which are not known before the text is read.
    text_sizes = [max(1, sum(size or 0 for size in sizes)) for sizes in shard_sizes.values()]
    return data.build_mixture(text_sizes, text_sizes, recipe.train.steps * recipe.rows_per_step, recipe.train.seed)


def _stream_identity(data: DataSpec, tokenizer: Tokenizer, mixture: TextMixture | None) -> str:
    """Return the identity of a stream's rows."""
    # Without the rules for unreadable rows, so that a run stopped by one can be resumed with rules that skip it.
    corpora = tuple(
        corpus.model_copy(update={"unreadable": "refuse"}) if isinstance(corpus, RowCorpus) else corpus
        for corpus in data.corpora
    )
    text = source_digest(data.model_copy(update={"corpora": corpora}), tokenizer)
    # The format says how rows are divided among the stream shards: by a hash.
    identity = {"mixture": mixture and mixture.identity, "stream_shards": data.stream_shards, "text": text, "format": 2}
    return digest_of(identity)


def _raise_open_files_limit() -> None:
    """Raise the soft limit of open files to the hard limit, if the system allows it."""
    with suppress(ValueError, OSError):
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def _datasets(text: PreparedTexts, part: str, rows: RowObjective, seed: int) -> dict[str, TokenDataset]:
    """Return the rows of a part (train or held out) of each text, by label. A label only names the text in errors."""
    return {
        label: TokenDataset(group_small_shards(prepared.shards[part]), rows, seed, label)
        for label, prepared in text.texts.items()
    }


def text_loss(data: DataSpec) -> Objective:
    """Return the loss for rows that are packed as `data` says."""
    return packed_cross_entropy if data.packing == "documents" else cross_entropy


def held_out_rows(text: PreparedTexts, data: DataSpec, sequences: int, console: Console) -> dict[str, HeldOutText]:
    """Return at most `sequences` held-out rows of each text, and how many bytes of text their targets stand for.

    Warn of a text with many characters that the vocabulary lacks. Its bytes are left unknown: bits per byte would be
    low, because those characters look alike.
    """
    texts = {}
    for label, dataset in _datasets(text, HELD_OUT, data.rows, HELD_OUT_SEED).items():
        source = PreparedTextSource([dataset], text.tokenizer, data.rows, HELD_OUT_SEED, sequences)
        num_rows = min(sequences, dataset.rows_per_epoch)
        unknown = unknown_fraction(text.texts[label], text.tokenizer)
        warn_of_unknown(label or "text", unknown, console)
        num_bytes = None
        if unknown <= UNKNOWN_LIMIT:
            num_bytes = num_hidden_bytes(source.batch(0, 0, num_rows), text.tokenizer)
        texts[label] = HeldOutText(partial(source.batch, 0), num_rows, num_bytes, text_loss(data))
    return texts


def warn_of_large_step(about: str, epochs: float, recipe: TextRecipe, console: Console) -> None:
    """Print a warning if a step is more than one epoch of the text. `about` stands before the number."""
    if epochs > 1:
        console.warning(
            f"train.batch_tokens ({recipe.train.batch_tokens:,}): each step reads the text {about}{epochs:.3g} times: "
            "lower it, or name more text"
        )


def _report_training_text(
    text: PreparedTexts,
    datasets: Mapping[str, TokenDataset],
    mixture: TextMixture | None,
    recipe: TextRecipe,
    console: Console,
) -> None:
    """Print the size of each text, its share of the rows, and its epochs in the run."""
    steps, rows_per_step = recipe.train.steps, recipe.rows_per_step
    warn_of_large_step(
        "", rows_per_step / sum(dataset.rows_per_epoch for dataset in datasets.values()), recipe, console
    )
    # As if each were the only text.
    epochs = {label: steps * rows_per_step / dataset.rows_per_epoch for label, dataset in datasets.items()}
    if mixture is None:
        ((label, prepared),) = text.texts.items()
        documents, tokens, _ = prepared.counts[TRAIN]
        console.message(
            f"training text: {documents:,} documents, {tokens:,} tokens; the run is {epochs[label]:.3g} epochs"
        )
    else:
        lines = []
        for label, share in mixture.fractions.items():
            documents, tokens, _ = text.texts[label].counts[TRAIN]
            lines.append([label, f"{documents:,}", f"{tokens:,}", f"{share:.2%}", f"{share * epochs[label]:.3g}"])
        columns = ("", "documents", "tokens", "share of the rows", "epochs in the run")
        console.show(Table(columns, lines, "training text"))
    for label, prepared in text.texts.items():
        if dropped := ", ".join(f"{count:,} {reason}" for reason, count in prepared.dropped.items() if count):
            console.message(f"left out{f' of {label}' if label else ''}: {dropped}")
