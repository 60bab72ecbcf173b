"""`switchcli data tokenizer`: train, show; for people, for scripts, and what they refuse."""

import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.data.sources.document import is_held_out
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.tokenizer.tokenizer import Tokenizer

TRAIN = ("data", "tokenizer", "train")
SHOW = ("data", "tokenizer", "show")


def facts(switchcli: SwitchCLI, *arguments: object) -> dict[str, Any]:
    done = switchcli(*arguments, "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.fixture
def file(recipe: str, switchcli: SwitchCLI) -> str:
    """What is trained by the recipe of the current folder, with bytes."""
    options = ("data.tokenizer.byte_fallback=true", "--out", "out/mine.json", "--quiet")
    assert switchcli(*TRAIN, recipe, *options).code == 0
    return "out/mine.json"


def test_training_writes_a_file_that_a_recipe_can_use(recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli(*TRAIN, recipe, "data.tokenizer.vocab_size=300", "--out", "mine.json")
    assert (done.code, done.err) == (0, "")
    for words in ("vocab size", "300", "197"):
        assert words in done.out
    assert [path.name for path in Path().iterdir() if "mine" in path.name] == ["mine.json"]
    tokenizer = Tokenizer.read(Path("mine.json"))
    assert tokenizer.vocab_size == 300
    dry = switchcli("pretrain", recipe, "data.tokenizer={kind: file, path: mine.json}", "--dry-run", "--json")
    assert json.loads(dry.out)["recipe"]["data"]["tokenizer"] == {"kind": "file", "path": "mine.json"}


def test_what_is_printed_to_use_the_file_can_be_pasted_as_it_stands(recipe: str, switchcli: SwitchCLI) -> None:
    name = "it's: 1.json"
    done = switchcli(*TRAIN, recipe, "data.tokenizer.vocab_size=300", "--out", name)
    (override,) = shlex.split(done.out.split("to use it:\n")[1])
    dry = switchcli("pretrain", recipe, override, "--dry-run", "--json")
    assert json.loads(dry.out)["recipe"]["data"]["tokenizer"] == {"kind": "file", "path": name}


def test_training_sees_no_held_out_document(recipe: str, switchcli: SwitchCLI) -> None:
    lines = [*FilesCorpus(paths=("text.txt",), sample_by="line").documents()]
    # Neither letter is in the words of the text; a document's mark is part of what decides.
    texts = [document.text for document in lines]
    marked = [f"{text} q" for text in texts if is_held_out(f"{text} q", 0.1)]
    marked += [f"{text} x" for text in texts if not is_held_out(f"{text} x", 0.1)]
    assert len(marked) > len(texts) / 2
    Path("text.txt").unlink()
    Path("text.txt").write_text("\n".join(marked) + "\n")
    assert switchcli(*TRAIN, recipe, "--out", "mine.json").code == 0
    tokenizer = Tokenizer.read(Path("mine.json"))
    assert tokenizer.unknown in tokenizer.encode("q")
    assert tokenizer.unknown not in tokenizer.encode("x")


def test_a_file_that_is_there_stays_unless_forced(recipe: str, switchcli: SwitchCLI) -> None:
    Path("mine.json").write_text("mine")
    done = switchcli(*TRAIN, recipe, "--out", "mine.json")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert not lacking(done.err, "--out mine.json already --force")
    assert Path("mine.json").read_text() == "mine"
    found = facts(switchcli, *TRAIN, recipe, "--out", "mine.json", "--force")
    assert found["sha256"] == Tokenizer.read(Path("mine.json")).sha256
    Path("folder").mkdir()
    refused = switchcli(*TRAIN, recipe, "--out", "folder", "--force")
    assert not lacking(refused.err, "error: --out folder folder/tokenizer.json")


@pytest.mark.parametrize(
    ("key", "code", "words"),
    [
        ("data.tokenizer={kind: file, path: a.json}", 2, "tiny.yaml data.tokenizer.kind file train"),
        ("data.tokenizer.vocab_size=103", 2, "data.tokenizer.vocab_size 103 special sentinels bytes"),
        ("data.tokenizer.vocab_size=105", 3, "data.tokenizer.vocab_size 105 3 special 100 sentinels 124"),
    ],
)
def test_what_training_refuses(recipe: str, switchcli: SwitchCLI, key: str, code: int, words: str) -> None:
    done = switchcli(*TRAIN, recipe, key, "--out", "mine.json")
    assert (done.code, done.out) == (code, "")
    assert not lacking(done.err, words)
    assert done.err.count("\n") == 1
    assert not Path("mine.json").exists()


def test_show_says_what_there_is_and_how_a_text_is_cut(file: str, switchcli: SwitchCLI) -> None:
    found = facts(switchcli, *SHOW, file, "the \u72ac", "red <extra_id_0>")
    tokenizer = Tokenizer.read(Path(file))
    assert (found["vocab_size"], found["pieces"], found["sentinels"]) == (512, 512 - 256 - 100 - 3, 100)
    assert (found["byte_fallback"], found["sha256"]) == (True, tokenizer.sha256)
    first, second = found["texts"]
    assert first["pieces"][-3:] == ["<0xE7>", "<0x8A>", "<0xAC>"]
    assert first["ids"] == tokenizer.encode("the \u72ac")
    assert second["pieces"][-1] == "<extra_id_0>"
    done = switchcli(*SHOW, file, "the\n\x1b[31mred")
    assert done.code == 0
    assert "\x1b" not in done.out
    for words in ("vocab size", "512", "byte fallback", "yes", "pieces  ", "ids  "):
        assert words in done.out


def test_show_opens_a_run_and_its_checkpoint(trained: Path, switchcli: SwitchCLI) -> None:
    checkpoint = next((trained / "checkpoints").glob("step-*"))
    run, one = (facts(switchcli, *SHOW, folder) for folder in (trained, checkpoint))
    assert run["sha256"] == one["sha256"] == Tokenizer.read(trained / "tokenizer.json").sha256


def test_show_refuses_what_is_none(tmp_path: Path, switchcli: SwitchCLI) -> None:
    for name, words in (("none.json", "none.json No such file"), (".", "tokenizer.json spiece.model")):
        done = switchcli(*SHOW, tmp_path / name)
        assert (done.code, done.out) == (3, "")
        assert not lacking(done.err, f"{tmp_path / name} {words}")


@pytest.mark.integration
def test_a_run_with_a_spiece_model_goes_on_and_answers_without_transformers(
    recipe: str, switchcli: SwitchCLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = io.BytesIO()
    layout = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 60, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path("text.txt").read_text().splitlines()), model_writer=model, minloglevel=2, **layout
    )
    Path("spiece.model").write_bytes(model.getvalue())
    pretrain = ("pretrain", recipe, "data.tokenizer={kind: file, path: spiece.model}", "--quiet")
    assert switchcli(*pretrain, "--out", "run").code == 0
    monkeypatch.setitem(sys.modules, "transformers.convert_slow_tokenizer", None)
    assert switchcli(*pretrain, "train.steps=3", "--out", "run").code == 0
    assert json.loads(Path("run/result.json").read_text())["step"] == 3
    assert switchcli("eval", "run", "device=cpu", "--out", "scores", "--json").code == 0
    assert switchcli("generate", "run", "the red <extra_id_0>", "--max-tokens", "3", "--device", "cpu").code == 0
    for refused in (
        (*SHOW, "spiece.model"),
        (*pretrain, "--out", "other"),
    ):
        done = switchcli(*refused)
        assert done.code == 2
        assert not lacking(done.err, "spiece.model pip install transformers protobuf")
