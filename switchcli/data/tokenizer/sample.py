"""The sample of text that a vocabulary is trained on: documents chosen by a hash of each.

A component is a text of a mixture. However much text there is, little more than the sample is in memory.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import chain, cycle
from typing import Final

from switchcli.data.sources.document import Document

MAX_READ: Final = 2**30
"""Characters that are read of each component, from its first document on: 1 GiB of English."""


def sample_texts(
    components: Mapping[str, Iterable[Document]],
    max_characters: int,
    alpha: float | None = None,
    max_read: int = MAX_READ,
) -> list[str]:
    """Return texts of at most `max_characters` in all, and no more than there are.

    With `alpha`, the part of a component is in proportion to (its characters) ** alpha, and documents of a small one
    repeat to fill its part. With None, the documents of all components are treated as one component.
    """
    streams = [_first_characters(documents, max_read) for documents in components.values()]
    if alpha is None:
        streams = [chain.from_iterable(streams)]
    samples: list[_Sample] = []
    for documents in streams:
        samples.append(_Sample(documents, max_characters))
        # The quota of a component only decreases as further components are read: what exceeds it now is never needed.
        for sample, quota in zip(samples, _quotas(samples, max_characters, alpha), strict=True):
            sample.shrink(quota)
    total = min(max_characters, sum(sample.num_characters for sample in samples))
    quotas = _quotas(samples, total, alpha)
    return [text for sample, quota in zip(samples, quotas, strict=True) for text in sample.texts(quota)]


def _quotas(samples: "list[_Sample]", characters: int, alpha: float | None) -> list[float]:
    """Return the part of `characters` of each sample's component. Components without text get none."""
    weights = [sample.num_characters ** (alpha or 0.0) if sample.num_characters else 0.0 for sample in samples]
    total = sum(weights) or 1.0
    return [characters * weight / total for weight in weights]


def _first_characters(documents: Iterable[Document], max_read: int) -> Iterator[Document]:
    """Yield documents until they have `max_read` characters or more."""
    remaining = max_read
    for document in documents:
        yield document
        remaining -= len(document.text)
        if remaining <= 0:
            return


class _Sample:
    """The documents of a component with the smallest hashes."""

    def __init__(self, documents: Iterable[Document], max_characters: int) -> None:
        """Read all documents, and keep those with the smallest hashes that fit into `max_characters`."""
        self.num_characters = 0
        """Characters of all documents that were read."""
        # A heap has its smallest key first. Keys are negated hashes, so that the first document is the one with the
        # largest hash: the next to be removed. The name makes the order unique where hashes are equal.
        self._heap: list[tuple[int, str, str]] = []
        self._size = 0  # characters in the heap
        for document in documents:
            identity = document.identity.encode("utf-8", "surrogatepass")
            digest = blake2b(identity, digest_size=8, person=b"vocabulary").digest()
            text = document.text[:max_characters]
            heapq.heappush(self._heap, (-int.from_bytes(digest), document.name, text))
            self.num_characters += len(document.text)
            self._size += len(text)
            self.shrink(max_characters)

    def shrink(self, max_characters: float) -> None:
        """Remove the documents with the largest hashes until the rest fits. A single document is cut instead."""
        while self._size > max_characters and len(self._heap) > 1:
            self._size -= len(heapq.heappop(self._heap)[2])
        if self._size > max_characters:
            key, name, text = self._heap[0]
            self._heap[0] = (key, name, text[: int(max_characters)])
            self._size = int(max_characters)

    def texts(self, max_characters: float) -> Iterator[str]:
        """Yield the texts by increasing hash, again and again if the component is smaller than `max_characters`."""
        self.shrink(max_characters)
        # Keys are negated hashes: the largest key is the smallest hash.
        texts = [text for _, _, text in sorted(self._heap, reverse=True) if text]
        if self.num_characters >= max_characters:
            yield from texts
            return
        remaining = max_characters
        for text in cycle(texts):
            remaining -= len(text)
            if remaining < 0:
                return
            yield text
