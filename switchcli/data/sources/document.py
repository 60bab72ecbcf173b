"""Document and CorpusSpec: one text of a corpus, and what every kind of corpus can do. The kinds are in `corpus`."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Self

from pydantic import Field, model_validator

from switchcli.data.prepare.digests import Digests
from switchcli.errors import DataError
from switchcli.spec import Spec

LANGUAGE: Final = "{language}"
"""What stands in a corpus of several `languages` for each of them."""

LABELS: Final = {"weight", "language", "languages"}
"""Keys of a corpus that change nothing of its text."""


class Document(NamedTuple):
    """A text of a corpus."""

    name: str
    """Where it is, for messages."""
    text: str
    identity: str
    """What decides whether it is held out: the text itself, so that equal texts are on one side wherever they lie."""
    row: int
    """Its number among the raw rows of its piece, from 0: rows that gave no document count too."""


class SourceShard(NamedTuple):
    """A part of a corpus that is read by itself: in any process, on any machine."""

    name: str
    """No other piece of the corpus has it, and it stays the same while the corpus does."""
    size: int | None
    """Bytes to read, None where unknown: for progress."""


class CorpusSpec(Spec, ABC):
    """Where documents come from: a fixed sequence of pieces, each a fixed sequence of documents."""

    weight: float = Field(default=1.0, gt=0.0)
    """How often it is shown beside others, in a mixture."""
    language: str | None = Field(default=None, min_length=1)
    """A label: texts of one language are mixed and measured together."""
    languages: tuple[str, ...] = ()
    """Makes this a corpus for each of them: `{language}`, in any other value here, is replaced by it."""

    @model_validator(mode="after")
    def _languages_have_their_place(self) -> Self:
        templated = LANGUAGE in str(self.model_dump(exclude=LABELS))
        if self.languages and self.language is not None:
            raise ValueError("language is the label of one corpus, languages makes one for each: give one of the two")
        if len(set(self.languages)) < len(self.languages):
            raise ValueError(f"languages names one twice ({', '.join(self.languages)}): name each once")
        if self.languages and not templated:
            raise ValueError(f"languages is given, but {LANGUAGE} stands nowhere here, such as in a path: put it there")
        if templated and not self.languages:
            raise ValueError(f"{LANGUAGE} stands for each of languages, and none are given: give languages")
        return self

    def per_language(self) -> tuple[Self, ...]:
        """The corpus itself, or one for each of `languages`."""
        if not self.languages:
            return (self,)
        settings = self.model_dump(exclude={"languages"})
        found = [{**_filled(settings, language), "language": language} for language in self.languages]
        return tuple(type(self).model_validate(one) for one in found)

    @abstractmethod
    def source_shards(self) -> tuple[SourceShard, ...]:
        """All pieces, in order, the same on every machine; no text is read. Raises DataError where there is nothing."""

    @abstractmethod
    def read(self, piece: SourceShard, start: int = 0, dropped: Counter[str] | None = None) -> Iterator[Document]:
        """The documents of a piece in order, from raw row `start`. What is passed over on purpose is counted in
        `dropped`, by reason. Raises DataError for what cannot be read."""

    @abstractmethod
    def fingerprint(self, digests: Digests) -> str:
        """Return a text that changes when the corpus's documents may have. Weight and label do not count.

        `digests` gives the contents of local files. Raises DataError as `pieces`.
        """

    def legacy_fingerprint(self) -> str:
        """Return the fingerprint of versions up to 0.1, which checkpoints of streams recorded; "" for newer kinds."""
        return ""

    @abstractmethod
    def empty_error(self) -> DataError:
        """What to raise when all pieces together have no document."""

    def documents(self) -> Iterator[Document]:
        """All of them, piece after piece; of each language in turn. Raises DataError as `read`, and for no text."""
        empty = True
        for corpus in self.per_language():
            for piece in corpus.source_shards():
                for document in corpus.read(piece):
                    empty = False
                    yield document
        if empty:
            raise self.empty_error()


def is_held_out(document_identity: str, fraction: float) -> bool:
    """Whether the document of this identity is of the `fraction` kept for evaluation: the same anywhere, always."""
    digest = hashlib.blake2b(document_identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def _filled(value: Any, language: str) -> Any:
    if isinstance(value, str):
        return value.replace(LANGUAGE, language)
    if isinstance(value, tuple):
        return tuple(_filled(one, language) for one in value)
    return {key: _filled(one, language) for key, one in value.items()} if isinstance(value, dict) else value
