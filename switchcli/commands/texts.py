"""Prepared texts as what a run reads: chunks of each, how they are mixed, and the rows that it is evaluated on."""

from collections.abc import Callable, Mapping

import numpy as np

from switchcli.data.batch import Batch
from switchcli.data.cache import default_cache
from switchcli.data.chunks import Chunks
from switchcli.data.pieces import HELD_OUT, TRAIN
from switchcli.data.prepare import Means, Prepared
from switchcli.data.spec import DataSpec, Rows
from switchcli.data.store import digest_of
from switchcli.data.stream import TextStream
from switchcli.data.text_mixture import Mixture
from switchcli.report.console import Console
from switchcli.spec import EOS, PAD
from switchcli.train.evaluate import HeldOutText

HELD_OUT_SEED = 0  # whatever the run's own: figures of runs with other seeds are then on the same batches


def means(console: Console) -> Means:
    """Preparing by the default cache, with all processors."""
    return Means(default_cache(), console.track, console.preparing)


def chunks_of(found: Prepared, part: str, rows: Rows, seed: int) -> dict[str, Chunks]:
    """The rows of each text. Raises DataError for a text that is smaller than a row."""
    return {label: Chunks(text.shards[part], rows, seed, label) for label, text in found.texts.items()}


def mixture_of(found: Prepared, data: DataSpec, chunks: Mapping[str, Chunks], rows: int, seed: int) -> Mixture | None:
    """How the texts are mixed in a run of so many rows; None for one text. Raises RecipeError as `Mixing.shares`."""
    if data.mixture.kind == "joined":
        return None
    weights = [sum(corpus.weight for corpus in corpora) for corpora in data.texts().values()]
    tokens = [text.counts[TRAIN].tokens for text in found.texts.values()]
    rows_per_epoch = [one.rows_per_epoch for one in chunks.values()]
    shares = data.mixture.shares(tokens, weights, rows_per_epoch, rows)
    return Mixture(dict(zip(chunks, shares.tolist(), strict=True)), seed)


def identity(found: Prepared, mixture: Mixture) -> str:
    """A digest of all that the rows of a mixture depend on."""
    return digest_of({"texts": found.identity, "shares": mixture.shares})


def held_out(found: Prepared, made_by: Rows, sequences: int) -> dict[str, HeldOutText]:
    """The held-out rows of each text, `sequences` at most, and what they are worth in bytes."""
    texts = {}
    for label, chunks in chunks_of(found, HELD_OUT, made_by, HELD_OUT_SEED).items():
        rows = TextStream([chunks], found.tokenizer, made_by, HELD_OUT_SEED, sequences)
        number = min(sequences, chunks.rows_per_epoch)
        counts = found.texts[label].counts[HELD_OUT]
        share = _text_fraction(rows.batch(0, 0, number), found)
        texts[label] = HeldOutText(_reader(rows), number, counts.bytes / counts.tokens * share)
    return texts


def tell(found: Prepared, chunks: Mapping[str, Chunks], mixture: Mixture | None, rows: int, console: Console) -> None:
    """What is trained on: how much there is of each text, its share, and how often the run shows it."""
    shares = mixture.shares if mixture else dict.fromkeys(chunks, 1.0)
    lines = []
    for label, text in found.texts.items():
        epochs = shares[label] * rows / chunks[label].rows_per_epoch
        counts = text.counts[TRAIN]
        lines.append(
            [label or "all", f"{counts.documents:,}", f"{counts.tokens:,}", f"{shares[label]:.2%}", f"{epochs:.3g}"]
        )
    console.rows("training text", ("", "documents", "tokens", "share of the rows", "epochs in the run"), lines)
    for label, text in found.texts.items():
        if text.dropped:
            said = ", ".join(f"{number:,} {reason}" for reason, number in text.dropped.items())
            console.message(f"left out{f' of {label}' if label else ''}: {said}")


def _reader(stream: TextStream) -> Callable[[int, int], Batch]:
    return lambda first, count: stream.batch(0, first, count)


def _text_fraction(batch: Batch, found: Prepared) -> float:
    """The share of the targets that are text, and no sentinel or EOS."""
    targets = batch.targets_BT.numpy()
    marks = np.isin(targets, [PAD, EOS, *found.tokenizer.sentinels])
    return float((~marks).sum() / (targets != PAD).sum())
