"""A Unigram model of SentencePiece (`spiece.model`) as a tokenizer of `tokenizers`.

sentencepiece and protobuf parse the file. They are an extra: runs and checkpoints hold a tokenizer.json instead.

A text gets the ids that SentencePiece gives it, but where
- it spells out a special or a byte piece (`<unk>`, `<0x41>`), which is then taken for one;
- a character that is rewritten, such as `²` or a no-break space, bears a combining mark, or `\\r` a `\\n`, which
  `tokenizers` drops;
- a letter's combining marks are in another order than Unicode's, which SentencePiece keeps;
- two ways to cut it are equally likely but for rounding: SentencePiece adds up in float32.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from switchcli.data.tokenizer.train import BYTES, NUM_SENTINELS, SPACE, sentinel, sentinel_tokens
from switchcli.errors import DataError, RecipeError

_SENTINEL: Final = re.compile(rf"{SPACE}?(<extra_id_\d{{1,6}}>)")
_UNMOVED: Final = {  # shadda, dagesh, shin dot, sin dot: written before vowels that Unicode's order puts before them
    mark: chr(0x10FFF0 + index) for index, mark in enumerate("\u0651\u05bc\u05c1\u05c2")
}
_MAX_BYTES: Final = 2**25  # a million pieces take some 2^24
_MAX_PIECES: Final = 2**21
_MAX_CHARSMAP_BYTES: Final = 2**22  # SentencePiece's own have some 2^18


class _Broken(Exception):
    """Why a file is no model that can be used."""


def read_model(data: bytes, where: str) -> Tokenizer:
    """Return the tokenizer of a `spiece.model`.

    Its sentinels are the model's, or `<extra_id_99>` ... `<extra_id_0>` after its last id.

    Raises:
        DataError: naming `where`, for a file that is cut or something else, and for models that are not Unigram.
        RecipeError: the extra `sentencepiece` is not installed.
    """
    message_class = _message_class(where)
    from google.protobuf.message import DecodeError

    try:
        if len(data) > _MAX_BYTES:
            raise _Broken(f"{len(data):,} bytes, more than {_MAX_BYTES:,}")
        return _tokenizer(message_class.FromString(data))
    except (_Broken, DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{where}: neither a tokenizer.json nor a SentencePiece model that can be used ({error}): take the "
            "tokenizer.json or spiece.model of a T5, or train a vocabulary (kind: train)"
        ) from error


def _message_class(where: str) -> Any:
    """Return sentencepiece's ModelProto. RecipeError where a package is missing or protobuf is older than it needs."""
    try:
        from google.protobuf.runtime_version import VersionError

        try:
            from sentencepiece.sentencepiece_model_pb2 import ModelProto
        except VersionError as error:
            raise ImportError(str(error)) from error
    except ImportError as error:
        raise RecipeError(
            f"{where}: not a tokenizer.json, and SentencePiece models need packages that are not installed ({error}): "
            "pip install 'switchcli[sentencepiece]', or use a tokenizer.json"
        ) from error
    return ModelProto


def _tokenizer(model: Any) -> Tokenizer:
    if len(model.pieces) > _MAX_PIECES:
        raise _Broken(f"more than {_MAX_PIECES:,} pieces")
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    _check_fields((model, trainer, normalizer, *model.pieces))
    if trainer.model_type != trainer.UNIGRAM:
        raise _Broken(f"its model is of type {trainer.ModelType.Name(trainer.model_type)}, only Unigram is read")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise _Broken("it marks spaces after words, or not at all")
    pieces = [_piece(piece) for piece in model.pieces]
    texts = {text for text, _ in pieces}
    if len(texts) != len(pieces):
        raise _Broken("a piece is there twice")
    unknown = [index for index, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN]
    if len(unknown) != 1:
        raise _Broken(f"{len(unknown)} pieces for what is unknown, there must be one")
    if trainer.byte_fallback and [piece.piece for piece in model.pieces if piece.type == piece.BYTE] != list(BYTES):
        raise _Broken("byte_fallback without the 256 pieces <0x00> ... <0xFF>")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown[0], byte_fallback=trainer.byte_fallback))
    tokenizer.normalizer = normalizers.Sequence([*_charsmap(normalizer.precompiled_charsmap), *_spaces(normalizer)])
    if SPACE in texts and not any(SPACE in text[1:] for text in texts):  # words part there: the same ids, found faster
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=True)
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    sentinels = [text for text, _ in pieces if _SENTINEL.fullmatch(text)]
    tokenizer.add_special_tokens(sentinel_tokens(sentinels or map(sentinel, reversed(range(NUM_SENTINELS)))))
    return tokenizer


def _check_fields(messages: Iterable[Any]) -> None:
    """Refuse a known field whose value has another type or is not in its enumeration: the parser skips it."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    for message in messages:
        for field in UnknownFieldSet(message):
            if known := message.DESCRIPTOR.fields_by_number.get(field.field_number):
                raise _Broken(f"{known.full_name} cannot be {field.data!r:.40}")


def _piece(piece: Any) -> tuple[str, float]:
    """Return text and score. A sentinel loses its mark for a space.

    SentencePiece prefers pieces that the user defined to all others, and long ones to short ones.
    """
    text, score = piece.piece, float(f"{piece.score:.9g}")  # all digits of a float32: more would change in JSON
    if not isinstance(text, str):
        raise _Broken(f"text that is not UTF-8: {text!r:.40}")
    if not text or not math.isfinite(score) or piece.type == piece.UNUSED:
        raise _Broken(f"a piece {text!r} of score {score} and type {piece.Type.Name(piece.type)}")
    if sentinel_match := _SENTINEL.fullmatch(text):
        text = sentinel_match[1]
    return text, (len(text.encode()) - 1) / 10 if piece.type == piece.USER_DEFINED else score


def _spaces(normalizer: Any) -> Iterator[normalizers.Normalizer]:
    """Spaces at the ends and repeated ones go, each that is left gets its mark, and the text begins with one."""
    trim = normalizer.remove_extra_whitespaces
    if trim:
        yield normalizers.Replace(Regex(r"\A +"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    yield normalizers.Replace(" ", SPACE)
    if trim:
        yield normalizers.Replace(Regex(rf"{SPACE}+\z"), "")
    if normalizer.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)


def _charsmap(data: bytes) -> list[normalizers.Normalizer]:
    """Return what rewrites characters by a precompiled charsmap.

    `tokenizers` takes the shortest rule that fits the beginning of a letter and its marks, where SentencePiece takes
    the longest: composed before, they are one character to both. SentencePiece reorders no marks, which composing
    does, and which matters where these are used: behind stand-ins they stay where they are.
    """
    if not data:
        return []
    _check_charsmap(data)
    rules = normalizers.Precompiled(data)
    if rules.normalize_str("e\u0301") != "\u00e9":
        return [rules]
    away = [normalizers.Replace(mark, stand_in) for mark, stand_in in _UNMOVED.items()]
    back = [normalizers.Replace(stand_in, mark) for mark, stand_in in _UNMOVED.items()]
    return [*away, normalizers.NFC(), *back, rules]


def _check_charsmap(data: bytes) -> None:
    """Refuse a charsmap on which `tokenizers` would panic while it rewrites a text.

    A charsmap is the length of a trie in bytes, the trie as a double array of 32-bit units, and replacements in UTF-8,
    each ended by a NUL. A unit's bit 31 marks a value: the rest is where a replacement begins. In other units bit 8
    says that the first child is a value, and the children of unit i are at `base(i) ^ byte`.
    """
    size = int.from_bytes(data[:4], "little")
    replacements = data[4 + size :]
    if len(data) > _MAX_CHARSMAP_BYTES or not size or size % 4 or not replacements.endswith(b"\0"):
        raise _Broken("its charsmap is cut, or none")
    replacements.decode("utf-8")
    begins = np.frombuffer(replacements, np.uint8) & 0xC0 != 0x80  # not within a character
    units = np.frombuffer(data, "<u4", size // 4, offset=4).astype(np.int64)
    bases = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    is_node = units < 2**31
    is_node[0] = True  # a search follows the root whatever its bits are
    if (bases[is_node] | 0xFF).max() >= len(units):
        raise _Broken("its charsmap points out of itself")
    values = units[bases[is_node & (units & 0x100 != 0)]] & 0x7FFFFFFF
    if (values >= len(begins)).any() or not begins[values].all():
        raise _Broken("its charsmap points out of itself")
