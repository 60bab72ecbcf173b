"""A Unigram model of SentencePiece (`spiece.model`) as a tokenizer of the `tokenizers` library.

The packages sentencepiece and protobuf parse the file. They are an extra: runs and checkpoints hold a tokenizer.json.

A text gets the ids that SentencePiece gives it, with four exceptions:
- A special or byte piece spelled out in the text (`<unk>`, `<0x41>`) becomes that piece.
- `tokenizers` drops a combining mark, a variation selector or a zero-width non-joiner on a character that is rewritten,
  such as `²` or a no-break space, and the `\\n` after a `\\r`.
- Combining marks that are not in Unicode's order are put in it. SentencePiece keeps their order. Of FLORES-200, this
  concerns 7.5 % of the lines in Yoruba, 0.15 % in Hindi and none in 30 other languages.
- Of two segmentations that are equally likely but for rounding, either may win: SentencePiece adds up in float32.
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
# Shadda, dagesh, shin dot and sin dot are written before vowels that Unicode's canonical order puts before them. Each
# has a stand-in, a private-use code point that NFC does not move.
_STAND_INS: Final = {mark: chr(0x10FFF0 + index) for index, mark in enumerate("\u0651\u05bc\u05c1\u05c2")}
_JOINER: Final = "\u200d"
"""The zero-width joiner, which forms ligatures, in emoji and in Indic scripts."""
_JOINER_STAND_IN: Final = "\U0010ffef"
_MAX_BYTES: Final = 2**25  # a million pieces take about 2^24
_MAX_PIECES: Final = 2**21
_MAX_CHARSMAP_BYTES: Final = 2**22  # the charsmaps that SentencePiece ships have about 2^18


class _UnusableModelError(Exception):
    """A file is not a model that can be used. The message says why."""


def read_model(data: bytes, where: str) -> Tokenizer:
    """Return the tokenizer of a `spiece.model`.

    Its sentinels are the model's, or `<extra_id_99>` ... `<extra_id_0>` after its last id.

    Raises:
        DataError: naming `where`, for a damaged or different file, and for models that are not Unigram.
        RecipeError: the extra `sentencepiece` is not installed.
    """
    message_class = _message_class(where)
    from google.protobuf.message import DecodeError

    try:
        if len(data) > _MAX_BYTES:
            raise _UnusableModelError(f"{len(data):,} bytes, more than {_MAX_BYTES:,}")
        return _build_tokenizer(message_class.FromString(data))
    except (_UnusableModelError, DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{where}: neither a tokenizer.json nor a SentencePiece model that can be used ({error}): take the "
            "tokenizer.json or spiece.model of a T5, or train a vocabulary (kind: train)"
        ) from error


def _message_class(where: str) -> Any:
    """Return sentencepiece's ModelProto. Raises RecipeError if a package is missing or protobuf is too old for it."""
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


def _build_tokenizer(model: Any) -> Tokenizer:
    """Return the tokenizer of a parsed ModelProto. Raises _UnusableModelError for one that would give other ids."""
    if len(model.pieces) > _MAX_PIECES:
        raise _UnusableModelError(f"more than {_MAX_PIECES:,} pieces")
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    _check_fields((model, trainer, normalizer, *model.pieces))
    if trainer.model_type != trainer.UNIGRAM:
        model_type = trainer.ModelType.Name(trainer.model_type)
        raise _UnusableModelError(f"its model is of type {model_type}, only Unigram is read")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise _UnusableModelError("it marks spaces after words, or not at all")
    pieces = [_text_and_score(piece) for piece in model.pieces]
    texts = {text for text, _ in pieces}
    if len(texts) != len(pieces):
        raise _UnusableModelError("a piece is there twice")
    unknown = [index for index, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN]
    if len(unknown) != 1:
        raise _UnusableModelError(f"{len(unknown)} pieces of type unknown, there must be one")
    if trainer.byte_fallback and [piece.piece for piece in model.pieces if piece.type == piece.BYTE] != list(BYTES):
        raise _UnusableModelError("byte_fallback without the 256 pieces <0x00> ... <0xFF>")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown[0], byte_fallback=trainer.byte_fallback))
    tokenizer.normalizer = normalizers.Sequence(
        [*_charsmap_normalizers(normalizer.precompiled_charsmap), *_space_normalizers(normalizer)]
    )
    # If no piece holds a space after its first character, none crosses a word boundary. Splitting at spaces then gives
    # the same ids, faster.
    if SPACE in texts and not any(SPACE in text[1:] for text in texts):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=True)
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    sentinels = [text for text, _ in pieces if _SENTINEL.fullmatch(text)]
    tokenizer.add_special_tokens(sentinel_tokens(sentinels or map(sentinel, reversed(range(NUM_SENTINELS)))))
    return tokenizer


def _check_fields(messages: Iterable[Any]) -> None:
    """Refuse a known field with a value of another type, or outside its enumeration. protobuf ignores such values."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    for message in messages:
        for field in UnknownFieldSet(message):
            if known := message.DESCRIPTOR.fields_by_number.get(field.field_number):
                raise _UnusableModelError(f"{known.full_name} cannot be {field.data!r:.40}")


def _text_and_score(piece: Any) -> tuple[str, float]:
    """Return a piece's text, for a sentinel without its mark for a space, and its score."""
    text, score = piece.piece, float(f"{piece.score:.9g}")  # 9 digits identify a float32: more would change in JSON
    if not isinstance(text, str):
        raise _UnusableModelError(f"text that is not UTF-8: {text!r:.40}")
    if not text or not math.isfinite(score) or piece.type == piece.UNUSED:
        raise _UnusableModelError(f"a piece {text!r} of score {score} and type {piece.Type.Name(piece.type)}")
    if sentinel_match := _SENTINEL.fullmatch(text):
        text = sentinel_match[1]
    # SentencePiece prefers pieces that the user defined to all others, and long ones to short ones. Scores of other
    # pieces are log probabilities, at most 0; these are at least 0 and grow with the length in bytes.
    return text, (len(text.encode()) - 1) / 10 if piece.type == piece.USER_DEFINED else score


def _space_normalizers(normalizer: Any) -> Iterator[normalizers.Normalizer]:
    """Yield what removes spaces at the ends and repeated ones, marks the others, and begins the text with a mark."""
    trim = normalizer.remove_extra_whitespaces
    if trim:
        yield normalizers.Replace(Regex(r"\A +"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    yield normalizers.Replace(" ", SPACE)
    if trim:
        # After the replacement, since a text may hold the mark itself: SentencePiece trims that too.
        yield normalizers.Replace(Regex(rf"{SPACE}+\z"), "")
    if normalizer.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)


def _charsmap_normalizers(data: bytes) -> list[normalizers.Normalizer]:
    """Return what rewrites characters by a precompiled charsmap.

    For a letter followed by combining marks, `tokenizers` applies the shortest rule that fits, SentencePiece the
    longest. Composing them first (NFC) makes them one character for both. NFC also reorders marks, which SentencePiece
    does not: the marks for which this matters are replaced by stand-ins meanwhile.
    """
    if not data:
        return []
    _check_charsmap(data)
    precompiled = normalizers.Precompiled(data)
    rules: list[normalizers.Normalizer] = [precompiled]
    if precompiled.normalize_str(_JOINER) == _JOINER:
        # `tokenizers` would drop the joiner with which a character that a rule rewrites is one grapheme.
        hidden, shown = normalizers.Replace(_JOINER, _JOINER_STAND_IN), normalizers.Replace(_JOINER_STAND_IN, _JOINER)
        rules = [hidden, precompiled, shown]
    if precompiled.normalize_str("e\u0301") != "\u00e9":  # the charsmap does not compose
        return rules
    to_stand_ins = [normalizers.Replace(mark, stand_in) for mark, stand_in in _STAND_INS.items()]
    from_stand_ins = [normalizers.Replace(stand_in, mark) for mark, stand_in in _STAND_INS.items()]
    return [*to_stand_ins, normalizers.NFC(), *from_stand_ins, *rules]


def _check_charsmap(data: bytes) -> None:
    """Refuse a charsmap on which `tokenizers` would panic while it rewrites a text.

    A charsmap is the size of a trie in bytes (4 bytes, little-endian), the trie as a double array of 32-bit units, and
    the replacements, UTF-8 texts that each end in a NUL.

    Bit 31 of a unit marks a value: its other bits are the offset at which a replacement begins. Any other unit is a
    node. Bits 9 to 31 give its base: the child for a byte is at `base ^ byte`. Bit 8 says that the node has a value,
    which is at `base`, as the child for byte 0.
    """
    size = int.from_bytes(data[:4], "little")
    replacements = data[4 + size :]
    if len(data) > _MAX_CHARSMAP_BYTES or not size or size % 4 or not replacements.endswith(b"\0"):
        raise _UnusableModelError("its charsmap is cut, or none")
    replacements.decode("utf-8")
    # For each offset, whether a character begins there: bytes 10xxxxxx continue one.
    starts_character = np.frombuffer(replacements, np.uint8) & 0xC0 != 0x80
    units = np.frombuffer(data, "<u4", size // 4, offset=4).astype(np.int64)
    # The base of unit i is i ^ offset. The offset is bits 10 to 31, shifted by 0x200 >> 6 = 8 if bit 9 is set.
    bases = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    is_node = units < 2**31
    is_node[0] = True  # a search follows the root whatever its bits are
    # The children of a node are at base ^ byte for any byte of the text: at most at the base with its low 8 bits set.
    if (bases[is_node] | 0xFF).max() >= len(units):
        raise _UnusableModelError("its charsmap points out of itself")
    # Without bit 31, the unit at the base of a node with a value is an offset in the replacements.
    has_value = is_node & (units & 0x100 != 0)
    offsets = units[bases[has_value]] & 0x7FFFFFFF
    if (offsets >= len(starts_character)).any() or not starts_character[offsets].all():
        raise _UnusableModelError("its charsmap points out of itself")
