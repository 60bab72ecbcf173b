"""PreparedTextSource: the rows of a prepared text, or of a mixture of several, as batches of an objective.

A batch is a pure function of (seed, step), however it is divided among ranks and microbatches.

Legend  R rows  L raw tokens per row  K texts
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from switchcli.data.batch import Batch, BatchSource
from switchcli.data.config import RowObjective
from switchcli.data.dataset import TokenDataset
from switchcli.data.rng import SPANS, WORDS, philox
from switchcli.data.text_mixture import TextMixture
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.spec import EOS, PAD


class BatchCorruption:
    """An objective with its random draws: it turns the raw rows of a step into a batch."""

    def __init__(self, rows: RowObjective, tokenizer: Tokenizer, seed: int) -> None:
        """Build the objective. Raises DataError if the tokenizer does not suit it, such as by too few sentinels."""
        self._corrupt, self._num_draws, self._seed = rows.build(tokenizer), rows.num_draws, seed

    def batch(self, raw_RL: NDArray[np.int64], step: int, first: int) -> Batch:
        """Return the batch of rows first..first+R of `step`: [R, inputs_length] and [R, targets_length]."""
        # A count of Philox yields WORDS words, and every row begins at a count of its own: `num_draws` is rounded up to
        # whole counts. Hence row r always starts at count r * counts, wherever the batch is split.
        counts = -(-self._num_draws // WORDS)
        bits = philox(self._seed, step, SPANS).advance(first * counts)
        words_RW = bits.random_raw(raw_RL.shape[0] * counts * WORDS).reshape(len(raw_RL), -1)
        inputs_RS, targets_RT = self._corrupt(raw_RL, words_RW[:, : self._num_draws])
        return Batch(torch.from_numpy(inputs_RS), torch.from_numpy(targets_RT))


class PreparedTextSource(BatchSource):
    """Endless batches of `batch_rows` rows of prepared texts."""

    def __init__(
        self,
        texts: Sequence[TokenDataset],
        tokenizer: Tokenizer,
        rows: RowObjective,
        seed: int,
        batch_rows: int,
        mixture: TextMixture | None = None,
    ) -> None:
        """Join texts and objective. `mixture` assigns a text to every row; it may be None only for a single text.

        Raises DataError if the tokenizer does not suit the objective.
        """
        assert len(texts) == 1 or mixture is not None
        self._texts, self._batch_rows, self._mixture = texts, batch_rows, mixture
        self._corruption, self._raw_length = BatchCorruption(rows, tokenizer, seed), rows.raw_tokens_per_row

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Return rows first..first+count of the step's batch: [count, inputs_length] and [count, targets_length]."""
        row_R = self._first_row(step) + np.arange(first, first + count)
        return self._corruption.batch(self._raw_rows(row_R), step, first)

    def record(self, step: int) -> Mapping[str, Any]:
        return {"mixture": self._mixture.compare_with_intended(self._first_row(step))} if self._mixture else {}

    def _first_row(self, step: int) -> int:
        return step * self._batch_rows + self.row_offset

    def _raw_rows(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the raw ids [R, L] of rows, given by their numbers in the run."""
        if self._mixture is None:
            return self._texts[0].raw_rows(row_R)
        schedule = self._mixture.schedules[0]
        return schedule.gather(row_R, self._raw_length, lambda text, number_R: self._texts[text].raw_rows(number_R))


def num_hidden_bytes(batch: Batch, tokenizer: Tokenizer) -> int:
    """Return the bytes, in UTF-8, of the text that a batch's targets stand for.

    Sentinels, EOS and `<unk>` stand for none.
    """
    marks = torch.tensor([PAD, EOS, tokenizer.unknown, *tokenizer.sentinels])
    ids, counts = batch.targets_BT[~torch.isin(batch.targets_BT, marks)].unique(return_counts=True)
    # Decoding drops the space at the start of a text and of a line: each token stands between two words.
    word = tokenizer.encode("a")
    num_word_bytes = len(tokenizer.decode(word + word).encode())
    total = 0
    for index, count in zip(ids.tolist(), counts.tolist(), strict=True):
        # A single byte of a character cannot be decoded.
        is_byte = tokenizer.is_byte_V[index]
        total += count * (1 if is_byte else len(tokenizer.decode([*word, index, *word]).encode()) - num_word_bytes)
    return total
