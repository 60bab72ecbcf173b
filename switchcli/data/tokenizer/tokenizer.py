"""Tokenizer: text to ids and back, in T5's layout; and the specs that load one.

In this layout id 0 is `<pad>` and id 1 is `</s>`. `<unk>` (2 in T5, 3 in umT5) and the sentinels `<extra_id_0>`,
`<extra_id_1>`, ... may have any ids. `data.tokenizer.train` trains a vocabulary, `data.tokenizer.sentencepiece` reads
one of SentencePiece.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from pydantic import Field, model_validator

from switchcli.data.sources.document import Document
from switchcli.data.sources.io_errors import data_errors
from switchcli.data.tokenizer.sample import sample_texts
from switchcli.data.tokenizer.sentencepiece import read_model
from switchcli.data.tokenizer.train import BYTES, NUM_SENTINELS, VocabSize, sentinel, train_unigram
from switchcli.errors import DataError
from switchcli.spec import EOS, PAD, Count, PathOrUrl, Size, Spec
from switchcli.system.user_files import read_regular

MAX_BYTES: Final = 2**28
"""Largest size of a tokenizer's file. The files of the largest vocabularies have some 2^25 bytes."""

_MAX_IDS: Final = 2**24
"""Largest vocabulary, above the rows of any published embedding."""

_FIX: Final = "use one written by `tokenizers`"
_ENCODING_FAILED: Final = "fails on this text"

Documents = Callable[[], Mapping[str, Iterable[Document]]]
"""Function that returns the training documents of each component, a corpus or a language."""
Wait = Callable[[str], AbstractContextManager[Any]]
"""Opens a display of work whose end is not known, by its description."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library whose ids are in T5's layout."""

    def __init__(self, inner: tokenizers.Tokenizer, where: str) -> None:
        """Take over `inner`: no other code may use it afterwards.

        Raises DataError, naming `where`, for other special ids or no sentinels.
        """
        inner.no_truncation()  # a saved tokenizer may truncate or pad every text
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
        """Id of `<unk>`."""
        ids = (inner.token_to_id(sentinel(index)) for index in count())
        self.sentinels: NDArray[np.int64] = np.array(list(takewhile(lambda id_: id_ is not None, ids)), dtype=np.int64)
        """Ids of the sentinels, `<extra_id_0>` first."""
        if not self.sentinels.size:
            raise DataError(
                f"{where}: no {sentinel(0)} in the vocabulary, span corruption needs sentinels: use a T5 tokenizer, "
                "or train one (kind: train)"
            )
        self._inner, self._where = inner, where
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the highest id. Ids below it may be without a piece."""
        if self.vocab_size > _MAX_IDS:
            raise DataError(f"{where}: ids up to {self.vocab_size - 1}, at most {_MAX_IDS - 1} can be used: {_FIX}")
        # Maps each id to itself, and those that no text of a corpus may have to <unk>.
        self._corpus_id_V = np.arange(self.vocab_size)
        self._corpus_id_V[[PAD, EOS, *self.sentinels]] = self.unknown
        text = self.to_json()
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        """Digest of `to_json()`."""
        has_bytes = json.loads(text)["model"].get("byte_fallback")
        byte_ids = [index for index in map(inner.token_to_id, BYTES if has_bytes else ()) if index is not None]
        self.is_byte_V = np.isin(np.arange(self.vocab_size), byte_ids)
        """Whether each id is one byte of a character without a piece: bool [vocab_size]."""

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer.json") -> Self:
        """Load the content of a tokenizer.json. Raises DataError, naming `where`, if `tokenizers` cannot load it."""
        with _library_errors(where, "not a tokenizer.json"):
            if not isinstance(json.loads(text), dict):  # on other JSON values the library panics
                raise ValueError("not a JSON object")
            inner = tokenizers.Tokenizer.from_str(text)
        return cls(inner, where)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Self:
        """Load a `tokenizer.json` or a `spiece.model`. Raises DataError, naming `where`, for anything else."""
        if data.lstrip()[:1] != b"{":
            return cls(read_model(data, where), where)
        try:
            return cls.from_json(data.decode("utf-8"), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error.reason}): use a tokenizer.json by `tokenizers`") from error

    @classmethod
    def read(cls, path: Path, key: str = "") -> Self:
        """Read a `tokenizer.json` or a `spiece.model`. Raises DataError, naming the recipe's `key`, for others."""
        try:
            data = read_regular(path, MAX_BYTES)
        except OSError as error:
            where = f"{key}: {path}" if key else str(path)
            raise DataError(
                f"{where}: cannot be read ({error.strerror}): name a tokenizer.json or a spiece.model"
            ) from error
        return cls.from_bytes(data, str(path))

    def to_json(self) -> str:
        return str(self._inner.to_str())

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the piece of each id, "" for an id that has none."""
        return [self._inner.id_to_token(index) or "" for index in ids]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, without EOS. `<extra_id_0>` in it becomes that sentinel."""
        with _library_errors(self._where, _ENCODING_FAILED):
            return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Return the ids of each text of a corpus, int64, without EOS.

        Special tokens spelled out in a text, such as `</s>` or `<extra_id_0>`, are encoded as ordinary text.
        """
        self._inner.encode_special_tokens = True
        try:
            with _library_errors(self._where, _ENCODING_FAILED):
                encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            self._inner.encode_special_tokens = False
        # T5's own vocabulary has the special tokens as ordinary pieces too: text that matches one becomes <unk>.
        # array("I") converts a list of integers in half the time of np.array.
        return [self._corpus_id_V[np.frombuffer(array("I", encoding.ids), dtype=np.uintc)] for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without padding and EOS, with sentinels spelled out as `<extra_id_0>`."""
        text_ids = [index for index in ids if index not in (PAD, EOS)]
        with _library_errors(self._where, _ENCODING_FAILED):
            return str(self._inner.decode(text_ids, skip_special_tokens=False))


@contextmanager
def _library_errors(where: str, fault: str) -> Iterator[None]:
    """Raise failures of `tokenizers` inside the block as DataError.

    The library raises bare `Exception`, or PanicException, which is a BaseException.
    """
    try:
        yield
    except BaseException as error:
        if (
            type(error) is Exception
            or isinstance(error, ValueError | RecursionError)
            or type(error).__name__ == "PanicException"
        ):
            raise DataError(f"{where}: {fault} ({error}): {_FIX}") from error
        raise


class TrainedTokenizer(Spec):
    """A Unigram vocabulary trained on the training documents. The same text gives the same vocabulary.

    The exception is a text of few, equally frequent words: training breaks its ties at random. The cache and
    checkpoints keep the result.
    """

    kind: Literal["train"] = "train"
    """`train` makes a tokenizer from the text of the run."""
    vocab_size: Size = 8192
    """Number of ids, including sentinels and bytes. If a small corpus yields fewer pieces, unused ones are added."""
    max_characters: Count = 10_000_000
    """Size in characters of the sample of documents to train on."""
    byte_fallback: bool = False
    """Whether a character without a piece becomes its UTF-8 bytes, which have 256 ids, instead of `<unk>`."""
    num_sentinels: Size = NUM_SENTINELS
    """Number of sentinels. T5 has 100."""
    alpha: float | None = Field(default=None, ge=0.0, le=1.0)
    """Exponent for the fraction of the sample that each text of a mixture (a language, or a corpus without one) makes
    up: it is in proportion to (its characters) ** alpha. mT5 uses 0.3; 1 keeps the proportions, 0 makes all equal.
    Default: documents of all texts are sampled alike."""

    @model_validator(mode="after")
    def _check_vocab_size(self) -> Self:
        if self.vocab_size <= (reserved := self._size.num_reserved):
            raise ValueError(
                f"vocab_size ({self.vocab_size}) must be more than the {reserved} ids of special "
                "pieces, sentinels and bytes."
            )
        return self

    @property
    def _size(self) -> VocabSize:
        return VocabSize(self.vocab_size, self.num_sentinels, self.byte_fallback)

    def fingerprint(self) -> str:
        return f"train {self.model_dump_json()} tokenizers {tokenizers.__version__}"

    def load(self, documents: Documents, wait: Wait = nullcontext) -> Tokenizer:
        """Train on `documents()`. Raises DataError if there is no text, or if it has too many distinct characters."""
        texts = sample_texts(documents(), self.max_characters, self.alpha)
        characters = sum(map(len, texts))
        with wait(f"training a vocabulary of {self.vocab_size:,} ids on {characters:,} characters"):
            return Tokenizer(train_unigram(texts, self._size), "data.tokenizer")


class TokenizerFile(Spec):
    """A `tokenizer.json` in T5's layout, or a SentencePiece Unigram model (`spiece.model`), under any name."""

    kind: Literal["file"] = "file"
    """`file` reads a tokenizer from a file."""
    path: PathOrUrl
    """Path of the file."""

    def load(self) -> Tokenizer:
        """Read the file. Raises DataError if it is missing or not such a tokenizer."""
        return Tokenizer.read(Path(self.path), "data.tokenizer.path")


class HubTokenizer(Spec):
    """The `tokenizer.json`, or else the `spiece.model`, of a repository on the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    """`hub` downloads a tokenizer from the Hugging Face hub."""
    path: PathOrUrl
    """Name of the repository, such as `google-t5/t5-base`."""
    revision: str = "main"
    """Commit, tag or branch. The file of a branch stays in the cache as it was when it was first read."""

    def load(self) -> Tokenizer:
        """Download the file. Raises DataError for no network or an unknown repository."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        where = f"data.tokenizer: {self.path}: no tokenizer.json or spiece.model can be read from the hub"
        with data_errors(where, "check path, revision and the network; or use `kind: file` with a local one"):
            try:
                file = hf_hub_download(self.path, "tokenizer.json", revision=self.revision)
            except EntryNotFoundError:
                file = hf_hub_download(self.path, "spiece.model", revision=self.revision)
        return TokenizerFile(path=file).load()


def cached_file(repository: str, name: str) -> Path | None:
    """Return the path of a hub repository's file in the local Hugging Face cache, or None. No network is used."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repository, name)
    except HFValidationError:  # not a name on the hub
        return None
    return Path(path) if isinstance(path, str) else None  # else None, or a marker that the hub has no such file


TokenizerSpec = Annotated[TrainedTokenizer | TokenizerFile | HubTokenizer, Field(discriminator="kind")]
