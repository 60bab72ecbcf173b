"""Kinds of the tokens of Python source: on examples by hand, and in rows where the tokens lie."""

import keyword
from collections.abc import Iterable
from itertools import groupby

import numpy as np
import pytest
import torch

from switchcli.data import python_kinds
from switchcli.data.config import RowObjective
from switchcli.data.dataset import TokenDataset
from switchcli.data.objectives.denoisers import Denoisers, PrefixLanguageModel
from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.store import TokenShard, TokenStore
from switchcli.data.python_kinds import KINDS, kinds_of, kinds_shard, piece_kinds
from switchcli.data.text_batches import PreparedTextSource
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import VocabSize, train_unigram

SOURCE = '''"""Doc string of
two lines: if x is not y."""
import os  # a comment, with "quotes"


class Match:
    def is_even(self, match: int) -> bool:
        text = 'for' + b'in'.decode()
        return match % 2 == 0 and None is not text
'''
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def kinds_by_character(text: str) -> list[tuple[str, str]] | None:
    """The runs of equal kind, each with its text, where every character is a piece."""
    kinds = piece_kinds([*text])
    if kinds is None:
        return None
    named = zip((KINDS[kind] for kind in kinds.tolist()), text, strict=True)
    return [(kind, "".join(one for _, one in run)) for kind, run in groupby(named, key=lambda pair: pair[0])]


def test_the_characters_of_a_source_have_the_kinds_of_pythons_tokens() -> None:
    found = kinds_by_character(SOURCE)
    assert found is not None
    texts = {kind: [text for of, text in found if of == kind] for kind in KINDS}
    assert texts["none"] == []
    assert texts["string"] == ['"""Doc string of\ntwo lines: if x is not y."""', "'for'", "b'in'"]
    assert texts["comment"] == ['# a comment, with "quotes"']
    words = ["import", "class", "def", "return", "and", "None", "is", "not"]
    assert texts["keyword"] == words
    assert all(map(keyword.iskeyword, words))
    assert texts["name"] == [
        "os",
        "Match",
        "is_even",
        "self",
        "match",
        "int",
        "bool",
        "text",
        "decode",
        "match",
        "text",
    ]
    assert "".join("".join(texts["other"]).split()) == ":(,:)->:=+.()%2==0"
    assert "".join(text for _, text in found) == SOURCE


@pytest.mark.parametrize("begin", [" ", "  \n", ""])
def test_spaces_before_a_text_or_before_each_line_shift_no_kind(begin: str) -> None:
    plain = piece_kinds([*SOURCE])
    assert plain is not None
    lines = SOURCE.split("\n")
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)])[:-1]
    indented = piece_kinds([*"\n".join(f" {line}" for line in lines)])
    assert indented is not None
    spaces = starts + np.arange(len(starts))
    # The string of two lines has the space of its second line within.
    assert {KINDS[kind] for kind in indented[spaces].tolist()} == {"other", "string"}
    assert np.delete(indented, spaces).tolist() == plain.tolist()
    first = piece_kinds([*begin, *SOURCE])
    assert first is not None
    assert first.tolist() == [KINDS.index("other")] * len(begin) + plain.tolist()


def test_a_piece_has_the_kind_of_most_of_its_characters() -> None:
    pieces = ["x", " =", " (", '"a', 'b")', "  ", "# no", "te\n", "if", " x", ": pas", "s\n"]
    found = piece_kinds(pieces)
    assert found is not None
    named = [KINDS[kind] for kind in found.tolist()]
    assert named == [
        *("name", "other", "other", "string", "string", "other", "comment", "comment", "keyword", "name"),
        *("keyword", "keyword"),  # 1 of 2 characters of `s\n`: equally many, and keywords come first
    ]


def test_a_character_without_a_piece_is_an_operator_where_it_stands_alone_and_a_letter_elsewhere() -> None:
    source = f"a {UNKNOWN} b\na {UNKNOWN}= {UNKNOWN}x\nn{UNKNOWN}me = '{UNKNOWN}{UNKNOWN}'\n"
    found = kinds_by_character(source.replace("\n", "\n"))
    assert found is not None
    assert [text for kind, text in found if kind == "name"] == ["a", "b", "a", f"{UNKNOWN}x", f"n{UNKNOWN}me"]
    assert [text for kind, text in found if kind == "string"] == [f"'{UNKNOWN}{UNKNOWN}'"]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "Prose, which is no Python.",
            "word",
            "Some words\nin lines",
            '"""Quoted."""',
            "(1 + 2) * 3",
            "",
            " ",
            "\n\n",
        ),
        *("if x:\nno block", "x = (", "x = '''", "x = 1\0", "(" * 3000, "-" * 100_000 + "1", "x = 1 \\"),
    ],
)
def test_what_is_no_python_source_has_no_kinds(text: str) -> None:
    assert piece_kinds([*text]) is None
    assert piece_kinds([*f" {text}"]) is None
    assert piece_kinds([*"x = 1\n"]) is not None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_unigram([SOURCE * 3], VocabSize(500, byte_fallback=True)), "trained")


PROSE = "Words, and no source.\n"
OBJECTIVES: dict[str, RowObjective] = {
    "spans": SpanCorruption(inputs_length=32),
    "prefix": PrefixLanguageModel(inputs_length=20, targets_length=20, text_length=30),
    "denoisers": Denoisers(inputs_length=64, prompt_tokens=6),
    "documents": WholeDocumentObjective(SpanCorruption(inputs_length=48)),
}


def a_shard(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenShard:
    documents = tokenizer.encode_batch([*texts])
    offsets = np.cumsum([0, *map(len, documents)])
    return TokenShard.of(TokenStore(np.concatenate(documents).astype(np.uint16), offsets))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_of_kinds_have_the_kind_of_each_token_where_the_token_lies(name: str, tokenizer: Tokenizer) -> None:
    """Each token has another kind where it occurs in another place: so all documents are one token of each kind."""
    objective = OBJECTIVES[name]
    texts = [SOURCE, PROSE, SOURCE + "# é\n", PROSE, SOURCE]
    shard = a_shard(tokenizer, texts)
    labeled = kinds_shard(shard, tokenizer)
    kinds = labeled.open().tokens.astype(np.int64) - tokenizer.vocab_size
    ids = shard.open().tokens
    assert labeled.open().offsets.tolist() == shard.open().offsets.tolist()
    prose = slice(*shard.open().offsets[1:3])
    assert set(kinds[prose].tolist()) == {0}
    assert set(kinds.tolist()) == {*range(len(KINDS))}
    # A store in which each token has an id of its own tells where the rows take their tokens from.
    numbered = TokenShard.of(TokenStore((10_000 + np.arange(len(ids))).astype(np.uint16), shard.open().offsets))
    source, of_kinds, of_numbers = (
        PreparedTextSource([TokenDataset([one], objective, 0)], tokenizer, objective, 0, 4)
        for one in (shard, labeled, numbered)
    )
    for step in range(5):
        batch, numbers = source.batch(step, 0, 4), of_numbers.batch(step, 0, 4)
        found = kinds_of(of_kinds.batch(step, 0, 4), tokenizer)
        for id_L, number_L, kind_L in zip(*(map(torch.flatten, one) for one in (batch, numbers, found)), strict=True):
            is_text_L = number_L >= 10_000
            place = number_L[is_text_L].numpy() - 10_000
            assert kind_L[is_text_L].tolist() == kinds[place].tolist()
            assert id_L[is_text_L].tolist() == ids[place].tolist()
            assert not kind_L[~is_text_L].any()
            assert is_text_L.any()


def test_shards_without_python_at_their_beginning_and_tokens_beyond_a_limit_are_left_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_kinds(texts: list[str]) -> list[bool]:
        store = kinds_shard(a_shard(tokenizer, texts), tokenizer).open()
        return [bool((part > tokenizer.vocab_size).any()) for part in np.split(store.tokens, store.offsets[1:-1])]

    assert has_kinds([PROSE] * 31 + [SOURCE, PROSE, SOURCE]) == [False] * 31 + [True, False, True]
    assert not any(has_kinds([PROSE] * 32 + [SOURCE]))
    length = len(tokenizer.encode(SOURCE))
    monkeypatch.setattr(python_kinds, "MAX_TOKENS", 2 * length)
    assert has_kinds([SOURCE] * 3) == [True, True, False]
    monkeypatch.setattr(python_kinds, "MAX_TOKENS", 2 * length + 1)
    assert has_kinds([SOURCE] * 3) == [True] * 3
