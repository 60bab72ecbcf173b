"""A trimmed tokenizer divides a text of kept tokens as before, and all special tokens keep their roles."""

import io
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from switchcli.data.sources.document import Document
from switchcli.data.tokenizer.tokenizer import Tokenizer, TrainedTokenizer
from switchcli.data.tokenizer.trim import TrimmedTokenizer, trim

ALPHABETS = ("abcdefgh", "klmnopqr", "абвгдежз")
SPECIAL = ["<pad>", "</s>", "<unk>"]
SENTINELS = ["<extra_id_2>", "<extra_id_1>", "<extra_id_0>"]


def words_of(alphabet: str) -> list[str]:
    draw = random.Random(alphabet)
    return ["".join(draw.choices(alphabet, k=draw.randint(1, 7))) for _ in range(60)]


LEXICON = [word for alphabet in ALPHABETS for word in words_of(alphabet)]
TEXTS = [" ".join(random.Random(seed).choices(LEXICON, k=30)) for seed in range(200)]


def unigram(byte_fallback: bool = False) -> Tokenizer:
    documents = [Document(str(number), text, text, number) for number, text in enumerate(TEXTS)]
    spec = TrainedTokenizer(vocab_size=700, byte_fallback=byte_fallback, num_sentinels=7)
    return spec.load(lambda: {"": documents})


def sentencepiece_model() -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        vocab_size=400, hard_vocab_limit=False, user_defined_symbols=["ab"],
    )  # fmt: skip
    return Tokenizer.from_bytes(model.getvalue(), "spiece.model")


def with_sentinels(inner: tokenizers.Tokenizer) -> Tokenizer:
    inner.add_special_tokens([*SPECIAL, *SENTINELS])
    return Tokenizer(inner, "made")


def bpe(prefix: str = "", byte_level: bool = False) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix=prefix))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel() if byte_level else pre_tokenizers.Whitespace()
    inner.decoder = decoders.ByteLevel() if byte_level else decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        continuing_subword_prefix=prefix,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
    )
    inner.train_from_iterator(TEXTS, trainer)
    return with_sentinels(inner)


def bpe_of_several_ways() -> Tokenizer:
    """Each piece may be made of any two pieces, as in a model that was converted from SentencePiece."""
    pieces = [*SPECIAL, *"abcdefgh", *dict.fromkeys(word[:end] for word in words_of("abcdefgh") for end in range(2, 7))]
    pieces = [*pieces, *dict.fromkeys(word[2:] for word in LEXICON[:60] if len(word) > 3 and word[2:] not in pieces)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in [*vocabulary][3:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return with_sentinels(inner)


def word_piece() -> Tokenizer:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(Regex("z"), "a")
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL))
    return with_sentinels(inner)


MADE: dict[str, Callable[[], Tokenizer]] = {
    "unigram": unigram,
    "unigram, bytes": lambda: unigram(byte_fallback=True),
    "sentencepiece": sentencepiece_model,
    "BPE": bpe,
    "BPE, bytes": lambda: bpe(byte_level=True),
    "BPE, a prefix": lambda: bpe(prefix="##"),
    "BPE, several ways": bpe_of_several_ways,
    "WordPiece": word_piece,
}


@pytest.fixture(scope="module", params=MADE)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MADE[request.param]()


def trimmed_to(tokenizer: Tokenizer, texts: list[str], size_for: Callable[[int], int] = int) -> TrimmedTokenizer:
    return trim(tokenizer, (texts[first : first + 2] for first in range(0, len(texts), 2)), size_for)


def ids_before(trimmed: TrimmedTokenizer, text: str) -> list[int]:
    """The ids of a text by the trimmed tokenizer, as the numbers that they had before."""
    return trimmed.kept[trimmed.tokenizer.encode_batch([text])[0]].tolist()


TEXT = st.lists(st.sampled_from([*LEXICON, "ж", "aé", "犬"]), min_size=1, max_size=12).map(" ".join)


def test_a_text_of_kept_tokens_is_divided_as_before(tokenizer: Tokenizer) -> None:
    """Also one that was not among the texts, and with pieces that fill up the vocabulary."""
    seen = set[bool]()

    @given(texts=st.lists(TEXT, min_size=1, max_size=4), others=st.lists(TEXT, max_size=8), extra=st.integers(0, 40))
    def holds(texts: list[str], others: list[str], extra: int) -> None:
        trimmed = trimmed_to(tokenizer, texts, lambda needed: needed + extra)
        assert len(trimmed.kept) == trimmed.tokenizer.vocab_size
        for text in [*texts, *others]:
            ids = tokenizer.encode_batch([text])[0].tolist()
            all_kept = set(ids) <= set(trimmed.kept.tolist())
            assert all_kept or text in others
            seen.add(all_kept)
            if all_kept:
                assert ids_before(trimmed, text) == ids

    holds()
    assert seen == {True, False}


def test_special_tokens_keep_their_roles_and_pieces_their_order(tokenizer: Tokenizer) -> None:
    trimmed = trimmed_to(tokenizer, TEXTS[:1])
    now = trimmed.tokenizer
    assert now.vocab_size < tokenizer.vocab_size
    assert now.pieces(range(now.vocab_size)) == tokenizer.pieces(trimmed.kept)
    assert np.all(np.diff(trimmed.kept) > 0)
    assert now.pieces([0, 1, now.unknown]) == SPECIAL
    assert trimmed.kept[now.sentinels].tolist() == tokenizer.sentinels.tolist()
    assert trimmed.kept[now.is_byte_V].tolist() == tokenizer.is_byte_V.nonzero()[0].tolist()
    assert now.decode(now.encode(TEXTS[0])) == tokenizer.decode(tokenizer.encode(TEXTS[0]))
    assert now.encode("<extra_id_0>")[-1] == now.sentinels[0]


def test_the_vocabulary_is_filled_up_with_the_lowest_ids(tokenizer: Tokenizer) -> None:
    alone = trimmed_to(tokenizer, TEXTS[:1])
    filled = trimmed_to(tokenizer, TEXTS[:1], lambda needed: needed + 20)
    assert alone.num_needed == filled.num_needed == len(alone.kept) == len(filled.kept) - 20
    added = np.setdiff1d(filled.kept, alone.kept)
    others = np.setdiff1d(np.arange(tokenizer.vocab_size), filled.kept)
    if json.loads(tokenizer.to_json())["model"]["type"] != "BPE":  # whose pieces wait for their parts
        assert added.max() < others.min()
        every = trimmed_to(tokenizer, TEXTS[:1], lambda needed: 10**6)
        assert every.tokenizer.sha256 == Tokenizer.from_json(tokenizer.to_json()).sha256


def made_of(pieces: list[tuple[str, float]], **changes: Any) -> Tokenizer:
    content = {"unk_id": 2, "byte_fallback": False, **changes}
    special = [*zip(SPECIAL, (0.0, 0.0, 0.0), strict=True)]
    return with_sentinels(tokenizers.Tokenizer(models.Unigram([*special, *pieces], **content)))


def test_the_lowest_score_stays_which_weighs_unknown_characters() -> None:
    """`a` has no piece. Without z an unknown a would cost 25 instead of 30, and a + bcd be likelier than ab + cd."""
    tokenizer = made_of([("ab", -15.0), ("cd", -15.0), ("bcd", -1.0), ("y", -2.0), ("z", -20.0)])
    trimmed = trimmed_to(tokenizer, ["abcd", "bcd"])
    assert "y" not in trimmed.tokenizer.pieces(range(trimmed.tokenizer.vocab_size))
    assert trimmed.tokenizer.pieces(trimmed.tokenizer.encode("abcd")) == ["ab", "cd"]


def test_other_words_become_characters_then_bytes_or_unknown() -> None:
    for byte_fallback in (False, True):
        tokenizer = unigram(byte_fallback)
        now = trimmed_to(tokenizer, [" ".join(words_of("abcdefgh"))]).tokenizer
        known, new = "hgfedcba abh", "klm"
        assert now.unknown not in now.encode(known)
        assert now.decode(now.encode(known)) == known
        assert (now.unknown in now.encode(new)) == (not byte_fallback)
        assert (now.decode(now.encode(new)) == new) == byte_fallback


def test_a_piece_of_bpe_fills_up_only_where_it_can_be_made() -> None:
    """`abc` has the lower id, and would stay a, b, c without `bc`."""
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, "a", "b", "c", "abc", "bc"])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("b", "c"), ("a", "bc")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    now = trimmed_to(with_sentinels(inner), ["a b c"], lambda needed: needed + 1).tokenizer
    assert now.pieces(range(now.vocab_size)) == [*SPECIAL, "a", "b", "c", "bc", *SENTINELS]


def test_an_id_without_a_piece_is_left_out_and_what_follows_it_keeps_its_row() -> None:
    vocabulary = {**{piece: index for index, piece in enumerate(SPECIAL)}, "a": 3, "c": 9, "b": 10}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    trimmed = trimmed_to(with_sentinels(inner), ["ab"])
    now = trimmed.tokenizer
    assert now.pieces(range(now.vocab_size)) == [*SPECIAL, "a", "b", *SENTINELS]
    assert trimmed.kept[:5].tolist() == [0, 1, 2, 3, 10]


def test_what_the_file_would_add_to_a_text_is_left_out() -> None:
    inner = tokenizers.Tokenizer.from_str(unigram().to_json())
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <extra_id_0>", special_tokens=[("<extra_id_0>", inner.token_to_id("<extra_id_0>"))]
    )
    trimmed = trimmed_to(Tokenizer(inner, "made"), TEXTS[:1])
    assert json.loads(trimmed.tokenizer.to_json())["post_processor"] is None
