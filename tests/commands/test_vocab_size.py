"""`model.vocab_size: auto`: the rows of the embedding follow from the tokenizer, and a checkpoint keeps its own."""

import json
from pathlib import Path

import pytest
import yaml
from messages import lacking
from tiny_run import SwitchCLI

from switchcli.recipe.schema import resolve_standalone
from switchcli.spec import VOCAB_SIZE


@pytest.fixture
def auto(recipe: str) -> str:
    """The recipe without a size of its vocabulary, and with a tokenizer of 500 pieces."""
    text = Path(recipe).read_text().replace("vocab_size: 512, num_experts", "num_experts")
    Path("auto.yaml").write_text(text.replace("vocab_size: 512", "vocab_size: 500"))
    return "auto.yaml"


def rows(run: str) -> int:
    saved = yaml.safe_load(Path(run, "recipe.yaml").read_text())["model"]["vocab_size"]
    assert isinstance(saved, int)
    return saved


def test_it_is_a_multiple_of_64(auto: str, switchcli: SwitchCLI) -> None:
    assert switchcli("pretrain", auto, "train.steps=1", "--out", "run", "-q").code == 0
    assert rows("run") == 512
    assert switchcli("pretrain", auto, "model.vocab_size=auto", "train.steps=2", "--out", "run", "-q").code == 0


def test_a_tokenizer_in_a_file_is_read(auto: str, trained: Path, switchcli: SwitchCLI) -> None:
    """It has 512 pieces; a dry run reads it too, and planning and validation assume T5's."""
    tokenizer = f"data.tokenizer={{kind: file, path: {trained / 'tokenizer.json'}}}"
    for path, code, number in ((trained / "tokenizer.json", 0, 512), ("none.json", 3, None)):
        tokenizer = f"data.tokenizer={{kind: file, path: {path}}}"
        done = switchcli("pretrain", auto, tokenizer, "--dry-run", "--json")
        assert done.code == code, done.err
        assert json.loads(done.out).get("recipe", {"model": {}})["model"].get("vocab_size") == number
        resolved = resolve_standalone(auto, [tokenizer])
        assert resolved.model.vocab_size == VOCAB_SIZE  # type: ignore[attr-defined]
    assert not lacking(done.err, "data.tokenizer none.json")


def test_a_run_that_has_begun_keeps_its_number(auto: str, switchcli: SwitchCLI) -> None:
    """A run of a version whose default was 32,128 resumes with that number."""
    assert switchcli("pretrain", auto, "model.vocab_size=1000", "train.steps=1", "--out", "run", "-q").code == 0
    assert switchcli("pretrain", auto, "train.steps=2", "--out", "run", "-q").code == 0
    assert rows("run") == 1000
    refused = switchcli("pretrain", auto, "model.vocab_size=1024", "--out", "run")
    assert refused.code == 2
    assert not lacking(refused.err, "model.vocab_size 1000 1024")


def test_a_run_whose_tokenizer_is_to_be_another_one_is_not_resumed(
    auto: str, trained: Path, switchcli: SwitchCLI
) -> None:
    assert switchcli("pretrain", auto, "train.steps=1", "--out", "run", "-q").code == 0
    for pieces in (400, 511, 512, 513):
        refused = switchcli("pretrain", auto, f"data.tokenizer.vocab_size={pieces}", "--out", "run")
        assert refused.code == 2
        assert not lacking(refused.err, f"run data.tokenizer.vocab_size 500 {pieces} --out --no-resume")
    refused = switchcli(
        "pretrain", auto, f"data.tokenizer={{kind: file, path: {trained / 'tokenizer.json'}}}", "--out", "run"
    )
    assert refused.code == 2
    assert not lacking(refused.err, "run data.tokenizer.kind train file --out --no-resume")


def test_weights_hold_no_larger_tokenizer(auto: str, switchcli: SwitchCLI) -> None:
    assert switchcli("pretrain", auto, "train.steps=1", "--out", "old", "-q").code == 0
    for option in ("--model", "--branch-from"):
        refused = switchcli("pretrain", auto, "data.tokenizer.vocab_size=513", "train.steps=3", option, "old")
        assert refused.code == 2
        assert not lacking(refused.err, "data.tokenizer.vocab_size 513 500")


@pytest.mark.integration
def test_a_checkpoint_keeps_its_number(auto: str, switchcli: SwitchCLI) -> None:
    assert switchcli("pretrain", auto, "model.vocab_size=1000", "train.steps=1", "--out", "old", "-q").code == 0
    stated = "model.vocab_size=auto"
    for name, keys in (("start", ("--model", "old")), ("branch", ("--branch-from", "old", stated))):
        done = switchcli("pretrain", auto, "train.steps=2", *keys, "--out", name, "-q")
        assert done.code == 0, done.err
        assert rows(name) == 1000
    done = switchcli("distill", stated, "--teacher", "old", "train.steps=1", "--out", "student", "-q")
    assert done.code == 0, done.err
    assert rows("student") == 1000
