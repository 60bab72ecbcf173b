"""Training a Unigram vocabulary in T5's layout: `<pad>`, `</s>`, `<unk>`, pieces, `<extra_id_99>` ... `<extra_id_0>`.

Text is NFKC-normalised and keeps its line breaks and indentation, which source code needs. Every line starts with the
space that T5 puts before a text, so that a word is the same piece at the start of a line as within it. A piece never
joins letters, digits, punctuation or line breaks: on source code, "words" that run on make training take many times as
long.
"""

import heapq
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from itertools import accumulate

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from switchcli.data.document import Document
from switchcli.errors import DataError

NUM_SENTINELS = 100
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark for a space
SPECIAL = ("<pad>", "</s>", "<unk>")
COVERAGE = 0.9995  # share of the characters that get a piece, as in SentencePiece: the rare rest is <unk>
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


def train_unigram(documents: Iterable[Document], vocab_size: int, max_characters: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids, from a sample of the documents.

    Raises DataError when there is no text, or when its characters alone outnumber the pieces.
    """
    texts = _sample(documents, max_characters)
    rare, alphabet = _alphabet(texts)
    num_pieces = vocab_size - NUM_SENTINELS
    if len(alphabet) + len(SPECIAL) > num_pieces:
        raise DataError(
            f"data.tokenizer.vocab_size ({vocab_size}) must hold {len(SPECIAL)} special ids, {NUM_SENTINELS} sentinels "
            f"and the text's {len(alphabet)} characters: take {len(alphabet) + len(SPECIAL) + NUM_SENTINELS} or more"
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
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace(f"\n{SPACE}", "\n"), decoders.Replace(SPACE, " "), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=num_pieces, show_progress=False, special_tokens=list(SPECIAL), unk_token="<unk>"
    )
    tokenizer.train_from_iterator((text.translate(rare) for text in texts), trainer)
    _complete(tokenizer, num_pieces)
    return tokenizer


def _complete(tokenizer: Tokenizer, num_pieces: int) -> None:
    """Orders the pieces, adds what a small text does not yield of `num_pieces`, and appends the sentinels."""
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    special, trained = vocabulary[: len(SPECIAL)], vocabulary[len(SPECIAL) :]
    # Training adds up in an order that is another each time: scores differ by some 1e-11, which must not reach the ids.
    pieces = sorted(((piece, round(score, 4)) for piece, score in trained), key=lambda item: (-item[1], item[0]))
    lowest = pieces[-1][1]
    # A piece across digits and punctuation is never matched, for the words it would be sought in do not join them.
    unused = [(f"<unused_{index}>", lowest) for index in range(num_pieces - len(vocabulary))]
    tokenizer.model = models.Unigram(
        [*map(tuple, special), *pieces, *unused], unk_id=SPECIAL.index("<unk>"), byte_fallback=False
    )
    # Spaces around a sentinel belong to it: the text after it gets the space of a text's start again.
    tokenizer.add_special_tokens(
        [AddedToken(sentinel(index), lstrip=True, rstrip=True) for index in reversed(range(NUM_SENTINELS))]
    )


def _sample(documents: Iterable[Document], max_characters: int) -> list[str]:
    """Documents of at most `max_characters` in all, chosen by a hash of their names; holds little more."""
    heap: list[tuple[int, str, str]] = []
    size = 0
    for name, text, *_ in documents:
        digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=b"vocabulary").digest()
        heapq.heappush(heap, (-int.from_bytes(digest), name, text[:max_characters]))
        size += len(text[:max_characters])
        while size > max_characters:
            size -= len(heapq.heappop(heap)[2])
    if not heap:
        raise DataError("data.corpora: no text to train a vocabulary on: add text, or take a smaller held_out_fraction")
    return [text for _, _, text in sorted(heap, reverse=True)]


def _alphabet(texts: list[str]) -> tuple[dict[int, str], set[str]]:
    """For `str.translate`, what blanks out the rare characters; and the normalised ones that are left for pieces."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    by_number = sorted(counts, key=lambda character: (-counts[character], character))
    covered = accumulate((counts[character] for character in by_number), initial=0)
    enough = sum(counts.values()) * COVERAGE
    num_common = sum(before < enough for before in covered)  # characters before which the coverage is not reached yet
    rare = {ord(character): " " for character in by_number[num_common:]}
    return rare, {" ", *unicodedata.normalize("NFKC", "".join(by_number[:num_common]))}
