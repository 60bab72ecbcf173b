"""Tokenizer: text to ids and back, in T5's layout; and the specs that load one.

The layout: 0 `<pad>`, 1 `</s>`, and anywhere `<unk>` (T5's 2, umT5's 3) and the sentinels `<extra_id_0>`,
`<extra_id_1>`, ... Training a vocabulary is in `switchcli.data.tokenizer.train`, reading one of SentencePiece in
`switchcli.data.tokenizer.sentencepiece`.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from pydantic import Field, model_validator

from switchcli.data.sources.document import Document
from switchcli.data.sources.io_errors import data_errors
from switchcli.data.tokenizer.sample import sample_texts
from switchcli.data.tokenizer.sentencepiece import read_model
from switchcli.data.tokenizer.train import BYTES, NUM_SENTINELS, Size, sentinel, train_unigram
from switchcli.errors import DataError
from switchcli.spec import EOS, MOST, PAD, Place, Spec
from switchcli.user_files import expanded, read_regular

MAX_BYTES: Final = 2**28
"""Of a file: the largest vocabularies have some 2^25."""

_MAX_IDS: Final = 2**24
"""More rows than any embedding has."""

_USE: Final = "use one written by `tokenizers`"
_CANNOT: Final = "fails on this text"
_PATH: Final = "data.tokenizer.path"

Documents = Callable[[], Mapping[str, Iterable[Document]]]
"""The training documents of each component, a corpus or a language; asked for only where a vocabulary is trained."""


class Tokenizer:
    """A `tokenizer.json` whose ids are T5's.

    vocab_size: one more than the highest id. sentinels: int64 ids, `<extra_id_0>` first. unknown: the id of `<unk>`.
    is_byte_V: bool [vocab_size], the ids that stand for a byte of a character without a piece. sha256: of `to_json()`.
    """

    def __init__(self, inner: tokenizers.Tokenizer, where: str) -> None:
        """Takes over `inner`. Raises DataError, naming `where`, for other special ids or no sentinels."""
        inner.no_truncation()  # a saved tokenizer may cut or pad every text
        inner.no_padding()
        for index, piece in ((PAD, "<pad>"), (EOS, "</s>")):
            if inner.id_to_token(index) != piece:
                raise DataError(
                    f"{where}: id {index} is {inner.id_to_token(index)!r}, T5's layout needs {piece!r} there: "
                    "use a T5 tokenizer, or train one (kind: train)"
                )
        if (unknown := inner.token_to_id("<unk>")) is None:
            raise DataError(f"{where}: no <unk> in the vocabulary: use a T5 tokenizer, or train one (kind: train)")
        self.unknown = int(unknown)
        ids = (inner.token_to_id(sentinel(index)) for index in count())
        self.sentinels: NDArray[np.int64] = np.array(list(takewhile(lambda id_: id_ is not None, ids)), dtype=np.int64)
        if not self.sentinels.size:
            raise DataError(
                f"{where}: no {sentinel(0)} in the vocabulary, span corruption needs sentinels: use a T5 tokenizer, "
                "or train one (kind: train)"
            )
        self._inner, self._where = inner, where
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > _MAX_IDS:
            raise DataError(f"{where}: ids up to {self.vocab_size - 1}, at most {_MAX_IDS - 1} can be used: {_USE}")
        self._plain = np.arange(self.vocab_size)
        self._plain[[PAD, EOS, *self.sentinels]] = self.unknown
        text = self.to_json()
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        in_bytes = map(inner.token_to_id, BYTES if json.loads(text)["model"].get("byte_fallback") else ())
        self.is_byte_V = np.isin(np.arange(self.vocab_size), [index for index in in_bytes if index is not None])

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer.json") -> Self:
        """Raises DataError, naming `where`, for anything that `tokenizers` cannot load."""
        with _explained(where, "not a tokenizer.json"):
            if not isinstance(json.loads(text), dict):  # what is not an object makes the library panic
                raise ValueError("not a JSON object")
            inner = tokenizers.Tokenizer.from_str(text)
        return cls(inner, where)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Of a `tokenizer.json` or a `spiece.model`. Raises DataError, naming `where`, for anything else."""
        if data.lstrip()[:1] != b"{":
            return cls(read_model(data, where), where)
        try:
            return cls.from_json(data.decode("utf-8"), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error.reason}): use a tokenizer.json by `tokenizers`") from error

    @classmethod
    def read(cls, path: Path, key: str = "") -> Self:
        """A `tokenizer.json` or a `spiece.model`. Raises DataError, naming the recipe's `key`, for anything else."""
        return cls.from_bytes(read_file(path, key), str(path))

    def to_json(self) -> str:
        return str(self._inner.to_str())

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [str(self._inner.id_to_token(index)) for index in ids]

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt: `<extra_id_0>` in it is that sentinel. No EOS is added."""
        with _explained(self._where, _CANNOT):
            return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """The ids, int64, of each text of a corpus: padding, EOS or a sentinel spelt out there is none. Adds no EOS."""
        self._inner.encode_special_tokens = True
        try:
            with _explained(self._where, _CANNOT):
                encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            self._inner.encode_special_tokens = False
        # T5's own vocabulary has them as ordinary pieces too, so that text may still match one: it becomes <unk>.
        # An array makes numbers of Python's integers in half the time that numpy takes.
        return [self._plain[np.frombuffer(array("I", encoding.ids), dtype=np.uintc)] for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text: padding and EOS left out, sentinels as `<extra_id_0>`."""
        kept = [index for index in ids if index not in (PAD, EOS)]
        with _explained(self._where, _CANNOT):
            return str(self._inner.decode(kept, skip_special_tokens=False))


@contextmanager
def _explained(where: str, fault: str) -> Iterator[None]:
    """The library's failures as DataError: it raises bare `Exception`, and a panic that is not even one."""
    try:
        yield
    except BaseException as error:
        if (
            type(error) is Exception
            or isinstance(error, ValueError | RecursionError)
            or type(error).__name__ == "PanicException"
        ):
            raise DataError(f"{where}: {fault} ({error}): {_USE}") from error
        raise


def read_file(path: Path, key: str = "") -> bytes:
    """What is in a tokenizer's file. Raises DataError, naming the recipe's `key`."""
    where = f"{key}: {path}" if key else str(path)
    way_out = "name a tokenizer.json or a spiece.model"
    try:
        return read_regular(expanded(path), MAX_BYTES)
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror}): {way_out}") from error


class TrainedTokenizer(Spec):
    """A Unigram vocabulary trained on the training documents: the same prose or code gives the same one.

    Where words are few and equally frequent, training breaks ties by chance; cache and checkpoint keep its choice.
    """

    kind: Literal["train"] = "train"
    vocab_size: int = Field(default=8192, ge=1, le=MOST["vocab_size"])
    """Ids in all, sentinels and bytes included; what a small corpus leaves free is filled with pieces that no text
    uses."""
    max_characters: int = Field(default=10_000_000, ge=1, le=MOST["count"])
    """Trained on a sample of the documents of at most so many characters."""
    byte_fallback: bool = False
    """Whether a character without a piece becomes its UTF-8 bytes, by 256 ids, and not `<unk>`."""
    character_coverage: float = Field(default=0.9995, gt=0.0, le=1.0)
    """Share of the sample's characters that get a piece; the rare rest does not."""
    num_sentinels: int = Field(default=NUM_SENTINELS, ge=1, le=MOST["row_tokens"])
    alpha: float | None = Field(default=None, ge=0.0, le=1.0)
    """The share of a component (a corpus, a language) of the sample is in proportion to (its characters)^alpha: 0.3 in
    mT5, 1 as they are, 0 the same for all. Absent: documents of all as they come."""

    @model_validator(mode="after")
    def _there_is_room(self) -> Self:
        if self.vocab_size <= (reserved := self._size.num_reserved):
            raise ValueError(
                f"vocab_size ({self.vocab_size}) must be more than the {reserved} ids of special "
                "pieces, sentinels and bytes."
            )
        return self

    @property
    def _size(self) -> Size:
        return Size(self.vocab_size, self.num_sentinels, self.byte_fallback)

    def fingerprint(self) -> str:
        return f"train {self.model_dump_json()} tokenizers {tokenizers.__version__}"

    def load(self, documents: Documents) -> Tokenizer:
        """Trains on what `documents()` gives. Raises DataError when that is nothing, or has too many characters."""
        texts = sample_texts(documents(), self.max_characters, self.alpha)
        return Tokenizer(train_unigram(texts, self._size, self.character_coverage), "data.tokenizer")


class TokenizerFile(Spec):
    """A `tokenizer.json` in T5's layout, or SentencePiece's `spiece.model` of a Unigram model, whatever its name."""

    kind: Literal["file"] = "file"
    path: Place

    def fingerprint(self) -> str:
        return f"file {hashlib.sha256(read_file(Path(self.path), _PATH)).hexdigest()}"

    def load(self, documents: Documents) -> Tokenizer:
        """Raises DataError when the file is missing or no such tokenizer. `documents` is not called."""
        return Tokenizer.read(Path(self.path), _PATH)


class HubTokenizer(Spec):
    """The `tokenizer.json`, or else the `spiece.model`, of a repository of the hub, such as `google-t5/t5-base`."""

    kind: Literal["hub"] = "hub"
    path: Place
    revision: str = "main"
    """A commit or tag. With a branch, what was first read stays in the cache."""

    def fingerprint(self) -> str:
        return f"hub {self.path} {self.revision}"

    def load(self, documents: Documents) -> Tokenizer:
        """Raises DataError without the network or such a repository. `documents` is not called."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        where = f"data.tokenizer: {self.path}: no tokenizer.json or spiece.model can be had from the hub"
        way_out = "check path, revision and the network; or use `kind: file` with one that is here"
        with data_errors(where, way_out):
            try:
                file = hf_hub_download(self.path, "tokenizer.json", revision=self.revision)
            except EntryNotFoundError:
                file = hf_hub_download(self.path, "spiece.model", revision=self.revision)
        return TokenizerFile(path=file).load(documents)


def cached_file(repository: str, name: str) -> Path | None:
    """Return a file of a hub repository from the local Hugging Face cache, or None. No network is used."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, name)
    except HFValidationError:  # not a name on the hub
        return None
    return Path(found) if isinstance(found, str) else None


TokenizerSpec = Annotated[TrainedTokenizer | TokenizerFile | HubTokenizer, Field(discriminator="kind")]
