"""Training a Unigram vocabulary in T5's layout: `<pad>`, `</s>`, `<unk>`, pieces, `<extra_id_99>` ... `<extra_id_0>`.

Text is NFKC-normalized and keeps its line breaks and indentation, which source code needs. T5 puts a space before a
text; here every line starts with one, so that a word is the same piece at the start of a line as inside it. A piece
never joins letters, digits, punctuation and line breaks: source code has long runs of them without a space, and
training on such "words" takes many times as long.
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
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark for a space."""
COVERAGE = 0.9995
"""Fraction of the characters of a text, by frequency, that have a piece."""
SPECIAL = ("<pad>", "</s>", "<unk>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Pieces that stand for a byte, as SentencePiece names them."""
WORDS = "|".join(
    [
        rf"[\n{SPACE}]{{1,16}}(?={SPACE})",  # line breaks and indentation, except the space that begins a word
        rf"{SPACE}?[\p{{L}}\p{{M}}]{{1,32}}",
        rf"{SPACE}?\p{{N}}",
        rf"{SPACE}?[^\p{{L}}\p{{M}}\p{{N}}\s{SPACE}]{{1,8}}",
        rf"[\s{SPACE}]",
    ]
)
"""Pattern of the words that text is split into before pieces are found. No piece crosses the bounds of a word."""


def sentinel(index: int) -> str:
    return f"<extra_id_{index}>"


def sentinel_tokens(names: Iterable[str]) -> list[AddedToken]:
    """Return the tokens of sentinels. They absorb the spaces around them: text after one starts with a space again."""
    return [AddedToken(name, lstrip=True, rstrip=True) for name in names]


class VocabSize(NamedTuple):
    """The size of a vocabulary, and which of its ids are reserved."""

    vocab_size: int
    num_sentinels: int = NUM_SENTINELS
    byte_fallback: bool = False

    @property
    def num_reserved(self) -> int:
        """Number of ids that are special, sentinels or bytes, not pieces of text."""
        return len(SPECIAL) + self.num_sentinels + len(BYTES) * self.byte_fallback


def train_unigram(texts: list[str], size: VocabSize) -> Tokenizer:
    """Train a tokenizer of exactly `size.vocab_size` ids. Characters beyond `COVERAGE` become bytes or `<unk>`.

    Raises DataError if there is no text, or if its distinct characters alone outnumber the pieces.
    """
    if not texts:
        raise DataError(
            "data.corpora: no document to train a vocabulary on: add text, loosen data.filters, or take a smaller "
            "held_out_fraction or smaller documents (sample_by: line)"
        )
    blank_rare, alphabet = _alphabet(texts)
    # With as many pieces as characters the trainer does not stop there: one more is the least that works.
    if (min_size := len(alphabet) + size.num_reserved + 1) > size.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size ({size.vocab_size}) must hold {len(SPECIAL)} special ids, {size.num_sentinels} "
            f"sentinels{f', {len(BYTES)} bytes' * size.byte_fallback} and the text's {len(alphabet)} characters: take "
            f"{min_size} or more"
        )
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace("\r\n", "\n"),
            normalizers.Prepend(" "),
            normalizers.Replace("\n", "\n "),  # a space at the start of every line; the decoder removes it
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
    tokenizer.train_from_iterator((text.translate(blank_rare) for text in texts), trainer)
    _complete(tokenizer, num_pieces, size)
    return tokenizer


def _complete(tokenizer: Tokenizer, num_pieces: int, size: VocabSize) -> None:
    """Put the trained pieces in order, and add special, byte and unused pieces (up to `num_pieces`), and sentinels."""
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    special, trained = vocabulary[: len(SPECIAL)], vocabulary[len(SPECIAL) :]
    # Training adds up in a different order each time. Scores differ by about 1e-11, which must not change the ids.
    pieces = sorted(((piece, round(score, 4)) for piece, score in trained), key=lambda item: (-item[1], item[0]))
    lowest = pieces[-1][1]
    # "<unused_0>" joins punctuation, letters and digits. No word does, so the piece never matches.
    unused = [(f"<unused_{index}>", lowest) for index in range(num_pieces - len(trained))]
    byte_pieces = [(piece, 0.0) for piece in BYTES] if size.byte_fallback else []
    tokenizer.model = models.Unigram(
        [*map(tuple, special), *byte_pieces, *pieces, *unused],
        unk_id=SPECIAL.index("<unk>"),
        byte_fallback=size.byte_fallback,
    )
    tokenizer.add_special_tokens(sentinel_tokens(map(sentinel, reversed(range(size.num_sentinels)))))


def _alphabet(texts: list[str]) -> tuple[dict[int, str], set[str]]:
    """Return a table for `str.translate` that blanks rare characters, and the characters that NFKC then makes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    by_count = sorted(counts, key=lambda character: (-counts[character], character))
    # Number of characters of text before each distinct character in `by_count`. A distinct character is common if the
    # ones before it do not reach `COVERAGE` yet.
    preceding = accumulate((counts[character] for character in by_count), initial=0)
    wanted = sum(counts.values()) * COVERAGE
    num_common = sum(number < wanted for number in preceding)
    blank_rare = {ord(character): " " for character in by_count[num_common:]}
    # Of the whole texts, as letters and accents that stand side by side become one character.
    return blank_rare, {" "}.union(*(unicodedata.normalize("NFKC", text.translate(blank_rare)) for text in texts))
