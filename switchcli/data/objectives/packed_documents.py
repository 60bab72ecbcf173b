"""Whole documents as rows: no text of two documents is corrupted together, and those that share a row do not see one
another (packing.py).

A document longer than a row is cut into pieces; a last piece of a single token, which cannot be parted, is left out.
Pieces go into rows one behind the other as they come; the next row begins where inputs or targets would not fit.

Legend  R rows  L raw tokens of a row  X pieces  D documents
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from switchcli.data.objectives.example_packing import concatenated_ranges, pad_rows
from switchcli.data.objectives.span_corruption import Corrupt, Draws, Ids, SpanCorruption, corrupt_spans, get_sentinels
from switchcli.data.prepare.store import TokenStore
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.spec import EOS, PAD


class PackedPieces(NamedTuple):
    """Which pieces of documents share a row."""

    document_X: Ids
    """In the order of the lengths that they were packed by."""
    start_X: Ids
    """Where the piece begins in its document."""
    length_X: Ids
    end_R: Ids
    """The end of each row's pieces."""

    def raw_rows(self, store: TokenStore, order_D: Ids, row_R: Ids, raw_length: int) -> Ids:
        """Raw ids [R, raw_length] of some rows: EOS behind each piece, padded. `order_D` are the store's documents."""
        start_R = np.append(0, self.end_R)[row_R]
        count_R = self.end_R[row_R] - start_R
        piece_X = concatenated_ranges(start_R, count_R)
        length_X = self.length_X[piece_X]
        first_X = store.offsets[order_D[self.document_X[piece_X]]] + self.start_X[piece_X]
        ids = store.gather(concatenated_ranges(first_X, length_X))
        return pad_rows(ids, length_X, np.repeat(np.arange(len(row_R)), count_R), (len(row_R), raw_length))


class WholeDocumentObjective(NamedTuple):
    """An objective on rows that whole documents share."""

    objective: SpanCorruption

    @property
    def inputs_length(self) -> int:
        return self.objective.inputs_length

    @property
    def targets_length(self) -> int:
        return self.objective.targets_length

    @property
    def raw_tokens_per_row(self) -> int:
        """Room for the raw ids of a row, EOS behind each piece: its inputs and targets have 4 more than its tokens."""
        return self.inputs_length + self.targets_length - 3

    @property
    def num_draws(self) -> int:
        """One for each raw token; a piece takes those from its place on."""
        return self.raw_tokens_per_row

    @property
    def num_sentinels(self) -> int:
        """They begin again in each piece."""
        return self.objective.num_sentinels

    def pack(self, length_D: Ids) -> PackedPieces:
        """Rows of the documents of these lengths, in their order."""
        longest = self.objective.raw_tokens_per_row
        count_D = -(-length_D // longest)
        document_X = np.repeat(np.arange(len(length_D)), count_D)
        start_X = concatenated_ranges(np.zeros_like(count_D), count_D) * longest
        length_X = np.minimum(length_D[document_X] - start_X, longest)
        kept_X = length_X >= 2
        document_X, start_X, length_X = document_X[kept_X], start_X[kept_X], length_X[kept_X]
        kept, noise, spans = self.objective.span_counts(length_X).T
        # Where a row that begins with this piece ends.
        inputs_X, targets_X = kept + spans + 1, noise + spans + 1
        next_X = np.minimum(_reach(inputs_X, self.inputs_length), _reach(targets_X, self.targets_length))
        ends, at, after = [], 0, next_X.tolist()
        while at < len(after):
            at = after[at]
            ends.append(at)
        return PackedPieces(document_X, start_X, length_X, np.array(ends, dtype=np.int64))

    def build(self, tokenizer: Tokenizer) -> Corrupt:
        """Raises DataError when the tokenizer has fewer sentinels than a document needs."""
        return partial(self.corrupt, sentinels=get_sentinels(tokenizer, self.num_sentinels))

    def corrupt(self, raw_RL: Ids, draws: Draws, sentinels: Ids) -> tuple[Ids, Ids]:
        """Inputs [R, inputs_length] and targets [R, targets_length] of raw rows as `Pieces.raw` has them, each piece
        corrupted by itself: the layout of `packing.Packed.rows`."""
        row_X, end_X = np.nonzero(raw_RL == EOS)
        same_row_X = np.append(False, row_X[1:] == row_X[:-1])
        start_X = np.where(same_row_X, np.roll(end_X, 1) + 1, 0)
        share_X3 = self.objective.span_counts(end_X - start_X)
        text = raw_RL[(raw_RL != EOS) & (raw_RL != PAD)]
        hidden = corrupt_spans(text, share_X3, draws.ravel(), row_X * self.num_draws + start_X, sentinels)
        return (
            pad_rows(hidden.inputs, hidden.inputs_X, row_X, (len(raw_RL), self.inputs_length)),
            pad_rows(hidden.targets, hidden.targets_X, row_X, (len(raw_RL), self.targets_length)),
        )


def _reach(need_X: Ids, room: int) -> Ids:
    """How far from each piece on pieces fit into the room together."""
    end_X = np.cumsum(need_X)
    return np.searchsorted(end_X, end_X - need_X + room, side="right")
