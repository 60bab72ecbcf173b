"""What tokenizers make of a text: how many ids, and how many of them say nothing, or a byte."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from switchcli.data.prepare.shards import group_parts, split_documents
from switchcli.data.sources.document import Document
from switchcli.data.tokenizer.tokenizer import Tokenizer


class TokenCounts(NamedTuple):
    """The ids of a text."""

    tokens: int
    unknown: int
    """Of them those that stand for characters without a piece, of which nothing is left."""
    in_bytes: int
    """Of them those that are a byte of such a character."""


class MeasuredText(NamedTuple):
    """A text, and the ids that each tokenizer makes of it."""

    documents: int
    bytes: int
    counts: tuple[TokenCounts, ...]


def measure_tokenizers(documents: Iterable[Document], tokenizers: Sequence[Tokenizer]) -> MeasuredText:
    """Reads the documents once, whatever the number of tokenizers, and holds few of them."""
    sums = np.zeros((len(tokenizers), len(TokenCounts._fields)), np.int64)
    num_documents = num_bytes = 0
    for chunk in group_parts(split_documents(documents, 0.0)):
        texts = [part.text for part in chunk]
        num_documents += sum(part.starts_document for part in chunk)
        num_bytes += sum(len(text.encode()) for text in texts)
        for place, tokenizer in enumerate(tokenizers):
            ids = np.concatenate(tokenizer.encode_batch(texts))
            sums[place] += (len(ids), (ids == tokenizer.unknown).sum(), tokenizer.is_byte_V[ids].sum())
    return MeasuredText(num_documents, num_bytes, tuple(TokenCounts(*map(int, one)) for one in sums))
