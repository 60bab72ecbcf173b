"""A Unigram model of SentencePiece (`spiece.model`) as a tokenizer of `tokenizers`, read without either's own library.

The file is a protocol buffer, ModelProto of sentencepiece_model.proto. What is read of it:

    1 pieces           1 piece, 2 score, 3 type
    2 trainer_spec     3 model_type, 24 treat_whitespace_as_suffix, 35 byte_fallback
    3 normalizer_spec  2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces

A text gets the ids that SentencePiece gives it, but where
- it spells out a special or a byte piece (`<unk>`, `<0x41>`), which is then taken for one;
- a character that is rewritten, such as `²` or a no-break space, bears a combining mark, or `\\r` a `\\n`, which
  `tokenizers` drops;
- a letter's combining marks are in another order than Unicode's, which SentencePiece keeps;
- two ways to cut it are equally likely but for rounding: SentencePiece adds up in float32.
"""

import math
import re
from collections.abc import Iterator, Mapping
from struct import unpack
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from switchcli.data.tokenizer.train import BYTES, NUM_SENTINELS, SPACE, sentinel, sentinel_tokens
from switchcli.errors import DataError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # types of pieces; 5 is one that is not used
_UNIGRAM: Final = 1
_MODEL_TYPES: Final = {_UNIGRAM: "Unigram", 2: "BPE", 3: "word", 4: "character"}
_SENTINEL: Final = re.compile(rf"{SPACE}?(<extra_id_\d{{1,6}}>)")
_UNMOVED: Final = {  # shadda, dagesh, shin dot, sin dot: written before vowels that Unicode's order puts before them
    mark: chr(0x10FFF0 + index) for index, mark in enumerate("\u0651\u05bc\u05c1\u05c2")
}
_MAX_CHARSMAP_BYTES: Final = 2**22  # SentencePiece's own have some 2^18, its largest vocabularies 2^18 pieces
_MAX_PIECES: Final = 2**21


class _Broken(Exception):
    """Why a file is no model that can be used."""


class _Piece(NamedTuple):
    text: str
    score: float
    type: int


_Value = int | bytes
_Message = Mapping[int, _Value]  # the last value of each field: what counts where a field is given twice


def read_model(data: bytes, where: str) -> Tokenizer:
    """The tokenizer of a `spiece.model`; its sentinels are the model's, or `<extra_id_99>` ... `<extra_id_0>` after it.

    Raises:
        DataError: naming `where`, for a file that is cut or something else, and for models that are not Unigram.
    """
    try:
        return _tokenizer(*_parts(data))
    except _Broken as error:
        raise DataError(
            f"{where}: neither a tokenizer.json nor a SentencePiece model that can be used ({error}): take the "
            "tokenizer.json or spiece.model of a T5, or train a vocabulary (kind: train)"
        ) from error


def _tokenizer(pieces: list[_Piece], trainer: _Message, normalizer: _Message) -> Tokenizer:
    if (kind := trainer.get(3, _UNIGRAM)) != _UNIGRAM:
        raise _Broken(f"its model is of type {_MODEL_TYPES.get(_int(kind), kind)}, only Unigram is read")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise _Broken("it marks spaces after words, or not at all")
    byte_fallback = bool(trainer.get(35, 0))
    if byte_fallback and [piece.text for piece in pieces if piece.type == _BYTE] != list(BYTES):
        raise _Broken("byte_fallback without the 256 pieces <0x00> ... <0xFF>")
    unknown = [index for index, piece in enumerate(pieces) if piece.type == _UNKNOWN]
    if len(unknown) != 1:
        raise _Broken(f"{len(unknown)} pieces for what is unknown, there must be one")
    scored = [(piece.text, _score(piece)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=unknown[0], byte_fallback=byte_fallback))
    prefix, trim = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
    rules = _charsmap(_bytes(normalizer.get(2, b"")))
    tokenizer.normalizer = normalizers.Sequence([*rules, *_spaces(prefix, trim)])
    texts = {piece.text for piece in pieces}
    if SPACE in texts and not any(SPACE in text[1:] for text in texts):  # words part there: the same ids, found faster
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=True)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    own = [piece.text for piece in pieces if _SENTINEL.fullmatch(piece.text)]
    tokenizer.add_special_tokens(sentinel_tokens(own or map(sentinel, reversed(range(NUM_SENTINELS)))))
    return tokenizer


def _score(piece: _Piece) -> float:
    """As SentencePiece weighs it: what the user defined wins over all else, the longer the more."""
    return (len(piece.text.encode()) - 1) / 10 if piece.type == _USER_DEFINED else piece.score


def _spaces(prefix: bool, trim: bool) -> Iterator[normalizers.Normalizer]:
    """Spaces at the ends and repeated ones go, each that is left gets its mark, and the text begins with one."""
    if trim:
        yield normalizers.Replace(Regex(r"\A +"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    yield normalizers.Replace(" ", SPACE)
    if trim:
        yield normalizers.Replace(Regex(rf"{SPACE}+\z"), "")
    if prefix:
        yield normalizers.Prepend(SPACE)


# The rules for characters


def _charsmap(data: bytes) -> list[normalizers.Normalizer]:
    """What rewrites characters.

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
    """No walk through the charsmap leaves it, which `tokenizers` would find out too late.

    It is the length in bytes of a trie, the trie as a double array of units, and the replacements that its leaves
    point to, each ended by a NUL.
    """
    size = int.from_bytes(data[:4], "little")
    replacements = data[4 + size :]
    if len(data) > _MAX_CHARSMAP_BYTES or not size or size % 4 or not replacements.endswith(b"\0"):
        raise _Broken("its charsmap is cut, or none")
    _text(replacements)
    begins = np.frombuffer(replacements, np.uint8) & 0xC0 != 0x80  # not within a character
    units = np.frombuffer(data, "<u4", size // 4, offset=4).astype(np.int64)
    bases = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))  # a child lies at base ^ its byte
    seen = np.zeros(len(units), bool)
    level = np.zeros(1, np.int64)
    while level.size:
        seen[level] = True
        if (bases[level] | 0xFF).max() >= len(units):
            raise _Broken("its charsmap points out of itself")
        ends = units[bases[level[units[level] & 0x100 != 0]]] & 0x7FFFFFFF
        if (ends >= len(begins)).any() or not begins[ends].all():
            raise _Broken("its charsmap points out of itself")
        below = [_children(units, part) for part in np.array_split(bases[level], len(level) // 2**12 + 1)]
        level = np.unique(np.concatenate(below))
        level = level[~seen[level]]


def _children(units: NDArray[np.int64], bases: NDArray[np.int64]) -> NDArray[np.int64]:
    byte = np.arange(1, 256)
    places = bases[:, None] ^ byte
    return places[units[places] & 0x800000FF == byte]


# The wire format of protocol buffers


def _parts(data: bytes) -> tuple[list[_Piece], _Message, _Message]:
    """The pieces, trainer_spec and normalizer_spec."""
    pieces: list[_Piece] = []
    specs: dict[int, dict[int, _Value]] = {2: {}, 3: {}}
    for field, value in _fields(data):
        if field == 1:
            if len(pieces) == _MAX_PIECES:
                raise _Broken(f"more than {_MAX_PIECES:,} pieces")
            pieces.append(_piece(dict(_fields(_bytes(value)))))
        elif field in specs:
            specs[field].update(_fields(_bytes(value)))
    if len({piece.text for piece in pieces}) != len(pieces):
        raise _Broken("a piece is there twice")
    return pieces, specs[2], specs[3]


def _piece(message: _Message) -> _Piece:
    text, written = _text(_bytes(message.get(1, b""))), _bytes(message.get(2, bytes(4)))
    if len(written) != 4:
        raise _Broken(f"a score of {len(written)} bytes")
    score = float(f"{unpack('<f', written)[0]:.9g}")  # what a float32 says: more digits come out of JSON as other ones
    kind = _int(message.get(3, _NORMAL))
    if not text or not math.isfinite(score) or kind not in (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE):
        raise _Broken(f"a piece {text!r} of score {score} and type {kind}")
    found = _SENTINEL.fullmatch(text)
    return _Piece(found[1] if found else text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """Number and value of each field of a message: numbers from varints, bytes of all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire not in (1, 2, 5):
            raise _Broken("no protocol buffer")
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if size > len(data) - at:
            raise _Broken("it is cut")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it has ended: seven bits a byte, the lowest first."""
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise _Broken("it is cut, or no protocol buffer")


def _int(value: _Value) -> int:
    if isinstance(value, bytes):
        raise _Broken("bytes where a number belongs")
    return value


def _bytes(value: _Value) -> bytes:
    if isinstance(value, int):
        raise _Broken("a number where bytes belong")
    return value


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Broken(f"text that is not UTF-8: {error.reason}") from error
