"""Statistics of the ids that tokenizers assign to a text: how many there are, and how many are unknown or bytes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from switchcli.data.prepare.shards import group_parts, split_documents
from switchcli.data.sources.document import Document
from switchcli.data.tokenizer.tokenizer import Tokenizer


class TokenCounts(NamedTuple):
    """Counts of the ids of a text."""

    tokens: int
    """Number of ids."""
    unknown: int
    """Number of ids that are `<unk>`: their characters are lost."""
    in_bytes: int
    """Number of ids that are one byte of a character without a piece."""


class MeasuredText(NamedTuple):
    """A text's size, and the counts of its ids for each tokenizer."""

    documents: int
    bytes: int
    counts: tuple[TokenCounts, ...]


def measure_tokenizers(documents: Iterable[Document], tokenizers: Sequence[Tokenizer]) -> MeasuredText:
    """Return the statistics of all tokenizers. Reads the documents once, with few of them in memory."""
    counts = np.zeros((len(tokenizers), len(TokenCounts._fields)), np.int64)
    num_documents = num_bytes = 0
    for chunk in group_parts(split_documents(documents, 0.0)):
        texts = [part.text for part in chunk]
        num_documents += sum(part.starts_document for part in chunk)
        num_bytes += sum(len(text.encode()) for text in texts)
        for index, tokenizer in enumerate(tokenizers):
            ids = np.concatenate(tokenizer.encode_batch(texts))
            counts[index] += (len(ids), (ids == tokenizer.unknown).sum(), tokenizer.is_byte_V[ids].sum())
    return MeasuredText(num_documents, num_bytes, tuple(TokenCounts(*map(int, row)) for row in counts))
