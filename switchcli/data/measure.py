"""What tokenizers make of a text: how many ids, and how many of them say nothing, or a byte."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from switchcli.data.document import Document
from switchcli.data.tokenizer import Tokenizer

_PART_CHARACTERS: Final = 2**16  # a longer text is cut: the tokenizer holds many times its text in memory
_CHUNK_CHARACTERS: Final = 2**20


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
    for texts, ended in _chunks(documents):
        num_documents += ended
        num_bytes += sum(len(text.encode()) for text in texts)
        for place, tokenizer in enumerate(tokenizers):
            ids = np.concatenate(tokenizer.encode_batch(texts))
            sums[place] += (len(ids), (ids == tokenizer.unknown).sum(), tokenizer.is_byte_V[ids].sum())
    return Measured(num_documents, num_bytes, tuple(Count(*map(int, one)) for one in sums))


def _chunks(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    """Texts that are encoded at once, and how many documents they are."""
    texts: list[str] = []
    size = ended = 0
    for _, text in documents:
        texts += (text[start : start + _PART_CHARACTERS] for start in range(0, len(text), _PART_CHARACTERS))
        size, ended = size + len(text), ended + 1
        if size >= _CHUNK_CHARACTERS:
            yield texts, ended
            texts, size, ended = [], 0, 0
    if texts:
        yield texts, ended
