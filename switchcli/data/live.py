"""Live texts: rows cut from documents as they are read, for text that is not prepared: a hub's, or larger than a disk.

The rows of a step are shared among `lanes`, a number of the recipe's: each has pieces of every text to itself and reads
them in order, so that a rank reads its own lanes alone and the rows are the same on any number of ranks. A lane reads a
window of documents at a time, shuffles them, puts them end to end and shuffles the chunks cut from them. Where it stands
is a few numbers: going on reads one window again, and nothing before it.

Legend  R rows  L raw tokens of a chunk
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from threading import Condition
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from switchcli.data.batch import Batch
from switchcli.data.chunks import Window
from switchcli.data.corpus import Corpus
from switchcli.data.document import Document, is_held_out
from switchcli.data.draws import SHARDS, permutation
from switchcli.data.packing import store_of
from switchcli.data.pieces import cut
from switchcli.data.spec import DataSpec
from switchcli.data.store import Shard, TokenStore
from switchcli.data.text_mixture import Mixture
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import DataError

WINDOW_CHARACTERS = 2**20


class Position(NamedTuple):
    """Where a lane stands in a text."""

    epoch: int
    """Of the pieces."""
    place: int
    """Of the piece where the window begins, in the order of the epoch."""
    row: int
    """Of the piece where the window begins."""
    window: int
    """Its number."""
    used: int
    """Rows of the window that were shown."""


class Reader:
    """The rows of one text in one lane, from a position on."""

    def __init__(
        self, corpora: Sequence[Corpus], spec: DataSpec, tokenizer: Tokenizer, lane: int, label: str, seed: int
    ) -> None:
        self._spec, self._tokenizer, self._label = spec, tokenizer, label
        pieces = [(corpus, piece) for corpus in corpora for piece in corpus.pieces()]
        # A lane without a piece of its own would have nothing: then all read all pieces, each its own documents.
        self._alone = len(pieces) >= spec.lanes
        self._pieces = pieces[lane :: spec.lanes] if self._alone else pieces
        self._lane, self._seed = lane, seed
        self.position = Position(0, 0, 0, 0, 0)
        self._window: Window | None = None
        self._next = self.position

    def raw(self, count: int) -> NDArray[np.int64]:
        """The next `count` rows [count, L]."""
        rows = []
        while count:
            window = self._entered()
            taken = min(count, window.num_rows - self.position.used)
            rows.append(window.raw(self.position.used + np.arange(taken)))
            count -= taken
            self.position = self.position._replace(used=self.position.used + taken)
        return np.concatenate(rows)

    def seek(self, position: Position) -> None:
        """Go on from there."""
        self.position, self._window = position, None

    def _entered(self) -> Window:
        if self._window is not None and self.position.used == self._window.num_rows:
            self.position, self._window = self._next, None
        if self._window is None:
            store, self._next = self._read(self.position)
            raw_length = self._spec.objective.raw_length
            self._window = Window({0: Shard.of(store)}, raw_length, self._seed, self.position.window, 0)
        return self._window

    def _read(self, start: Position) -> tuple[TokenStore, Position]:
        """The documents of the window that begins there, and where the next begins."""
        ids: list[NDArray[np.int64]] = []
        texts: list[str] = []
        size = 0
        for behind, document in self._documents(start):
            texts += cut(document.text)
            size += len(document.text)
            if size >= WINDOW_CHARACTERS:
                ids += [one for one in self._tokenizer.encode_batch(texts) if len(one)]
                texts, size = [], 0
                if sum(map(len, ids)) >= self._spec.objective.raw_length:
                    break
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return TokenStore(np.concatenate(ids).astype(np.uint32), offsets), behind

    def _documents(self, start: Position) -> Iterator[tuple[Position, Document]]:
        """Training documents from a position on, without end, each with the position behind it."""
        epoch, place, row = start.epoch, start.place, start.row
        dropped: Counter[str] = Counter()
        while True:
            is_whole, found = place == row == 0, False
            order = permutation(len(self._pieces), self._seed, epoch, SHARDS).tolist()
            for place in range(place, len(order)):  # noqa: PLB020 - from where it stands
                corpus, piece = self._pieces[order[place]]
                for document in self._spec.filters(corpus.read(piece, row, dropped), dropped):
                    if self._is_mine(document):
                        found = True
                        yield Position(epoch, place, document.row + 1, start.window + 1, 0), document
                row = 0
            if is_whole and not found:
                raise DataError(
                    f"data.corpora{f' ({self._label})' if self._label else ''}: no text to train on in the share of "
                    f"lane {self._lane + 1} of {self._spec.lanes}: take a smaller data.lanes, or add text"
                )
            epoch, place = epoch + 1, 0

    def _is_mine(self, document: Document) -> bool:
        mine = self._alone or document.row % self._spec.lanes == self._lane
        return mine and not is_held_out(document.identity, self._spec.held_out_fraction)


class LiveStream:
    """Batches of rows that are read as training goes on; asked for in order of steps, by one rank for its lanes."""

    def __init__(
        self, spec: DataSpec, tokenizer: Tokenizer, mixture: Mixture | None, seed: int, batch_rows: int, kept_steps: int
    ) -> None:
        """`kept_steps`: of how many of the last steps `position` can tell.

        Raises DataError when the sentinels are fewer than a row needs; of the text when it is read.
        """
        self._texts, self._spec, self._tokenizer, self._seed = spec.texts(), spec, tokenizer, seed
        self._corruption = Corruption(spec.objective, tokenizer, seed)
        self._rows_a_lane = batch_rows // spec.lanes
        self._turns = None if mixture is None else [mixture.turns_of(lane) for lane in range(spec.lanes)]
        self._lanes: dict[int, list[Reader]] = {}
        self._behind: dict[int, tuple[int, list[Position]]] = {}
        ...
