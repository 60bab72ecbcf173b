"""Training a Unigram vocabulary in T5's layout: `<pad>`, `</s>`, `<unk>`, pieces, `<extra_id_99>` ... `<extra_id_0>`.

Text is NFKC-normalised and keeps its line breaks and indentation, which source code needs. Every line starts with the
space that T5 puts before a text, so that a word is the same piece at the start of a line as within it. A piece never
joins letters, digits, punctuation or line breaks: on source code, "words" that run on make training take many times as
long.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from switchcli.errors import DataError

NUM_SENTINELS = 100
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark for a space
SPECIAL = ("<pad>", "</s>", "<unk>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # SentencePiece's names
WORDS = "|".join(
    [
        rf"[\n{SPACE}]{{1,16}}(?={SPACE})",  # line breaks and indentation, but for the space that begins a word
        rf"{SPACE}?[\p{{L}}\p{{M}}]{{1,32}}",
        rf"{SPACE}?\p{{N}}",
        rf"{SPACE}?[^\p{{L}}\p{{M}}\p{{N}}\s{SPACE}]{{1,8}}",
        rf"[\s{SPACE}]",
    ]
)


def sentinel(index: int) -> str:
    return f"<extra_id_{index}>"


def sentinel_tokens(names: Iterable[str]) -> list[AddedToken]:
    """Spaces around a sentinel belong to it: the text after it gets the space of a text's start again."""
    return [AddedToken(name, lstrip=True, rstrip=True) for name in names]


class Size(NamedTuple):
    """How many ids there are in all, and those that are no pieces of text."""

    vocab_size: int
    num_sentinels: int = NUM_SENTINELS
    byte_fallback: bool = False

    @property
    def num_reserved(self) -> int:
        return len(SPECIAL) + self.num_sentinels + len(BYTES) * self.byte_fallback


def train_unigram(texts: list[str], size: Size, character_coverage: float = 0.9995) -> Tokenizer:
    """A tokenizer of exactly `size.vocab_size` ids. Characters beyond the coverage have bytes, or `<unk>`.

    Raises DataError when there is no text, or when its characters alone outnumber the pieces.
    """
    if not texts:
        raise DataError("data.corpora: no text to train a vocabulary on: add text, or take a smaller held_out_fraction")
    rare, alphabet = _alphabet(texts, character_coverage)
    if (least := len(alphabet) + size.num_reserved) > size.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size ({size.vocab_size}) must hold {len(SPECIAL)} special ids, {size.num_sentinels} "
            f"sentinels{f', {len(BYTES)} bytes' * size.byte_fallback} and the text's {len(alphabet)} characters: take "
            f"{least} or more, or a smaller character_coverage"
        )
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace("\r\n", "\n"),
            normalizers.Prepend(" "),
            normalizers.Replace("\n", "\n "),
            normalizers.Replace(" ", SPACE),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_text = [decoders.ByteFallback()] if size.byte_fallback else []
    tokenizer.decoder = decoders.Sequence(
        [
            *to_text,
            decoders.Fuse(),
            decoders.Replace(f"\n{SPACE}", "\n"),
            decoders.Replace(SPACE, " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    num_pieces = size.vocab_size - size.num_reserved
    trainer = trainers.UnigramTrainer(
        vocab_size=len(SPECIAL) + num_pieces, show_progress=False, special_tokens=list(SPECIAL), unk_token="<unk>"
    )
    tokenizer.train_from_iterator((text.translate(rare) for text in texts), trainer)
    _complete(tokenizer, num_pieces, size)
    return tokenizer


def _complete(tokenizer: Tokenizer, num_pieces: int, size: Size) -> None:
    """Orders the pieces, adds what a small text does not yield of `num_pieces`, the bytes and the sentinels."""
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    special, trained = vocabulary[: len(SPECIAL)], vocabulary[len(SPECIAL) :]
    # Training adds up in an order that is another each time: scores differ by some 1e-11, which must not reach the ids.
    pieces = sorted(((piece, round(score, 4)) for piece, score in trained), key=lambda item: (-item[1], item[0]))
    lowest = pieces[-1][1]
    # A piece across digits and punctuation is never matched, for the words it would be sought in do not join them.
    unused = [(f"<unused_{index}>", lowest) for index in range(num_pieces - len(trained))]
    in_bytes = [(piece, 0.0) for piece in BYTES] if size.byte_fallback else []
    tokenizer.model = models.Unigram(
        [*map(tuple, special), *in_bytes, *pieces, *unused],
        unk_id=SPECIAL.index("<unk>"),
        byte_fallback=size.byte_fallback,
    )
    tokenizer.add_special_tokens(sentinel_tokens(map(sentinel, reversed(range(size.num_sentinels)))))


def _alphabet(texts: list[str], coverage: float) -> tuple[dict[int, str], set[str]]:
    """For `str.translate`, what blanks out the rare characters; and the normalised ones that are left for pieces."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    by_number = sorted(counts, key=lambda character: (-counts[character], character))
    covered = accumulate((counts[character] for character in by_number), initial=0)
    enough = sum(counts.values()) * coverage
    num_common = sum(before < enough for before in covered)  # characters before which the coverage is not reached yet
    rare = {ord(character): " " for character in by_number[num_common:]}
    return rare, {" ", *unicodedata.normalize("NFKC", "".join(by_number[:num_common]))}
