"""PreparedTextSource: the rows of one text, or of a mixture of several, as batches of an objective: a pure function of
(seed, step), however a batch is split among ranks, microbatches and workers.

Legend  R rows  L raw tokens of a chunk  K texts
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
    """Raw rows of a step as its batch."""

    def __init__(self, rows: RowObjective, tokenizer: Tokenizer, seed: int) -> None:
        """Raises DataError as the objective says of the tokenizer."""
        self._corrupt, self._num_draws, self._seed = rows.build(tokenizer), rows.num_draws, seed

    def batch(self, raw_RL: NDArray[np.int64], step: int, first: int) -> Batch:
        """The batch of rows from number `first` of the step on: [R, inputs_length] and [R, targets_length]."""
        inputs_RS, targets_RT = self._corrupt(raw_RL, self._draws(step, first, len(raw_RL)))
        return Batch(torch.from_numpy(inputs_RS), torch.from_numpy(targets_RT))

    def _draws(self, step: int, first: int, count: int) -> NDArray[np.uint64]:
        """[count, num_draws]: each row has counts of its own, so that any split of the batch draws the same."""
        counts = -(-self._num_draws // WORDS)
        bits = philox(self._seed, step, SPANS).advance(first * counts)
        return bits.random_raw(count * counts * WORDS).reshape(count, -1)[:, : self._num_draws]


class PreparedTextSource(BatchSource):
    """`batch_rows` rows a step of prepared texts, without end."""

    def __init__(
        self,
        texts: Sequence[TokenDataset],
        tokenizer: Tokenizer,
        rows: RowObjective,
        seed: int,
        batch_rows: int,
        mixture: TextMixture | None = None,
    ) -> None:
        """`mixture` says which of several texts a row is of. Raises DataError as `Corruption`."""
        assert len(texts) == 1 or mixture is not None
        self._texts, self._batch_rows, self._mixture = texts, batch_rows, mixture
        self._corruption, self._raw_length = BatchCorruption(rows, tokenizer, seed), rows.raw_tokens_per_row

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Rows first..first+count of the step's batch: [count, inputs_length] and [count, targets_length]."""
        return self._corruption.batch(self._raw(step * self._batch_rows + np.arange(first, first + count)), step, first)

    def record(self, step: int) -> Mapping[str, Any]:
        return {"mixture": self._mixture.compare_with_intended(step * self._batch_rows)} if self._mixture else {}

    def _raw(self, row_R: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._mixture is None:
            return self._texts[0].raw_rows(row_R)
        text_R, nth_R = self._mixture.turns[0](row_R)
        raw_RL = np.empty((len(row_R), self._raw_length), dtype=np.int64)
        for text in np.unique(text_R):
            mine_R = text_R == text
            raw_RL[mine_R] = self._texts[text].raw_rows(nth_R[mine_R])
        return raw_RL


def text_fraction(batch: Batch, tokenizer: Tokenizer) -> float:
    """The share of a batch's targets that are text, and no sentinel or EOS."""
    marks = torch.tensor([PAD, EOS, *tokenizer.sentinels])
    is_text = ~torch.isin(batch.targets_BT, marks)
    return float(is_text.sum() / (batch.targets_BT != PAD).sum())
