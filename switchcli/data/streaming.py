"""Live texts: rows cut from documents as they are read, for text that is not prepared: a hub's, or larger than a disk.

The rows of a step are shared among `lanes`, a number of the recipe's. Each has pieces of every text to itself, other
ones in each epoch, and reads them in order: a rank reads the lanes of its rows alone, and the rows are the same on any
number of ranks. A lane takes a window of documents at a time, whose rows are made and shuffled as those of a prepared
shard. Where it stands is a few numbers: to go on, the piece is read from its start but not looked into, up to the
window, which is cut again.

Legend  R rows  L raw tokens of a row
"""

import hashlib
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
"""Of all texts of a lane together, by their shares; it ends with the epoch."""
LEAST_CHARACTERS = 2**14
"""Of one text."""
_MOST_EPOCHS = 64
"""That a window takes of a text with less than a row: then there is none."""
Pieces = Sequence[tuple[Corpus, SourceShard]]


class StreamPosition(NamedTuple):
    """Where a lane stands in a text."""

    epoch: int = 0
    """Of the pieces."""
    place: int = 0
    """Of the piece where the window begins, in the order of the epoch."""
    row: int = 0
    """Of the piece where the window begins."""
    window: int = 0
    """Its number."""
    used: int = 0
    """Rows of the window that were shown."""


class StreamedTextSource(BatchSource):
    """Batches of rows that are read as training goes on, asked for in their order by one thread."""

    def __init__(
        self,
        spec: DataSpec,
        pieces: Mapping[str, Pieces],
        tokenizer: Tokenizer,
        mixture: TextMixture | None,
        seed: int,
        batch_rows: int,
        place: tuple[int, int],
        kept_steps: int,
    ) -> None:
        """`place`: this rank, and how many share the rows of a step; `kept_steps`: of how many of the last ones
        `state` can tell.

        Raises DataError as the objective says of the tokenizer; RecipeError where the ranks cannot share the lanes.
        """
        rank, ranks = place
        if spec.stream_shards % ranks:
            raise RecipeError(
                f"data.stream_shards ({spec.stream_shards}) must be a multiple of the {ranks} ranks of a batch: "
                f"try {-(-spec.stream_shards // ranks) * ranks}, from the run's beginning"
            )
        self._corruption = BatchCorruption(spec.rows, tokenizer, seed)
        self._rows_a_lane, self._kept_steps = batch_rows // spec.stream_shards, kept_steps
        self._mixture, self._batch_rows = mixture, batch_rows
        mine = range(rank * spec.stream_shards // ranks, (rank + 1) * spec.stream_shards // ranks)
        self._lanes = {lane: _StreamShard(lane, pieces, spec, tokenizer, mixture, seed) for lane in mine}
        self._shape = (spec.stream_shards, len(pieces), len(StreamPosition._fields))
        self._behind = {0: self._position()}

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Rows first..first+count of the step's batch: [count, inputs_length] and [count, targets_length]."""
        raw = []
        for lane, reading in self._lanes.items():
            begin, end = (
                min(max(row - lane * self._rows_a_lane, 0), self._rows_a_lane) for row in (first, first + count)
            )
            if end > begin:
                assert reading.next_row == step * self._rows_a_lane + begin, "rows are asked for in order"
                raw.append(reading.raw_rows(end - begin))
        if all(reading.next_row == (step + 1) * self._rows_a_lane for reading in self._lanes.values()):
            self._behind[step + 1] = self._position()
            self._behind.pop(step - self._kept_steps, None)
        return self._corruption.batch(np.concatenate(raw), step, first)

    def state(self, step: int) -> list[int]:
        """Where this rank's lanes stand after so many steps, one of the last; zeros for the lanes of others, so that
        the sum over ranks is where all stand."""
        return [int(number) for number in self._behind[step].ravel()]

    def restore_state(self, step: int, state: Sequence[int]) -> None:
        """Go on after so many steps, from where all lanes stood then."""
        stood = np.array(state).reshape(self._shape)
        for lane, reading in self._lanes.items():
            reading.seek(step * self._rows_a_lane, stood[lane])
        self._behind = {step: self._position()}

    def record(self, step: int) -> Mapping[str, Any]:
        return {"mixture": self._mixture.compare_with_intended(step * self._batch_rows)} if self._mixture else {}

    @property
    def is_sequential(self) -> bool:
        return True

    def _position(self) -> NDArray[np.int64]:
        found = np.zeros(self._shape, dtype=np.int64)
        for lane, reading in self._lanes.items():
            found[lane] = [reader.position for reader in reading.readers]
        return found


class _StreamShard:
    """One lane's rows of all texts, in the order of its own turns."""

    def __init__(
        self,
        lane: int,
        pieces: Mapping[str, Pieces],
        spec: DataSpec,
        tokenizer: Tokenizer,
        mixture: TextMixture | None,
        seed: int,
    ) -> None:
        sizes = {
            label: WINDOW_CHARACTERS if mixture is None else WINDOW_CHARACTERS * mixture.shares[label]
            for label in pieces
        }
        self.readers = [
            StreamReader(found, spec, tokenizer, lane, label, seed, max(LEAST_CHARACTERS, sizes[label]))
            for label, found in pieces.items()
        ]
        self.next_row = 0
        self._raw_length = spec.rows.raw_tokens_per_row
        self._turns = None if mixture is None else mixture.turns[lane]

    def raw_rows(self, count: int) -> NDArray[np.int64]:
        """The next `count` rows [count, L]."""
        row_R = self.next_row + np.arange(count)
        self.next_row += count
        if self._turns is None:
            return self.readers[0].raw_rows(count)
        raw_RL = np.empty((count, self._raw_length), dtype=np.int64)
        text_R, _ = self._turns(row_R)
        for text in np.unique(text_R):
            mine_R = text_R == text
            raw_RL[mine_R] = self.readers[text].raw_rows(int(mine_R.sum()))
        return raw_RL

    def seek(self, next_row: int, positions: NDArray[np.int64]) -> None:
        self.next_row = next_row
        for reader, position in zip(self.readers, positions.tolist(), strict=True):
            reader.seek(StreamPosition(*position))


class StreamReader:
    """The rows of one text in one lane, from a position on."""

    def __init__(
        self,
        pieces: Pieces,
        spec: DataSpec,
        tokenizer: Tokenizer,
        lane: int,
        label: str,
        seed: int,
        window_characters: float,
    ) -> None:
        # A lane without a piece of its own would have nothing: then all read all pieces, each its own documents.
        self._alone = len(pieces) >= spec.stream_shards
        self._pieces = pieces
        self._spec, self._rows, self._tokenizer = spec, spec.rows, tokenizer
        self._lane, self._label, self._window_characters = lane, label, window_characters
        self._order_seed, self._seed = (_seed(f"{seed}/{label}"), _seed(f"{seed}/{lane}/{label}"))
        self.position = self._next = StreamPosition()
        self._window: ShuffleWindow | None = None
        self._coming: Iterator[tuple[StreamPosition, Document | None]] | None = None

    def raw_rows(self, count: int) -> NDArray[np.int64]:
        """The next `count` rows [count, L]."""
        found = []
        while count:
            window = self._entered()
            taken = min(count, window.num_rows - self.position.used)
            found.append(window.raw_rows(self.position.used + np.arange(taken)))
            count -= taken
            self.position = self.position._replace(used=self.position.used + taken)
        return np.concatenate(found)

    def seek(self, position: StreamPosition) -> None:
        """Go on from there."""
        self.position, self._window, self._coming = position, None, None

    def _entered(self) -> ShuffleWindow:
        if self._window is not None and self.position.used == self._window.num_rows:
            self.position, self._window = self._next, None
        if self._window is None:
            if self._coming is None:
                self._coming = self._documents(self.position)
            self._window, self._next = self._read(self._coming)
        return self._window

    def _read(self, coming: Iterator[tuple[StreamPosition, Document | None]]) -> tuple[ShuffleWindow, StreamPosition]:
        """The next window, and where the one after it begins."""
        ids: list[NDArray[np.int64]] = []
        waiting: list[list[str]] = []
        size = 0
        for behind, document in coming:  # without end
            if document is not None:
                waiting.append([*split_text(document.text)])
                size += len(document.text)
                if size < self._window_characters:
                    continue
            elif behind.epoch - self.position.epoch > _MOST_EPOCHS:
                break
            ids += self._encoded(waiting)
            waiting, size = [], 0
            shard = count_rows(TokenShard.of(store_from_ids(ids)), self._rows, self._seed, 0)
            if shard.num_rows:
                number = self.position.window
                return ShuffleWindow({0: shard}, self._rows, self._seed, number, 0), behind._replace(window=number + 1)
        raise DataError(
            f"data.corpora{f' ({self._label})' if self._label else ''}: no row of text to train on in the share of "
            f"lane {self._lane + 1} of {self._spec.stream_shards}: take fewer data.stream_shards, or add text"
        )

    def _encoded(self, documents: Sequence[Sequence[str]]) -> list[NDArray[np.int64]]:
        """The ids of each document, of which the parts are encoded apart."""
        found = iter(self._tokenizer.encode_batch([part for parts in documents for part in parts]))
        return [np.concatenate([next(found) for _ in parts]) for parts in documents]

    def _documents(self, start: StreamPosition) -> Iterator[tuple[StreamPosition, Document | None]]:
        """Training documents from a position on, without end, each with the position behind it; None at each end of
        the lane's pieces, which in each epoch are others."""
        epoch, place, row = start.epoch, start.place, start.row
        dropped: Counter[str] = Counter()
        while True:
            order = permutation(len(self._pieces), self._order_seed, epoch, SHARDS).tolist()
            mine = order[self._lane :: self._spec.stream_shards] if self._alone else order
            for number in range(place, len(mine)):
                corpus, piece = self._pieces[mine[number]]
                for document in self._spec.filters(corpus.read(piece, row, dropped), dropped):
                    if self._is_mine(document):
                        yield StreamPosition(epoch, number, document.row + 1), document
                row = 0
            epoch, place = epoch + 1, 0
            yield StreamPosition(epoch), None

    def _is_mine(self, document: Document) -> bool:
        mine = self._alone or document.row % self._spec.stream_shards == self._lane
        return mine and not is_held_out(document.identity, self._spec.held_out_fraction)


def source_shards_of(corpora: Sequence[Corpus]) -> Pieces:
    """Those of several corpora, in order. Raises DataError as they do."""
    return [(corpus, piece) for corpus in corpora for piece in corpus.source_shards()]


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
