"""Document, SourceShard and CorpusSpec: the interface of every kind of corpus. The kinds are in `corpus`."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from switchcli.errors import DataError
from switchcli.spec import Spec

LANGUAGE: Final = "{language}"
"""Placeholder that stands for each of a corpus's `languages`."""

LABELS: Final = {"weight", "language", "languages"}
"""Keys of a corpus that do not affect its text."""


class Document(NamedTuple):
    """A text of a corpus."""

    name: str
    """Position of the document, for messages."""
    text: str
    identity: str
    """String whose hash decides whether the document is held out. It is the text itself, so that equal texts are on the
    same side wherever they come from."""
    row: int
    """Number among the raw rows of its source shard, from 0. Rows that gave no document count too."""


class SourceShard(NamedTuple):
    """A part of a corpus that can be read independently, in any process and on any machine."""

    name: str
    """Unique within the corpus, and the same as long as the corpus does not change."""
    size: int | None
    """Bytes to read, for progress. None if unknown."""


class CorpusSpec(Spec, ABC):
    """A source of documents: a fixed sequence of source shards, each a fixed sequence of documents."""

    weight: float = Field(default=1.0, gt=0.0)
    """Relative frequency of the corpus in a mixture of kind `weighted`."""
    language: str | None = Field(default=None, min_length=1)
    """Label of the text: corpora of one language are mixed and evaluated together."""
    languages: tuple[str, ...] = ()
    """Languages to make a corpus for each of: `{language}` in any other value is replaced by it."""

    @model_validator(mode="after")
    def _check_languages(self) -> Self:
        is_template = LANGUAGE in str(self.model_dump(exclude=LABELS))
        if self.languages and self.language is not None:
            raise ValueError("language is the label of one corpus, languages makes one for each: give one of the two")
        if len(set(self.languages)) < len(self.languages):
            raise ValueError(f"languages names one twice ({', '.join(self.languages)}): name each once")
        if self.languages and not is_template:
            raise ValueError(f"languages is given, but {LANGUAGE} is in no value, such as a path: put it there")
        if is_template and not self.languages:
            raise ValueError(f"{LANGUAGE} stands for each of languages, and none are given: give languages")
        try:
            self.per_language()
        except ValidationError as error:  # such as a path that a language completes
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return self

    def per_language(self) -> tuple[Self, ...]:
        """Return one corpus for each of `languages`, or the corpus itself if there are none."""
        if not self.languages:
            return (self,)
        settings = self.model_dump(exclude={"languages"})
        return tuple(
            type(self).model_validate({**_substitute(settings, language), "language": language})
            for language in self.languages
        )

    def text_bytes(self) -> int | None:
        """Return the size of the text, or None if it is not known before the text is read."""
        return None

    @abstractmethod
    def source_shards(self) -> tuple[SourceShard, ...]:
        """Return all source shards, in an order that is the same on every machine. No text is read.

        Raises DataError if there are none.
        """

    @abstractmethod
    def read(self, shard: SourceShard, start: int = 0, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """Yield the documents of a source shard in order, from raw row `start` on.

        `dropped` counts the rows that are left out on purpose, by reason. Raises DataError for what cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that changes whenever the documents may have changed. Weight and labels do not count.

        Raises DataError as `source_shards`.
        """

    @abstractmethod
    def empty_error(self) -> DataError:
        """Return the error to raise when all source shards together have no document."""

    def documents(self) -> Iterator[Document]:
        """Yield the documents of all source shards, one language after the other.

        Raises DataError as `read`, and if there is no document.
        """
        is_empty = True
        for corpus in self.per_language():
            for source_shard in corpus.source_shards():
                for document in corpus.read(source_shard):
                    is_empty = False
                    yield document
        if is_empty:
            raise self.empty_error()


def is_held_out(document_identity: str, fraction: float) -> bool:
    """Whether a document belongs to the `fraction` held out for evaluation. It depends on the identity alone."""
    digest = hashlib.blake2b(document_identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # The digest is uniform over [0, 2^64). A larger fraction holds out a superset.
    return int.from_bytes(digest) < fraction * 2**64


def _substitute(value: Any, language: str) -> Any:
    """Return a value of a corpus with the placeholder replaced, in nested tuples and dictionaries too."""
    if isinstance(value, str):
        return value.replace(LANGUAGE, language)
    if isinstance(value, tuple):
        return tuple(_substitute(item, language) for item in value)
    return {key: _substitute(item, language) for key, item in value.items()} if isinstance(value, dict) else value
