"""What tokenizers make of a text: how many tokens, and how many of them say nothing, or a byte alone."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from switchcli.data.document import Document
from switchcli.data.pieces import CHUNK_CHARACTERS, cut_up
from switchcli.data.tokenizer import Tokenizer


class Measured(NamedTuple):
    """What a tokenizer makes of a text."""

    tokens: int
    unknown: int
    """Tokens that stand for characters without a piece, of which nothing is left."""
    in_bytes: int
    """Tokens that are a byte of such a character."""

    def to_json(self, num_bytes: int) -> dict[str, float | None]:
        return {
            "tokens": self.tokens,
            "tokens_per_byte": self.tokens / num_bytes if num_bytes else None,
            "unknown": self.unknown / max(self.tokens, 1),
            "byte_fallback": self.in_bytes / max(self.tokens, 1),
        }


class Row(NamedTuple):
    """One text, and what each tokenizer makes of it."""

    name: str
    documents: int
    bytes: int
    measured: tuple[Measured, ...]

    def to_json(self) -> dict[str, Any]:
        measured = [one.to_json(self.bytes) for one in self.measured]
        return {"text": self.name, "documents": self.documents, "bytes": self.bytes, "measured": measured}


def measured(name: str, documents: Iterable[Document], tokenizers: Sequence[Tokenizer]) -> Row:
    """What each tokenizer makes of the documents."""
    sums = np.zeros((len(tokenizers), 3), np.int64)
    num_documents = num_bytes = 0
    for texts, ended in _chunks(documents):
        num_documents += ended
        num_bytes += sum(len(text.encode()) for text in texts)
        for place, tokenizer in enumerate(tokenizers):
            ids = np.concatenate(tokenizer.encode_batch(texts))
            sums[place] += (len(ids), (ids == tokenizer.unknown).sum(), tokenizer.is_byte_V[ids].sum())
    return Row(name, num_documents, num_bytes, tuple(Measured(*map(int, one)) for one in sums))


def _chunks(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    """Texts that are encoded at once, and how many documents are among them."""
    texts: list[str] = []
    size = ended = 0
    for document in documents:
        texts += cut_up(document.text)
        size, ended = size + len(document.text), ended + 1
        if size >= CHUNK_CHARACTERS:
            yield texts, ended
            texts, size, ended = [], 0, 0
    if texts:
        yield texts, ended
