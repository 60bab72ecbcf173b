"""Rows of whole documents: each document is corrupted by itself, and those in a row do not see each other.

A document longer than a row is divided into pieces. A last piece of a single token is left out, because it cannot have
both a kept and a hidden token. Pieces go into rows in their order; a new row begins with the first piece whose inputs
or targets do not fit. Attention between the documents of a row is masked by model/packing.py.

Legend  R rows  L raw tokens of a row  X pieces  D documents
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from switchcli.data.objectives.example_packing import concatenated_ranges, items_of_rows, pad_rows
from switchcli.data.objectives.span_corruption import Corrupt, Draws, Ids, SpanCorruption, corrupt_spans, get_sentinels
from switchcli.data.prepare.store import TokenStore
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.spec import EOS, PAD


class PackedPieces(NamedTuple):
    """The assignment of pieces of documents to rows."""

    document_X: Ids
    """The document of each piece, as an index of the lengths that were packed."""
    start_X: Ids
    """The position of each piece in its document."""
    length_X: Ids
    """The number of tokens of each piece."""
    end_R: Ids
    """The end of each row's pieces: row r has pieces end_R[r - 1]..end_R[r]."""

    def raw_rows(self, store: TokenStore, order_D: Ids, row_R: Ids, raw_length: int) -> Ids:
        """Return raw ids [R, raw_length] of these rows: EOS after each piece, padded.

        `order_D` are the numbers in the store of the documents that were packed, in the order of their lengths.
        """
        piece_X, row_X = items_of_rows(self.end_R, row_R)
        length_X = self.length_X[piece_X]
        position_X = store.offsets[order_D[self.document_X[piece_X]]] + self.start_X[piece_X]  # in the store
        ids = store.tokens[concatenated_ranges(position_X, length_X)]
        return pad_rows(ids, length_X, row_X, (len(row_R), raw_length))


class WholeDocumentObjective(NamedTuple):
    """Span corruption of rows that hold whole documents."""

    objective: SpanCorruption

    @property
    def inputs_length(self) -> int:
        return self.objective.inputs_length

    @property
    def targets_length(self) -> int:
        return self.objective.targets_length

    @property
    def raw_tokens_per_row(self) -> int:
        """The largest size of a raw row: the tokens of its pieces, and EOS after each piece.

        A piece of n tokens becomes n + 2 * spans + 2 tokens of inputs and targets together, at least n + 4. With EOS it
        takes n + 1 tokens of the raw row, 3 less. A row has at least one piece.
        """
        return self.inputs_length + self.targets_length - 3

    @property
    def num_draws(self) -> int:
        """The number of random numbers that a row takes: one for each raw token. A piece uses those of its tokens."""
        return self.raw_tokens_per_row

    @property
    def num_sentinels(self) -> int:
        """The number of sentinels that the longest piece needs. Each piece begins with the first sentinel again."""
        return self.objective.num_sentinels

    def pack(self, length_D: Ids) -> PackedPieces:
        """Return rows for documents of these lengths, in their order."""
        # All pieces: those of a document but the last have the most tokens that fit a row alone.
        max_length = self.objective.raw_tokens_per_row
        num_pieces_D = -(-length_D // max_length)
        document_X = np.repeat(np.arange(len(length_D)), num_pieces_D)
        piece_in_document_X = concatenated_ranges(np.zeros_like(num_pieces_D), num_pieces_D)
        start_X = piece_in_document_X * max_length
        length_X = np.minimum(length_D[document_X] - start_X, max_length)
        is_used_X = length_X >= 2
        document_X, start_X, length_X = document_X[is_used_X], start_X[is_used_X], length_X[is_used_X]

        # Tokens of each piece in a row, including its sentinels and EOS.
        num_kept_X, num_noise_X, num_spans_X = self.objective.span_counts(length_X).T
        inputs_X, targets_X = num_kept_X + num_spans_X + 1, num_noise_X + num_spans_X + 1
        # If a row begins with piece x, the next row begins with piece next_X[x].
        next_X = np.minimum(_row_end(inputs_X, self.inputs_length), _row_end(targets_X, self.targets_length))
        ends, first_piece, next_pieces = [], 0, next_X.tolist()
        while first_piece < len(next_pieces):
            first_piece = next_pieces[first_piece]
            ends.append(first_piece)
        return PackedPieces(document_X, start_X, length_X, np.array(ends, dtype=np.int64))

    def build(self, tokenizer: Tokenizer) -> Corrupt:
        """Return the function that corrupts rows. Raises DataError if the tokenizer has too few sentinels."""
        return partial(self.corrupt, sentinels=get_sentinels(tokenizer, self.num_sentinels))

    def corrupt(self, raw_RL: Ids, draws: Draws, sentinels: Ids) -> tuple[Ids, Ids]:
        """Return inputs [R, inputs_length] and targets [R, targets_length] of raw rows, from `PackedPieces.raw_rows`.

        Each piece is corrupted by itself and ends in EOS, as in `PackedExamples.rows`.
        """
        # Each EOS ends a piece: row_X is the piece's row, and end_X the position of EOS in the row.
        row_X, end_X = np.nonzero(raw_RL == EOS)
        # A piece starts behind the EOS before it, or at 0 if it is the first of its row.
        is_same_row_X = np.append(False, row_X[1:] == row_X[:-1])
        start_X = np.where(is_same_row_X, np.roll(end_X, 1) + 1, 0)
        counts_X3 = self.objective.span_counts(end_X - start_X)
        raw = raw_RL[(raw_RL != EOS) & (raw_RL != PAD)]  # all pieces, end to end
        first_draw_X = row_X * self.num_draws + start_X  # in the flattened draws
        corrupted = corrupt_spans(raw, counts_X3, draws.ravel(), first_draw_X, sentinels)
        num_rows = len(raw_RL)
        return corrupted.in_rows(row_X, (num_rows, self.inputs_length), (num_rows, self.targets_length))


def _row_end(num_tokens_X: Ids, room: int) -> Ids:
    """Return, for each piece, the number of the first piece that does not fit a row which begins with that piece."""
    end_X = np.cumsum(num_tokens_X)  # end of each piece if all were in one long row
    start_X = end_X - num_tokens_X
    # The pieces that fit end at or before start + room. As ends ascend, their number is the piece behind them.
    return np.searchsorted(end_X, start_X + room, side="right")
