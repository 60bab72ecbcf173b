"""What tokenizers make of a text: how many ids, and how many of them say nothing, or a byte."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from switchcli.data.prepare.shards import chunks, parts
from switchcli.data.sources.document import Document
from switchcli.data.tokenizer.tokenizer import Tokenizer


class Count(NamedTuple):
    """The ids of a text."""

    tokens: int
    unknown: int
    """Of them those that stand for characters without a piece, of which nothing is left."""
    in_bytes: int
    """Of them those that are a byte of such a character."""


class Measured(NamedTuple):
    """A text, and the ids that each tokenizer makes of it."""

    documents: int
    bytes: int
    counts: tuple[Count, ...]


def measure(documents: Iterable[Document], tokenizers: Sequence[Tokenizer]) -> Measured:
    """Reads the documents once, whatever the number of tokenizers, and holds few of them."""
    sums = np.zeros((len(tokenizers), len(Count._fields)), np.int64)
    num_documents = num_bytes = 0
    for chunk in chunks(parts(documents, 0.0)):
        texts = [part.text for part in chunk]
        num_documents += sum(part.starts_document for part in chunk)
        num_bytes += sum(len(text.encode()) for text in texts)
        for place, tokenizer in enumerate(tokenizers):
            ids = np.concatenate(tokenizer.encode_batch(texts))
            sums[place] += (len(ids), (ids == tokenizer.unknown).sum(), tokenizer.is_byte_V[ids].sum())
    return Measured(num_documents, num_bytes, tuple(Count(*map(int, one)) for one in sums))
