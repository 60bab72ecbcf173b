"""The text that a vocabulary is trained on: documents chosen by a hash of each, in shares of the components.

A component is a corpus or a language. Whatever there is to read, little more than the sample is held.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import chain, cycle
from typing import Final

from switchcli.data.sources.document import Document

MAX_READ: Final = 2**30
"""Characters of each component that are looked at, in its own order: 1 GiB of English."""


def sample_texts(
    components: Mapping[str, Iterable[Document]],
    max_characters: int,
    alpha: float | None = None,
    max_read: int = MAX_READ,
) -> list[str]:
    """Texts of at most `max_characters` in all, and no more than there are.

    With an `alpha` each component has a share in proportion to (its characters)^alpha, a small one by coming again and
    again; with None the documents of all are alike.
    """
    read = [_first(documents, max_read) for documents in components.values()]
    kept: list[_Kept] = []
    for documents in [chain.from_iterable(read)] if alpha is None else read:
        kept.append(_Kept(documents, max_characters))
        for one, share in zip(kept, _shares(kept, max_characters, alpha or 0.0), strict=True):
            one.shrink(share)  # it only becomes less with each component that is still to come
    shares = _shares(kept, min(max_characters, sum(one.characters for one in kept)), alpha or 0.0)
    return [text for one, share in zip(kept, shares, strict=True) for text in one.texts(share)]


def _shares(kept: "list[_Kept]", characters: int, alpha: float) -> list[float]:
    weights = [one.characters**alpha if one.characters else 0.0 for one in kept]
    return [characters * weight / (sum(weights) or 1.0) for weight in weights]


def _first(documents: Iterable[Document], max_read: int) -> Iterator[Document]:
    left = max_read
    for document in documents:
        yield document
        left -= len(document.text)
        if left <= 0:
            return


class _Kept:
    """Those documents of a component that have the lowest hashes."""

    def __init__(self, documents: Iterable[Document], max_characters: int) -> None:
        self.characters = 0
        """Of the whole component."""
        self._heap: list[tuple[int, str, str]] = []
        self._size = 0
        for document in documents:
            identity = document.identity.encode("utf-8", "surrogatepass")
            digest = blake2b(identity, digest_size=8, person=b"vocabulary").digest()
            beginning = document.text[:max_characters]
            heapq.heappush(self._heap, (-int.from_bytes(digest), document.name, beginning))
            self.characters += len(document.text)
            self._size += len(beginning)
            self.shrink(max_characters)

    def shrink(self, max_characters: float) -> None:
        """To whole documents, or to the beginning of the first."""
        while self._size > max_characters and len(self._heap) > 1:
            self._size -= len(heapq.heappop(self._heap)[2])
        if self._size > max_characters:
            key, name, text = self._heap[0]
            self._heap[0] = (key, name, text[: int(max_characters)])
            self._size = int(max_characters)

    def texts(self, max_characters: float) -> Iterator[str]:
        """In the order of the hashes; all of them over again while the component is smaller than its share."""
        self.shrink(max_characters)
        in_order = [text for _, _, text in sorted(self._heap, reverse=True) if text]
        if self.characters >= max_characters:
            yield from in_order
            return
        left = max_characters
        for text in cycle(in_order):
            left -= len(text)
            if left < 0:
                return
            yield text
