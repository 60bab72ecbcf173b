"""A `spiece.model`, converted, gives the ids that SentencePiece gives; what is no such file is refused in words.

Left out of the equality, as the module says: special pieces spelt out, marks out of Unicode's order or on a character
that is rewritten, a line break of two characters where spaces are kept, and ways to cut a line that are equally likely
but for the rounding of float32.
"""

import io
import random
import struct
import sys
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
from google.protobuf import runtime_version
from hypothesis import given, settings
from hypothesis import strategies as st

from switchcli.data.tokenizer.tokenizer import Tokenizer, TokenizerFile
from switchcli.errors import DataError, RecipeError

ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyzéüßñçøąő",
    "vietnamese": "aăâbcdđeêghiklmnoôơpqrstuưvxyấềộữ",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяґї",
    "greek": "αβγδεζηθικλμνξοπρστυφχψωάέήίόύώς",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي\u0651\u064e",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשת\u05bc\u05b8",
    "devanagari": "अआइउएकखगचजटडतदनपबमयरलवशसह\u093e\u093f\u0940\u094d",
    "thai": "กขคงจชซญดตถทนบปผพฟมยรลวสหอ\u0e31\u0e34\u0e35\u0e48\u0e49",
    "hangul": "가나다라마바사아자차카타파하한국어말글",
    "kana": "あいうえおかきくけこさしすせそカタナガパ",
    "han": "的一是不了人我在有他这中大来上国个到说们",
}
ODD = [
    *("  ", "\t", "\u00a0", "\u3000", "\ufeff", "\u200b", "\x07", "5%", "(", ".", "\u2026", "\u2581", "\U0001f600"),
    *("\ufb01", "\uff21\uff11", "\uff5e", "\u210c", "\u2460", "\u00bd", "\U0001d504"),  # compatibility characters
]


class Model(NamedTuple):
    ours: Tokenizer
    theirs: sentencepiece.SentencePieceProcessor
    data: bytes


def words(seed: int, count: int) -> list[str]:
    """Words of every script, the earlier of each the more often."""
    draw = random.Random(seed)
    lexicons = [
        ["".join(draw.choices(alphabet, k=draw.randint(1, 7))) for _ in range(60)] for alphabet in ALPHABETS.values()
    ]
    return [draw.choice(lexicons)[int(60 * draw.random() ** 2)] for _ in range(count)]


def lines(seed: int, count: int) -> list[str]:
    found = words(seed, count * 12)
    return [" ".join(found[index : index + 12]) for index in range(0, len(found), 12)]


def trained(**options: Any) -> bytes:
    model = io.BytesIO()
    layout = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 1200, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines(0, 1500)), model_writer=model, minloglevel=2, **{**layout, **options}
    )
    return model.getvalue()


def opened(data: bytes) -> Model:
    return Model(
        Tokenizer.from_bytes(data, "spiece.model"), sentencepiece.SentencePieceProcessor(model_proto=data), data
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "nmt_nfkc": {},
    "bytes": {"byte_fallback": True, "character_coverage": 0.98},
    "identity": {"normalization_rule_name": "identity"},
    "identity, bytes": {"normalization_rule_name": "identity", "byte_fallback": True},
    "nfkc, spaces kept": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False},
    "across words": {"split_by_whitespace": False},
    "pieces of the user": {"user_defined_symbols": ["ab", "[c4]", "的一"]},
}


UNIT = ("nmt_nfkc", "identity, bytes", "pieces of the user")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(options, id=name, marks=() if name in UNIT else pytest.mark.integration)
        for name, options in OPTIONS.items()
    ],
)
def model(request: pytest.FixtureRequest) -> Model:
    return opened(trained(**request.param))


def is_same(model: Model, text: str) -> bool:
    """Whether the ids are equal; or another way to cut the text is likelier by no more than float32 tells apart."""
    ours, theirs = model.ours.encode_batch([text])[0].tolist(), model.theirs.encode(text)
    if ours == theirs:
        return True
    scores = [sum(map(model.theirs.get_score, ids)) for ids in (ours, theirs)]
    unknown = [ids.count(model.ours.unknown) for ids in (ours, theirs)]
    return unknown[0] == unknown[1] and abs(scores[0] - scores[1]) < 1e-6 * abs(scores[0]) + 1e-4


def test_lines_that_it_was_not_trained_on(model: Model) -> None:
    unseen = [*lines(0, 2000)[1500:], *lines(1, 300)]
    assert [line for line in unseen if not is_same(model, line)] == []
    equal = sum(model.ours.encode_batch([line])[0].tolist() == model.theirs.encode(line) for line in unseen)
    assert equal >= 0.99 * len(unseen)
    assert not {id_ for line in unseen for id_ in model.theirs.encode(line)} <= {model.ours.unknown}


def test_decomposed_text_is_composed_first(model: Model) -> None:
    """The text is in NFD, with its marks in Unicode's order, which SentencePiece composes."""
    decomposed = [unicodedata.normalize("NFD", line) for line in lines(2, 100)]
    assert [line for line in decomposed if not is_same(model, line)] == []


PLAIN = sorted(
    {letter for name, letters in ALPHABETS.items() for letter in letters if unicodedata.category(letter)[0] != "M"}
)


@pytest.mark.integration
@settings(deadline=None, max_examples=100)
@given(text=st.lists(st.sampled_from([*PLAIN, *ODD, " ", " "]), max_size=20).map("".join))
def test_odd_characters(model: Model, text: str) -> None:
    assert is_same(model, text)


def test_a_joiner_stays_behind_a_character_that_is_rewritten(model: Model) -> None:
    befores = [*ODD, *"a²™", "क्", "\U0001f468"]
    texts = [f"x{before}\u200d{after}" for before in befores for after in ("", "a", " b", "ष", "\U0001f469", "\u200d")]
    assert [text for text in texts if not is_same(model, text)] == []


def test_what_it_says_again(model: Model) -> None:
    for line in lines(3, 100):
        ids = model.theirs.encode(line)
        if model.ours.unknown not in ids:
            assert model.ours.decode(ids) == model.theirs.decode(ids)


def test_the_layout_and_the_sentinels_after_it() -> None:
    data = trained(byte_fallback=True)
    ours, theirs, _ = opened(data)
    size = theirs.get_piece_size()
    assert ours.vocab_size == size + 100
    assert ours.sentinels.tolist() == list(range(size + 99, size - 1, -1))
    assert ours.unknown == theirs.unk_id()
    assert ours.is_byte_V.nonzero()[0].tolist() == [theirs.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    assert ours.decode(ours.encode("de <extra_id_0> ab")) == "de<extra_id_0> ab"
    again = Tokenizer.from_json(ours.to_json())
    assert again.sha256 == ours.sha256
    assert again.encode("ab 😀") == ours.encode("ab 😀") == theirs.encode("ab 😀")


@pytest.mark.parametrize("mark", ["", "▁"])
def test_sentinels_of_its_own_are_used(mark: str) -> None:
    ours, theirs, _ = opened(trained(user_defined_symbols=[f"{mark}<extra_id_{index}>" for index in (2, 1, 0)]))
    assert ours.vocab_size == theirs.get_piece_size()
    assert ours.sentinels.tolist() == [theirs.piece_to_id(f"{mark}<extra_id_{index}>") for index in range(3)]
    prompt = ours.encode("ab <extra_id_0> de")
    assert prompt == [*ours.encode("ab"), ours.sentinels[0], *ours.encode("de")]
    assert ours.sentinels[0] not in ours.encode_batch(["ab <extra_id_0> de"])[0]


def test_a_file_of_any_name(tmp_path: Path) -> None:
    data = trained()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    spec = TokenizerFile(path=str(path))
    assert spec.load().sha256 == opened(data).ours.sha256


# Files that are no such models


def number(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + number(value >> 7) if value > 0x7F else bytes([value])


def field(index: int, value: int | bytes) -> bytes:
    head = number(index << 3 | (2 if isinstance(value, bytes) else 0))
    return head + (number(len(value)) + value if isinstance(value, bytes) else number(value))


def piece(text: str, score: float = 0.0, type_: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + number(2 << 3 | 5) + struct.pack("<f", score) + field(3, type_))


T5 = piece("<pad>", type_=3) + piece("</s>", type_=3) + piece("<unk>", type_=2)
SMALL = T5 + piece("▁", -1.0) + piece("a", -2.0)


def charsmap(units: list[int], replacements: bytes) -> bytes:
    blob = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + replacements
    return SMALL + field(3, field(2, blob))


def test_a_model_written_by_hand_is_one() -> None:
    ours, theirs, _ = opened(SMALL)
    assert ours.encode("a aa") == theirs.encode("a aa") == [3, 4, 3, 4, 4]


def test_what_is_unknown_is_one_across_words_where_spaces_are_unknown() -> None:
    ours, theirs, _ = opened(T5 + piece("a", -2.0))
    assert ours.encode("a b c a") == theirs.encode("a b c a") == [2, 3, 2, 3]


FAULTS = {
    "empty": (b"", r"\b0\b.*\bunknown\b"),
    "text": (b"hello, this is text", "kind: train"),
    "BPE": (SMALL + field(2, field(3, 2)), r"\bBPE\b.*\bUnigram\b"),
    "another type": (SMALL + field(2, field(3, 9)), r"\bmodel_type\b.*\b9\b"),
    "a layout of another": (
        piece("<unk>", type_=2) + piece("<s>", type_=3) + piece("</s>", type_=3),
        "'<unk>'.*'<pad>'",
    ),
    "spaces after words": (SMALL + field(2, field(24, 1)), r"\bspaces\b"),
    "spaces without a mark": (SMALL + field(3, field(5, 0)), r"\bspaces\b"),
    "no bytes": (SMALL + field(2, field(35, 1)), r"\bbyte_fallback\b.*\b256\b"),
    "no score": (SMALL + piece("b", float("nan")), r"'b'.*\bnan\b"),
    "a score of 8 bytes": (SMALL + field(1, field(1, b"b") + number(2 << 3 | 1) + bytes(8)), r"\bscore\b.*\b0\b"),
    "an empty piece": (SMALL + piece(""), "\\(.*''.*\\)"),
    "an unused piece": (SMALL + piece("b", type_=5), r"'b'.*\b0\.0\b.*\bUNUSED\b"),
    "a piece twice": (SMALL + piece("a"), r"\bpiece\b.*\btwice\b"),
    "no UTF-8": (SMALL + field(1, field(1, b"\xff")), "UTF-8"),
    "a number for a piece": (SMALL + field(1, 7), r"\bpieces\b.*\b7\b"),
    "bytes for a type": (SMALL + field(1, field(1, b"b") + field(3, b"x")), r"\btype\b.*\bb'x'"),
    "a field of 2^60 bytes": (SMALL + number(2 << 3 | 2) + number(2**60), "kind: train"),
    "an endless number": (SMALL + b"\xff" * 30, "kind: train"),
    "a charsmap of 4 GiB": (SMALL + field(3, field(2, b"\xff\xff\xff\x7f" + bytes(8))), "charsmap"),
    "a charsmap cut": (SMALL + field(3, field(2, b"\x00")), r"\bcharsmap\b.*\bcut\b"),
    "a charsmap that leaves its array": (charsmap([0x7FFFFC00] + [0] * 255, b"a\0"), r"\bcharsmap\b.*\bout"),
    "a charsmap whose root is a value": (charsmap([0xFFFFFC00] + [0] * 255, b"a\0"), r"\bcharsmap\b.*\bout"),
    "a replacement that begins within a character": (
        charsmap([0x100 | 1 << 10, 0x80000001] + [0] * 254, "é\0".encode()),
        r"\bcharsmap\b.*\bout",
    ),
    "a replacement that is not UTF-8": (charsmap([0] * 256, b"\xff\0"), "utf-8"),
    "a replacement that is not there": (
        charsmap([0x100 | 1 << 10, 0x80000009] + [0] * 254, b"a\0"),
        r"\bcharsmap\b.*\bout",
    ),
}


@pytest.mark.parametrize(("data", "said"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_such_model_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        Tokenizer.from_bytes(data, "mine.model")
    assert str(caught.value).startswith("mine.model: ")
    assert "\n" not in str(caught.value)


def test_a_model_of_more_than_32_mib_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(DataError, match=r"mine\.model: .*\b33,554,434 bytes\b"):
        Tokenizer.from_bytes(b"\n\0" * (2**24 + 1), "mine.model")


PARSER = "sentencepiece.sentencepiece_model_pb2"


@pytest.mark.parametrize("missing", [PARSER, "google.protobuf.runtime_version"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(RecipeError, match=r"^mine\.model: .*\bpip install 'switchcli\[sentencepiece\]'") as caught:
        Tokenizer.from_bytes(SMALL, "mine.model")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_protobuf_that_is_too_old_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, PARSER, raising=False)
    monkeypatch.setattr(runtime_version, "MAJOR", 5)
    with pytest.raises(RecipeError, match=r"runtime 5\..*\bpip install 'switchcli\[sentencepiece\]'"):
        Tokenizer.from_bytes(SMALL, "mine.model")


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_model_is_refused_or_still_a_tokenizer(nfkc: bytes, data: st.DataObject) -> None:
    damaged = bytearray(nfkc[: data.draw(st.integers(0, len(nfkc)))])
    for place in data.draw(st.lists(st.integers(0, max(len(damaged) - 1, 0)), max_size=3)) if damaged else ():
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        tokenizer = Tokenizer.from_bytes(bytes(damaged), "mine.model")
    except DataError:
        return
    for text in ("ab ｆｉ① e\u0301 ﷺ", "".join(map(chr, range(0x2000, 0x3400)))):
        ids = tokenizer.encode_batch([text])[0]
        assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
        assert isinstance(tokenizer.decode(ids.tolist()), str)


@pytest.fixture(scope="module")
def nfkc() -> bytes:
    return trained(vocab_size=700)
