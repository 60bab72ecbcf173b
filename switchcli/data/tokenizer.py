"""Tokenizer: text to ids and back, in T5's layout; and the specs that load one.

The layout: 0 `<pad>`, 1 `</s>`, 2 `<unk>`, and the sentinels `<extra_id_0>`, `<extra_id_1>`, ... anywhere. Training a
vocabulary is in `switchcli.data.vocabulary`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from pydantic import Field

from switchcli.data.document import Document
from switchcli.data.vocabulary import NUM_SENTINELS, SPECIAL, sentinel, train_unigram
from switchcli.errors import DataError
from switchcli.spec import EOS, PAD, Spec


class Tokenizer:
    """A `tokenizer.json` whose ids are T5's.

    vocab_size: one more than the highest id. sentinels: int64 ids, `<extra_id_0>` first. sha256: of `to_json()`.
    """

    def __init__(self, inner: tokenizers.Tokenizer, where: str) -> None:
        """Takes over `inner`. Raises DataError, naming `where`, for other special ids or no sentinels."""
        inner.no_truncation()  # a saved tokenizer may cut or pad every text
        inner.no_padding()
        for index, piece in enumerate(SPECIAL):
            if inner.id_to_token(index) != piece:
                raise DataError(
                    f"{where}: id {index} is {inner.id_to_token(index)!r}, T5's layout needs {piece!r} there: "
                    "use a T5 tokenizer, or train one (kind: train)"
                )
        ids = (inner.token_to_id(sentinel(index)) for index in count())
        self.sentinels: NDArray[np.int64] = np.array(list(takewhile(lambda id_: id_ is not None, ids)), dtype=np.int64)
        if not self.sentinels.size:
            raise DataError(
                f"{where}: no {sentinel(0)} in the vocabulary, span corruption needs sentinels: use a T5 tokenizer, "
                "or train one (kind: train)"
            )
        self._inner = inner
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self._plain = np.arange(self.vocab_size)
        self._plain[[PAD, EOS, *self.sentinels]] = SPECIAL.index("<unk>")
        self.sha256 = hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str, where: str = "tokenizer.json") -> Self:
        """Raises DataError, naming `where`, for anything that `tokenizers` cannot load."""
        with _explained(where):
            if not isinstance(json.loads(text), dict):  # what is not an object makes the library panic
                raise ValueError("not a JSON object")
            inner = tokenizers.Tokenizer.from_str(text)
        return cls(inner, where)

    def to_json(self) -> str:
        return str(self._inner.to_str())

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt: `<extra_id_0>` in it is that sentinel. No EOS is added."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """The ids, int64, of each text of a corpus: padding, EOS or a sentinel spelt out there is none. Adds no EOS."""
        self._inner.encode_special_tokens = True
        try:
            encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            self._inner.encode_special_tokens = False
        # T5's own vocabulary has them as ordinary pieces too, so that text may still match one: it becomes <unk>.
        return [self._plain[encoding.ids] for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text: padding and EOS left out, sentinels as `<extra_id_0>`."""
        kept = [index for index in ids if index not in (PAD, EOS)]
        return str(self._inner.decode(kept, skip_special_tokens=False))


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """The library's failures as DataError: it raises bare `Exception`, and a panic that is not even one."""
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or isinstance(error, ValueError) or type(error).__name__ == "PanicException":
            raise DataError(f"{where}: not a tokenizer.json ({error}): use one written by `tokenizers`") from error
        raise


class TrainedTokenizer(Spec):
    """A Unigram vocabulary trained on the training documents: the same prose or code gives the same one.

    Where words are few and equally frequent, training breaks ties by chance; cache and checkpoint keep its choice.
    """

    kind: Literal["train"] = "train"
    vocab_size: int = Field(default=8192, ge=3 + NUM_SENTINELS + 1)
    """Ids in all, 100 sentinels included; what a small corpus leaves free is filled with pieces that no text uses."""
    max_characters: int = Field(default=10_000_000, ge=1)
    """Trained on a sample of the documents of at most so many characters."""

    def fingerprint(self) -> str:
        return f"train {self.model_dump_json()} tokenizers {tokenizers.__version__}"

    def load(self, documents: Callable[[], Iterable[Document]]) -> Tokenizer:
        """Trains on what `documents()` gives. Raises DataError when that is nothing."""
        return Tokenizer(train_unigram(documents(), self.vocab_size, self.max_characters), "data.tokenizer")


class TokenizerFile(Spec):
    """A `tokenizer.json` in T5's layout."""

    kind: Literal["file"] = "file"
    path: str

    def fingerprint(self) -> str:
        return f"file {hashlib.sha256(self._read().encode()).hexdigest()}"

    def load(self, documents: Callable[[], Iterable[Document]]) -> Tokenizer:
        """Raises DataError when the file is missing or no such tokenizer. `documents` is not called."""
        return Tokenizer.from_json(self._read(), self.path)

    def _read(self) -> str:
        path = Path(self.path).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.reason
            raise DataError(f"data.tokenizer.path: {path}: cannot be read ({reason}): name a tokenizer.json") from error


class HubTokenizer(Spec):
    """The `tokenizer.json` of a repository of the Hugging Face hub, such as `google-t5/t5-base`."""

    kind: Literal["hub"] = "hub"
    path: str
    revision: str = "main"
    """A commit or tag. With a branch, what was first read stays in the cache."""

    def fingerprint(self) -> str:
        return f"hub {self.path} {self.revision}"

    def load(self, documents: Callable[[], Iterable[Document]]) -> Tokenizer:
        """Raises DataError without the network or such a repository. `documents` is not called."""
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(self.path, "tokenizer.json", revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"data.tokenizer: {self.path}: tokenizer.json cannot be had from the hub ({reason}): check path, "
                "revision and the network; or use `kind: file` with one that is here"
            ) from error
        return TokenizerFile(path=file).load(documents)


TokenizerSpec = Annotated[TrainedTokenizer | TokenizerFile | HubTokenizer, Field(discriminator="kind")]
