"""The vocabulary in T5's layout: trained, saved, loaded, refused."""

import json
import random
import unicodedata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming_words
from pydantic import ValidationError

from switchcli.data.sources.document import Document
from switchcli.data.sources.python_stdlib import PythonStdlib
from switchcli.data.tokenizer.tokenizer import HubTokenizer, Tokenizer, TokenizerFile, TrainedTokenizer
from switchcli.errors import DataError

TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n"
    "def jump(dog, over=3):\n    for fox in range(over):\n        dog.sleep(fox)\n\n    return dog\n"
)
DOCUMENTS = [Document(f"text {index}", TEXT * 5, f"text {index}", 0) for index in range(4)]


def train(vocab_size: int = 256, documents: list[Document] = DOCUMENTS) -> Tokenizer:
    return TrainedTokenizer(vocab_size=vocab_size).load(lambda: {"": documents})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train()


@pytest.mark.parametrize("vocab_size", [180, 256, 2000])
def test_the_layout_is_t5s_and_the_size_exact(vocab_size: int) -> None:
    tokenizer = train(vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.sentinels.tolist() == list(range(vocab_size - 1, vocab_size - 101, -1))
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert [inner.id_to_token(index) for index in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert inner.get_vocab_size() == vocab_size


def test_text_comes_back_with_its_line_breaks(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_batch([TEXT])[0]) == TEXT
    assert tokenizer.decode(tokenizer.encode("the dog\r\n  the fox")) == "the dog\n  the fox"


@settings(deadline=None, max_examples=100)
@given(text=st.text(alphabet=sorted(set(TEXT))))
def test_any_text_of_known_characters_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_batch([text])[0].tolist()) == text


def test_a_prompt_has_sentinels_and_a_corpus_has_none(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the <extra_id_0> dog <extra_id_1>")
    assert prompt == [
        *tokenizer.encode("the"),
        tokenizer.sentinels[0],
        *tokenizer.encode("dog"),
        tokenizer.sentinels[1],
    ]
    assert tokenizer.decode([0, *prompt, 1, 0]) == "the<extra_id_0> dog<extra_id_1>"
    spelt = tokenizer.encode_batch(["the <extra_id_0> dog </s> <pad>"])[0]
    assert not np.isin(spelt, [0, 1, *tokenizer.sentinels]).any()


def test_special_ids_never_come_from_a_corpus_even_as_pieces() -> None:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("<extra_id_0>", -1.0), ("a", -1.0)]
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2)), "made")
    assert tokenizer.encode_batch(["a</s><extra_id_0>a"])[0].tolist() == [4, 2, 2, 4]


def test_with_bytes_any_text_comes_back() -> None:
    tokenizer = TrainedTokenizer(vocab_size=500, byte_fallback=True).load(lambda: {"": DOCUMENTS})
    assert tokenizer.vocab_size == 500
    assert tokenizer.is_byte_V.nonzero()[0].tolist() == list(range(3, 259))
    assert tokenizer.pieces([3, 258]) == ["<0x00>", "<0xFF>"]
    assert not train().is_byte_V.any()
    ids = tokenizer.encode_batch(["dog \u72ac"])[0]
    assert tokenizer.pieces(ids[tokenizer.is_byte_V[ids]]) == ["<0xE7>", "<0x8A>", "<0xAC>"]

    @settings(deadline=None, max_examples=50)
    @given(text=st.text())
    def holds(text: str) -> None:
        ids = tokenizer.encode_batch([text])[0]
        assert tokenizer.unknown not in ids
        normal = tokenizers.normalizers.NFKC().normalize_str(text)  # by tables that are older than those of Python
        said = normal.replace("\r\n", "\n").replace("\u2581", " ")
        assert tokenizer.decode(ids.tolist()) == said

    holds()


def test_bytes_spelt_out_are_text() -> None:
    tokenizer = TrainedTokenizer(vocab_size=500, byte_fallback=True).load(lambda: {"": DOCUMENTS})
    for text in ("<0x41>", "<unk>", "</s><pad>"):
        assert tokenizer.decode(tokenizer.encode_batch([text])[0].tolist()) == text


def test_so_many_sentinels_as_asked_for() -> None:
    tokenizer = TrainedTokenizer(vocab_size=180, num_sentinels=7).load(lambda: {"": DOCUMENTS})
    assert tokenizer.vocab_size == 180
    assert tokenizer.sentinels.tolist() == list(range(179, 172, -1))


def test_the_rarest_characters_have_no_piece() -> None:
    documents = [Document("most", "ab " * 6000, "most", 0), Document("rare", "z" * 9 + "y", "rare", 1)]
    tokenizer = TrainedTokenizer(vocab_size=110).load(lambda: {"": documents})
    assert [tokenizer.unknown in tokenizer.encode_batch([text])[0] for text in "abzy"] == [False, False, False, True]


def test_a_temperature_gives_a_small_language_pieces() -> None:
    draw = random.Random(0)
    large = [
        Document(f"l{index}", " ".join(draw.choices(WORDS_OF_A_LANGUAGE["large"], k=50)), f"l{index}", index)
        for index in range(500)
    ]
    small = [
        Document(f"s{index}", " ".join(draw.choices(WORDS_OF_A_LANGUAGE["small"], k=50)), f"s{index}", index)
        for index in range(10)
    ]
    lengths = []
    for alpha in (1.0, 0.3):
        spec = TrainedTokenizer(vocab_size=260, alpha=alpha, max_characters=20_000)
        tokenizer = spec.load(lambda: {"large": large, "small": small})
        lengths.append(sum(map(len, tokenizer.encode_batch([document.text for document in small]))))
    assert lengths[1] < 0.9 * lengths[0]


def words_of(alphabet: str, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(alphabet, k=draw.randint(3, 8))) for _ in range(150)]


WORDS_OF_A_LANGUAGE = {"large": words_of("abcdefghij", 1), "small": words_of("klmnopqrst", 2)}


def test_a_vocabulary_without_room_for_pieces_is_refused() -> None:
    with pytest.raises(ValidationError, match=naming_words("vocab_size 359 359")):
        TrainedTokenizer(vocab_size=359, byte_fallback=True)
    with pytest.raises(DataError, match=r"data\.tokenizer\.vocab_size.*\b360\b.*\b256\b.*\b3\d\d\b"):
        TrainedTokenizer(vocab_size=360, byte_fallback=True).load(lambda: {"": DOCUMENTS})


def test_unknown_may_have_any_id() -> None:
    """umT5 has `<s>` before it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0), ("<extra_id_0>", -1.0), ("a", -1.0)]
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3)), "made")
    assert tokenizer.unknown == 3
    assert tokenizer.encode_batch(["ab</s>"])[0].tolist() == [5, 3, 3]


def test_training_is_deterministic() -> None:
    texts = list(islice(PythonStdlib().documents(), 79))  # the topics of its documentation, where it has them
    assert len({train(1000, order).sha256 for order in (texts, texts, texts[::-1])}) == 1


@pytest.mark.parametrize(
    "text", ["a", "aaaa", "1 2", "\u0301", "\u65e5\u672c\u8a9e\n" * 3, "\U0001f600", "\t", "x" * 100_000]
)
def test_odd_texts_train_too(text: str) -> None:
    tokenizer = train(200, [Document("odd", text, "odd", 0)])
    assert tokenizer.vocab_size == 200
    tokenizer.encode_batch([text, "", "\n", TEXT])


def test_training_faults() -> None:
    with pytest.raises(DataError, match=naming_words("data.corpora text held_out_fraction")):
        train(256, [])
    many = "".join(chr(index) for index in range(0x4E00, 0x4E00 + 300))
    with pytest.raises(DataError, match=naming_words("data.tokenizer.vocab_size 256 301 405")):
        train(256, [Document("many", many, "many", 0)])
    assert train(405, [Document("many", many, "many", 0)]).vocab_size == 405
    # Syllables that come again, so that there are longer pieces, as they are and as letters that NFKC puts together.
    draw = random.Random(0)
    again = "".join(chr(0xAC00 + draw.randrange(300)) for _ in range(9000))
    for text in (again, unicodedata.normalize("NFD", again)):
        with pytest.raises(DataError, match=naming_words("256 301 405")):
            train(256, [Document("many", text, "many", 0)])
        assert train(405, [Document("many", text, "many", 0)]).vocab_size == 405


def test_an_id_without_a_piece_has_an_empty_one() -> None:
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "None": 6}, unk_token="<unk>")
    )
    inner.add_special_tokens(["<extra_id_0>"])  # id 4
    assert Tokenizer(inner, "here").pieces(range(7)) == ["<pad>", "</s>", "<unk>", "", "<extra_id_0>", "", "None"]


def test_a_file_is_the_tokenizer_that_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    spec = TokenizerFile(path=str(path))
    loaded = spec.load()
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_saved_truncation_and_padding_are_ignored(tokenizer: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    assert Tokenizer.from_json(inner.to_str()).encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"model": 3}', '{"version": "1.0", "model": {"type": "Unigram", "vocab": 1}}']
)
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=naming_words("mine.json tokenizer.json tokenizers")):
        Tokenizer.from_json(text, "mine.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "<unk>"}},
            "tokenizer.json 4294967295 16777215 tokenizers",
        ),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "none"}}, "tokenizer.json text tokenizers"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}}, "tokenizer.json text tokenizers"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "tokenizer.json text tokenizers"),
    ],
)
def test_what_fails_at_a_text_is_told(tokenizer: Tokenizer, changes: dict[str, dict[str, Any]], words: str) -> None:
    found = json.loads(tokenizer.to_json())
    if "model" in changes:
        found |= {"added_tokens": [], "normalizer": None, "pre_tokenizer": None}
        changes["model"]["vocab"] |= {"<pad>": 0, "</s>": 1, "<unk>": 2, "<extra_id_0>": 3}
    for use in (lambda t: t.encode("a b\u0301"), lambda t: t.encode_batch(["a b\u0301"])):
        with pytest.raises(DataError, match=naming_words(words)):
            use(Tokenizer.from_json(json.dumps(found | changes)))


def test_other_layouts_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=naming_words("<extra_id_0> kind: train")):
        Tokenizer.from_json(tokenizer.to_json().replace("<extra_id_", "<other_"))
    with pytest.raises(DataError, match=naming_words("0 '<p>' '<pad>' kind: train")):
        Tokenizer.from_json(tokenizer.to_json().replace("<pad>", "<p>"))


def test_a_panic_of_the_library_is_told_and_nothing_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def fail(error: BaseException) -> type:
        def from_str(text: str) -> None:
            raise error

        return type("Fake", (), {"from_str": staticmethod(from_str)})

    monkeypatch.setattr(
        "switchcli.data.tokenizer.tokenizer.tokenizers.Tokenizer", fail(PanicException("index out of range"))
    )
    with pytest.raises(DataError, match="index out of range"):
        Tokenizer.from_json("{}")
    monkeypatch.setattr("switchcli.data.tokenizer.tokenizer.tokenizers.Tokenizer", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.from_json("{}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=naming_words("data.tokenizer.path none.json No such file spiece.model")):
        TokenizerFile(path=str(tmp_path / "none.json")).load()
    with pytest.raises(DataError, match=naming_words(f"data.tokenizer.path {tmp_path} folder spiece.model")):
        TokenizerFile(path=str(tmp_path)).load()
    for content, words in ((b'{"\xe9"}', "UTF-8"), (b"\xe9", "SentencePiece spiece.model kind: train")):
        (tmp_path / "latin.json").write_bytes(content)
        with pytest.raises(DataError, match=naming_words(f"latin.json tokenizer.json {words}")):
            TokenizerFile(path=str(tmp_path / "latin.json")).load()


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    asked = []

    def download(repo: str, name: str, *, revision: str) -> str:
        asked.append((repo, name, revision))
        if repo == "no/where":
            raise ConnectionError("no network for secret-of-the-user\nand more")
        if repo == "google/mt5" and name == "tokenizer.json":
            raise EntryNotFoundError("404")
        return str(path)

    monkeypatch.setenv("HF_TOKEN", "secret-of-the-user")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert HubTokenizer(path="google-t5/t5-base").load().sha256 == tokenizer.sha256
    assert asked == [("google-t5/t5-base", "tokenizer.json", "main")]
    assert HubTokenizer(path="google/mt5", revision="v1").load().sha256 == tokenizer.sha256
    assert asked[1:] == [("google/mt5", "tokenizer.json", "v1"), ("google/mt5", "spiece.model", "v1")]
    with pytest.raises(
        DataError, match=naming_words("no/where tokenizer.json spiece.model [token] path revision kind: file")
    ):
        HubTokenizer(path="no/where").load()
