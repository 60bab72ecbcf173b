"""The vocabulary in T5's layout: trained, saved, loaded, refused."""

from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from switchcli.data.document import Document
from switchcli.data.python_stdlib import PythonStdlib
from switchcli.data.tokenizer import HubTokenizer, Tokenizer, TokenizerFile, TrainedTokenizer
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


def test_training_is_deterministic() -> None:
    topics = list(takewhile(lambda document: document.name.startswith("topic "), PythonStdlib().documents()))
    if not topics:
        pytest.skip("this Python has no documentation topics")
    assert len({train(2000, order).sha256 for order in (topics, topics, topics[::-1])}) == 1


@pytest.mark.parametrize(
    "text", ["a", "aaaa", "1 2", "\u0301", "\u65e5\u672c\u8a9e\n" * 3, "\U0001f600", "\t", "x" * 100_000]
)
def test_odd_texts_train_too(text: str) -> None:
    tokenizer = train(200, [Document("odd", text, "odd", 0)])
    assert tokenizer.vocab_size == 200
    tokenizer.encode_batch([text, "", "\n", TEXT])


def test_training_faults() -> None:
    with pytest.raises(DataError, match="no text to train a vocabulary on"):
        train(256, [])
    many = "".join(chr(index) for index in range(0x4E00, 0x4E00 + 300))
    with pytest.raises(DataError, match=r"vocab_size \(256\).*301 characters: take 404 or more"):
        train(256, [Document("many", many, "many", 0)])
    assert train(404, [Document("many", many, "many", 0)]).vocab_size == 404


def test_a_file_is_the_tokenizer_that_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    spec = TokenizerFile(path=str(path))
    loaded = spec.load(dict)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    before = spec.fingerprint()
    path.write_text(train(180).to_json())
    assert spec.fingerprint() != before


def test_saved_truncation_and_padding_are_ignored(tokenizer: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    assert Tokenizer.from_json(inner.to_str()).encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"model": 3}', '{"version": "1.0", "model": {"type": "Unigram", "vocab": 1}}']
)
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"mine.json: not a tokenizer.json"):
        Tokenizer.from_json(text, "mine.json")


def test_other_layouts_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no <extra_id_0> in the vocabulary.*kind: train"):
        Tokenizer.from_json(tokenizer.to_json().replace("<extra_id_", "<other_"))
    with pytest.raises(DataError, match="id 0 is '<p>', T5's layout needs '<pad>'"):
        Tokenizer.from_json(tokenizer.to_json().replace("<pad>", "<p>"))


def test_a_panic_of_the_library_is_told_and_nothing_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def fail(error: BaseException) -> type:
        def from_str(text: str) -> None:
            raise error

        return type("Fake", (), {"from_str": staticmethod(from_str)})

    monkeypatch.setattr("switchcli.data.tokenizer.tokenizers.Tokenizer", fail(PanicException("index out of range")))
    with pytest.raises(DataError, match="index out of range"):
        Tokenizer.from_json("{}")
    monkeypatch.setattr("switchcli.data.tokenizer.tokenizers.Tokenizer", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.from_json("{}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.tokenizer.path: .*none.json: cannot be read \(No such file"):
        TokenizerFile(path=str(tmp_path / "none.json")).fingerprint()
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        TokenizerFile(path=str(tmp_path)).load(dict)
    for content, said in ((b'{"\xe9"}', "not UTF-8"), (b"\xe9", "neither a tokenizer.json nor a SentencePiece model")):
        (tmp_path / "latin.json").write_bytes(content)
        with pytest.raises(DataError, match=rf"latin.json: {said}"):
            TokenizerFile(path=str(tmp_path / "latin.json")).load(dict)


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    asked = []

    def download(repo: str, name: str, *, revision: str) -> str:
        asked.append((repo, name, revision))
        if repo == "no/where":
            raise ConnectionError("no network\nand more")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert HubTokenizer(path="google-t5/t5-base").load(dict).sha256 == tokenizer.sha256
    assert asked == [("google-t5/t5-base", "tokenizer.json", "main")]
    with pytest.raises(DataError, match=r"no/where: no tokenizer.json or spiece.model .* \(no network\)"):
        HubTokenizer(path="no/where").load(dict)
