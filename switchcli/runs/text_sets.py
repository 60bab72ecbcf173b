"""Prepared texts as what a run reads: chunks of each, how they are mixed, and the rows that it is evaluated on."""

import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from switchcli.data.batch import BatchSource
from switchcli.data.config import DataSpec, RowObjective
from switchcli.data.dataset import TokenDataset, group_small_shards
from switchcli.data.prepare.cache import default_cache
from switchcli.data.prepare.digests import Digests
from switchcli.data.prepare.pipeline import (
    PreparedTexts,
    held_out_sample,
    legacy_source_digest,
    load_tokenizer,
    prepare,
    source_digest,
    with_digests,
)
from switchcli.data.prepare.prepare_context import PrepareContext
from switchcli.data.prepare.prepared_text import HELD_OUT, TRAIN
from switchcli.data.prepare.store import digest_of
from switchcli.data.sources.records import RowCorpus
from switchcli.data.streaming import StreamedTextSource, source_shards_of
from switchcli.data.text_batches import PreparedTextSource, text_fraction
from switchcli.data.text_mixture import TextMixture
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.errors import DataError
from switchcli.recipe.schema import TextRecipe
from switchcli.report.console import Console
from switchcli.train.validation import HeldOutText

HELD_OUT_SEED = 0  # whatever the run's own: figures of runs with other seeds are then on the same batches


def prepare_context(console: Console) -> PrepareContext:
    """Preparing by the default cache, with all processors."""
    return PrepareContext(default_cache(), console.track, console.preparing, warn=console.warning)


class TrainRows(NamedTuple):
    """What the rows of a run come from."""

    source: BatchSource
    identity: str
    """A digest of all that the rows depend on."""
    former_identity: str | None = None
    """The identity that versions up to 0.1 gave to the same text: their checkpoints are accepted too."""
    files: Digests | None = None
    """The files of a stream: their check raises DataError if they are not those that `identity` names any more."""


def prepare_texts(
    data: DataSpec,
    sequences: int,
    console: Console,
    tokenizer: Tokenizer | None = None,
    accept: Callable[[Tokenizer], None] = lambda tokenizer: None,
) -> PreparedTexts:
    """The text as ids; of a stream that alone which `sequences` of evaluation take. `accept` raises what is wrong with
    a tokenizer, before any text is cut. Raises DataError as each part says."""
    using = with_digests(data, prepare_context(console)._replace(accept=accept))
    if data.access == "prepared":
        return prepare(data, using, tokenizer)
    used = tokenizer or load_tokenizer(data, using)
    accept(used)
    return held_out_sample(data, using, used, sequences * data.rows.raw_tokens_per_row)


def prepared_rows(recipe: TextRecipe, text: PreparedTexts, context: DistributedContext, console: Console) -> TrainRows:
    """The rows of prepared text. Raises DataError for a text that is smaller than a row, RecipeError as `shares`."""
    data, seed, batch_rows = recipe.data, recipe.train.seed, recipe.rows_per_step
    _allow_many_files()  # two for each shard of the windows of each text
    chunks = _chunks(text, TRAIN, data.rows, seed)
    rows = recipe.train.steps * batch_rows
    rows_per_epoch = [one.rows_per_epoch for one in chunks.values()]
    tokens = [one.counts[TRAIN].tokens for one in text.texts.values()]
    mixture = data.build_mixture(tokens, rows_per_epoch, rows, seed)
    if context.is_main:
        _tell(text, chunks, mixture, rows, console)
    stream = PreparedTextSource([*chunks.values()], text.tokenizer, data.rows, seed, batch_rows, mixture)
    identity = text.identity if mixture is None else digest_of({"text": text.identity, "mixture": mixture.identity})
    return TrainRows(stream, identity)


def streamed_rows(recipe: TextRecipe, text: PreparedTexts, context: DistributedContext, console: Console) -> TrainRows:
    """Rows that are read as training goes on; `text` is what the run is evaluated on. Raises DataError for a mixture
    by sizes that are not known, RecipeError as `StreamedTextSource`."""
    data, seed, batch_rows = recipe.data, recipe.train.seed, recipe.rows_per_step
    pieces = {label: source_shards_of(corpora) for label, corpora in data.texts().items()}
    sizes = {label: [piece.size for _, piece in each] for label, each in pieces.items()}
    unknown = [label for label, each in sizes.items() if None in each]
    if data.mixture.uses_sizes and unknown:
        raise DataError(
            f"data.mixture: how large {unknown[0]} is is not known before it is read, which a {data.mixture.kind} "
            "needs: take mixture.kind=weighted and a weight for each corpus, or access=prepared"
        )
    known = [max(1, sum(size or 0 for size in each)) for each in sizes.values()]
    mixture = data.build_mixture(known, known, recipe.train.steps * batch_rows, seed)
    _allow_many_files()  # each lane keeps a piece of each text open
    stream = StreamedTextSource(
        data,
        pieces,
        text.tokenizer,
        mixture,
        seed,
        batch_rows,
        (context.dp_rank, context.dp_size),
        kept_steps=recipe.train.batches_ahead + 2,
    )
    bare, using = _bare(data), with_digests(data, prepare_context(console))
    parts = {"mixture": mixture and mixture.identity, "lanes": data.stream_shards}
    now, former = source_digest(bare, text.tokenizer, using), legacy_source_digest(bare, text.tokenizer)
    return TrainRows(stream, digest_of({**parts, "text": now}), digest_of({**parts, "text": former}), using.digests)


def _allow_many_files() -> None:
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def _bare(data: DataSpec) -> DataSpec:
    """The same whatever becomes of rows that cannot be read: a run may go on past one that ended it."""
    corpora = [
        corpus.model_copy(update={"unreadable": "refuse"}) if isinstance(corpus, RowCorpus) else corpus
        for corpus in data.corpora
    ]
    return data.model_copy(update={"corpora": tuple(corpora)})


def _chunks(text: PreparedTexts, part: str, rows: RowObjective, seed: int) -> dict[str, TokenDataset]:
    return {
        label: TokenDataset(group_small_shards(one.shards[part]), rows, seed, label)
        for label, one in text.texts.items()
    }


def held_out_rows(text: PreparedTexts, made_by: RowObjective, sequences: int) -> dict[str, HeldOutText]:
    """The held-out rows of each text, `sequences` at most, and what they are worth in bytes."""
    texts = {}
    for label, chunks in _chunks(text, HELD_OUT, made_by, HELD_OUT_SEED).items():
        stream = PreparedTextSource([chunks], text.tokenizer, made_by, HELD_OUT_SEED, sequences)
        number = min(sequences, chunks.rows_per_epoch)
        fraction = text_fraction(stream.batch(0, 0, number), text.tokenizer)
        bytes_per_target = text.texts[label].counts[HELD_OUT].bytes_per_token * fraction
        texts[label] = HeldOutText(partial(stream.batch, 0), number, bytes_per_target)
    return texts


def _tell(
    text: PreparedTexts, chunks: Mapping[str, TokenDataset], mixture: TextMixture | None, rows: int, console: Console
) -> None:
    """What is trained on: how much there is of each text, its share, and how often the run shows it."""
    epochs = {label: rows / one.rows_per_epoch for label, one in chunks.items()}
    if mixture is None:
        ((label, one),) = text.texts.items()
        documents, tokens, _ = one.counts[TRAIN]
        console.message(
            f"training text: {documents:,} documents, {tokens:,} tokens; the run is {epochs[label]:.3g} epochs"
        )
    else:
        lines = []
        for label, share in mixture.fractions.items():
            documents, tokens, _ = text.texts[label].counts[TRAIN]
            lines.append([label, f"{documents:,}", f"{tokens:,}", f"{share:.2%}", f"{share * epochs[label]:.3g}"])
        console.rows("training text", ("", "documents", "tokens", "share of the rows", "epochs in the run"), lines)
    for label, one in text.texts.items():
        if said := ", ".join(f"{number:,} {reason}" for reason, number in one.dropped.items() if number):
            console.message(f"left out{f' of {label}' if label else ''}: {said}")
