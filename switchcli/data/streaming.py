"""Streamed texts: rows cut from documents while training runs, for text on a hub or larger than the disk.

The rows of a step are divided among `data.stream_shards` stream shards, a number that the recipe fixes. A stream shard
reads source shards (files, or ranges of them) of its own, different ones in every epoch. A rank reads only the stream
shards of its own rows, so the rows do not depend on the number of ranks.

A stream shard reads one window of documents at a time. The rows of a window are made and shuffled like those of a
prepared shard (`data.dataset`). The state that a checkpoint saves is a `StreamPosition` for each stream shard and text:
resuming passes over the rows of the current source shard before the window without parsing them, and builds the window
again.

Legend  R rows  L raw tokens per row
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.batch import Batch, BatchSource
from switchcli.data.config import DataSpec
from switchcli.data.dataset import ShuffleWindow, count_rows
from switchcli.data.objectives.example_packing import store_from_ids
from switchcli.data.prepare.shards import split_text
from switchcli.data.prepare.store import TokenShard
from switchcli.data.rng import SHARDS, permutation
from switchcli.data.sources.corpus import Corpus
from switchcli.data.sources.document import Document, SourceShard, is_held_out
from switchcli.data.text_batches import BatchCorruption
from switchcli.data.text_mixture import TextMixture
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError, RecipeError

WINDOW_CHARACTERS = 2**20
"""Characters in the windows of all texts of a stream shard together, divided by the texts' fractions in the mixture."""
MIN_WINDOW_CHARACTERS = 2**14
"""Characters in the window of one text, however small its fraction is."""
_MAX_EPOCHS_PER_WINDOW = 64
"""Epochs after which a text that has not yielded a single row is reported as too small."""
CorpusShards = Sequence[tuple[Corpus, SourceShard]]
"""The source shards of a text, each with the corpus that reads it."""


class StreamPosition(NamedTuple):
    """The position of a stream shard in a text. Checkpoints hold its fields as integers, in this order."""

    epoch: int = 0
    """Epoch of the text in which the window begins."""
    shard: int = 0
    """Index of the source shard in which the window begins, among those that the stream shard reads in the epoch."""
    row: int = 0
    """Raw row of that source shard at which the window begins."""
    window: int = 0
    """Number of windows before this one. It seeds the order of the window's rows."""
    used: int = 0
    """Rows of the window that were returned."""


class StreamedTextSource(BatchSource):
    """Batches of rows that are read while training runs. One thread must ask for them, in the order of the steps."""

    def __init__(
        self,
        spec: DataSpec,
        source_shards: Mapping[str, CorpusShards],
        tokenizer: Tokenizer,
        mixture: TextMixture | None,
        seed: int,
        batch_rows: int,
        rank_and_count: tuple[int, int],
        kept_steps: int,
    ) -> None:
        """Divide the stream shards among the ranks. No text is read yet.

        `source_shards` are given by the label of their text. `rank_and_count` are this rank and the number of ranks
        that divide the rows of a step. `state` can be asked for the last `kept_steps` steps.

        Raises:
            DataError: the tokenizer does not suit the objective.
            RecipeError: `data.stream_shards` is not a multiple of the number of ranks.
        """
        rank, ranks = rank_and_count
        if spec.stream_shards % ranks:
            raise RecipeError(
                f"data.stream_shards ({spec.stream_shards}) must be a multiple of the {ranks} ranks of a batch: "
                f"try {math.lcm(spec.stream_shards, ranks)}, from the run's beginning"
            )
        self._corruption = BatchCorruption(spec.rows, tokenizer, seed)
        self._rows_per_shard, self._kept_steps = batch_rows // spec.stream_shards, kept_steps
        self._mixture, self._batch_rows = mixture, batch_rows
        # A rank's rows of a batch are contiguous, and so are the stream shards that make them.
        shards_per_rank = spec.stream_shards // ranks
        self._stream_shards = {
            index: _StreamShard(index, source_shards, spec, tokenizer, mixture, seed)
            for index in range(rank * shards_per_rank, (rank + 1) * shards_per_rank)
        }
        self._state_shape = (spec.stream_shards, len(source_shards), len(StreamPosition._fields))
        self._states = {0: self._positions()}

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Return rows first..first+count of the step's batch: [count, inputs_length] and [count, targets_length]."""
        raw = []
        for index, stream_shard in self._stream_shards.items():
            # Stream shard i makes rows i * n to (i + 1) * n of every batch, for n rows per shard. `begin` and `end`
            # bound those of its n rows that are in first..first+count.
            begin, end = (
                min(max(row - index * self._rows_per_shard, 0), self._rows_per_shard) for row in (first, first + count)
            )
            if end > begin:
                assert stream_shard.next_row == self._next_row(step) + begin, "rows are asked for in order"
                raw.append(stream_shard.raw_rows(end - begin))
        # The state after a step exists once all rows of this rank have been read.
        if all(shard.next_row == self._next_row(step + 1) for shard in self._stream_shards.values()):
            self._states[step + 1] = self._positions()
            self._states.pop(step - self._kept_steps, None)
        return self._corruption.batch(np.concatenate(raw), step, first)

    def state(self, step: int) -> list[int]:
        """Return the positions of this rank's stream shards after `step` steps, one of the last `kept_steps`.

        The list is [stream shards, texts, fields of StreamPosition], flattened. The positions of other ranks' stream
        shards are zeros, so the sum over ranks is the state of all.
        """
        return [int(number) for number in self._states[step].ravel()]

    def restore_state(self, step: int, state: Sequence[int], row_offset: int = 0) -> None:
        """Continue after `step` steps from `state`, the positions of all stream shards at that step."""
        self.row_offset = row_offset
        positions = np.array(state).reshape(self._state_shape) if state else np.zeros(self._state_shape, np.int64)
        for index, stream_shard in self._stream_shards.items():
            stream_shard.seek(self._next_row(step), positions[index])
        self._states = {step: self._positions()}

    def record(self, step: int) -> Mapping[str, Any]:
        num_rows = step * self._batch_rows + self.row_offset
        return {"mixture": self._mixture.compare_with_intended(num_rows)} if self._mixture else {}

    def _next_row(self, step: int) -> int:
        """Return the number of rows that each stream shard has made after `step` steps, in the order of the data.

        Rows of a step are a multiple of the number of stream shards, and so is the offset.
        """
        return step * self._rows_per_shard + self.row_offset // self._state_shape[0]

    def _positions(self) -> NDArray[np.int64]:
        """Return the positions of this rank's stream shards [stream shards, texts, fields], zeros for all others."""
        positions = np.zeros(self._state_shape, dtype=np.int64)
        for index, stream_shard in self._stream_shards.items():
            positions[index] = [reader.position for reader in stream_shard.readers]
        return positions


class _StreamShard:
    """The rows that one stream shard makes: those of every text, mixed by a schedule of its own."""

    def __init__(
        self,
        index: int,
        source_shards: Mapping[str, CorpusShards],
        spec: DataSpec,
        tokenizer: Tokenizer,
        mixture: TextMixture | None,
        seed: int,
    ) -> None:
        self.readers: list[StreamReader] = []
        for label, shards in source_shards.items():
            size = WINDOW_CHARACTERS if mixture is None else WINDOW_CHARACTERS * mixture.fractions[label]
            size = max(MIN_WINDOW_CHARACTERS, size)
            self.readers.append(StreamReader(shards, spec, tokenizer, index, label, seed, size))
        self.next_row = 0
        self._raw_length = spec.rows.raw_tokens_per_row
        self._schedule = None if mixture is None else mixture.schedules[index]

    def raw_rows(self, count: int) -> NDArray[np.int64]:
        """Return the next `count` rows [count, L]."""
        row_R = self.next_row + np.arange(count)
        self.next_row += count
        if self._schedule is None:
            return self.readers[0].raw_rows(count)
        # The numbers of a text's rows are not needed: its reader counts by itself.
        return self._schedule.gather(
            row_R, self._raw_length, lambda text, number_R: self.readers[text].raw_rows(len(number_R))
        )

    def seek(self, next_row: int, positions: NDArray[np.int64]) -> None:
        """Continue at row `next_row` from `positions` [texts, fields of a StreamPosition]."""
        self.next_row = next_row
        for reader, position in zip(self.readers, positions.tolist(), strict=True):
            reader.seek(StreamPosition(*position))


class StreamReader:
    """The endless rows of one text in one stream shard."""

    def __init__(
        self,
        source_shards: CorpusShards,
        spec: DataSpec,
        tokenizer: Tokenizer,
        stream_shard: int,
        label: str,
        seed: int,
        window_characters: float,
    ) -> None:
        # With fewer source shards than stream shards, some stream shards would get none. Then every stream shard reads
        # all source shards, and takes every n-th row of each.
        self._divides_source_shards = len(source_shards) >= spec.stream_shards
        self._source_shards = source_shards
        self._spec, self._rows, self._tokenizer = spec, spec.rows, tokenizer
        self._stream_shard, self._label, self._window_characters = stream_shard, label, window_characters
        # All stream shards must agree on the order of the source shards. The order of rows is a stream shard's own.
        self._order_seed, self._row_seed = _seed(f"{seed}/{label}"), _seed(f"{seed}/{stream_shard}/{label}")
        self.position = self._next_window = StreamPosition()
        self._window: ShuffleWindow | None = None
        self._documents: Iterator[tuple[StreamPosition, Document | None]] | None = None

    def raw_rows(self, count: int) -> NDArray[np.int64]:
        """Return the next `count` rows [count, L]. Raises DataError if the stream shard has no row of this text."""
        chunks = []
        while count:
            window = self._current_window()
            size = min(count, window.num_rows - self.position.used)
            chunks.append(window.raw_rows(self.position.used + np.arange(size)))
            count -= size
            self.position = self.position._replace(used=self.position.used + size)
        return np.concatenate(chunks)

    def seek(self, position: StreamPosition) -> None:
        """Continue from `position`. Text is read when the next rows are asked for."""
        self.position, self._window, self._documents = position, None, None

    def _current_window(self) -> ShuffleWindow:
        if self._window is not None and self.position.used == self._window.num_rows:
            self.position, self._window = self._next_window, None
        if self._window is None:
            if self._documents is None:
                self._documents = self._iter_documents(self.position)
            self._window, self._next_window = self._read_window(self._documents)
        return self._window

    def _read_window(
        self, documents: Iterator[tuple[StreamPosition, Document | None]]
    ) -> tuple[ShuffleWindow, StreamPosition]:
        """Return the next window, of one row at least, and the position at which the window after it begins.

        A window ends after `window_characters` or with the epoch. One without a row is extended, until
        `_MAX_EPOCHS_PER_WINDOW` epochs have passed: then DataError is raised.
        """
        ids: list[NDArray[np.int64]] = []
        pending: list[list[str]] = []  # documents that are not encoded yet, each in the parts that are encoded apart
        size = 0
        for end, document in documents:
            if document is not None:
                pending.append([*split_text(document.text)])
                size += len(document.text)
                if size < self._window_characters:
                    continue
            elif end.epoch - self.position.epoch > _MAX_EPOCHS_PER_WINDOW:
                break
            ids += self._encode(pending)
            pending, size = [], 0
            shard = count_rows(TokenShard.of(store_from_ids(ids)), self._rows, self._row_seed, 0)
            if shard.num_rows:
                # The window's number takes the place of the epoch, so that every window has a random order of its own.
                number = self.position.window
                window = ShuffleWindow([shard], self._rows, self._row_seed, number, 0)
                return window, end._replace(window=number + 1)
        raise DataError(
            f"data.corpora{f' ({self._label})' if self._label else ''}: stream shard {self._stream_shard + 1} of "
            f"{self._spec.stream_shards} has no row of text to train on: take fewer data.stream_shards, or add text"
        )

    def _encode(self, documents: Sequence[Sequence[str]]) -> list[NDArray[np.int64]]:
        """Return the ids of each document. The parts of all documents are encoded in one call."""
        encoded = iter(self._tokenizer.encode_batch([part for parts in documents for part in parts]))
        return [np.concatenate([next(encoded) for _ in parts]) for parts in documents]

    def _iter_documents(self, start: StreamPosition) -> Iterator[tuple[StreamPosition, Document | None]]:
        """Yield the training documents from `start` on, endlessly, each with the position after it.

        At the end of an epoch it yields None with the position at which the next epoch begins.
        """
        epoch, first, row = start.epoch, start.shard, start.row
        dropped: Counter[str] = Counter()
        while True:
            order = permutation(len(self._source_shards), self._order_seed, epoch, SHARDS).tolist()
            if self._divides_source_shards:
                # Of n stream shards, number i reads positions i, i + n, i + 2n, ... of the epoch's order: each source
                # shard is read by exactly one of them.
                order = order[self._stream_shard :: self._spec.stream_shards]
            for number in range(first, len(order)):
                corpus, source_shard = self._source_shards[order[number]]
                for document in self._spec.filters(corpus.read(source_shard, row, dropped), dropped):
                    is_own = (
                        self._divides_source_shards
                        or _mixed(document.row) % self._spec.stream_shards == self._stream_shard
                    )
                    if is_own and not is_held_out(document.identity, self._spec.held_out_fraction):
                        yield StreamPosition(epoch, number, document.row + 1), document
                row = 0  # only the first source shard is entered in its middle
            epoch, first = epoch + 1, 0
            yield StreamPosition(epoch), None


def source_shards_of(corpora: Sequence[Corpus]) -> CorpusShards:
    """Return the source shards of all `corpora`, in order. Raises DataError if a corpus has none."""
    return [(corpus, source_shard) for corpus in corpora for source_shard in corpus.source_shards()]


def _mixed(row: int) -> int:
    """Return 32 bits that look random, so that rows which lie at regular distances are in all stream shards."""
    return ((row + 1) * 0x9E3779B97F4A7C15 % 2**64) >> 32  # multiplicative hashing by the golden ratio (Knuth, 6.4)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
