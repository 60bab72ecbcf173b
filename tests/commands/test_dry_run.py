"""`--dry-run` opens what a recipe names, so that what it accepts runs. `recipes validate` opens nothing."""

import gzip
import json
from pathlib import Path

import pytest
from messages import lacking
from tiny_run import SwitchCLI

REFUSED = [
    ("data.tokenizer={kind: file, path: none.json}", 3, "data.tokenizer none.json"),
    ("data.corpora=[{kind: files, paths: [none/*.txt]}]", 3, "data.corpora none/*.txt"),
    ("data.corpora=[{kind: files, paths: [rows.jsonl], field: body}]", 3, "rows.jsonl body"),
    ("data.tokenizer={kind: file, path: broken.json}", 3, "broken.json"),
]


@pytest.mark.parametrize(("override", "code", "words"), REFUSED)
def test_validation_opens_nothing_and_a_dry_run_what_the_recipe_names(
    override: str, code: int, words: str, recipe: str, switchcli: SwitchCLI
) -> None:
    Path("broken.json").write_text("{}")
    Path("rows.jsonl").write_text('{"text": "a b c"}\n')
    before = sorted(path.name for path in Path().iterdir())
    assert switchcli("recipes", "validate", recipe, override).code == 0
    done = switchcli("pretrain", recipe, override, "--dry-run", "--json")
    assert done.code == code, done.err
    assert not lacking(done.err, words), done.err
    assert json.loads(done.out)["exit_code"] == code
    assert sorted(path.name for path in Path().iterdir()) == before


def test_the_files_of_tasks_are_opened(tuning: str, trained: Path, switchcli: SwitchCLI) -> None:
    command = ("finetune", tuning, "--model", trained, "--dry-run")
    assert switchcli(*command).code == 0
    Path("last.validation.jsonl").write_text('{"text": "a"}\n')
    done = switchcli(*command)
    assert done.code == 3
    assert not lacking(done.err, "last.validation.jsonl:1 word")
    Path("last.validation.jsonl").write_text("")
    assert switchcli(*command).code == 3


def test_validation_sets_keys_in_each_file(recipe: str, switchcli: SwitchCLI) -> None:
    done = switchcli("recipes", "validate", recipe, "quickstart/switch", "train.steps=20", "--json")
    assert done.code == 0, done.err
    assert [row["file"] for row in json.loads(done.out)["files"]] == [recipe, "quickstart/switch"]
    wrong = switchcli("recipes", "validate", recipe, "train.batch_tokens=100")
    assert wrong.code == 2
    assert not lacking(wrong.err, "train.batch_tokens 100 32")
    grouped = switchcli("recipes", "validate", "quickstart/switch", "train.batch_tokens=1000")
    assert not lacking(grouped.err, "train.batch_tokens 1000 2048"), "whole routing groups"
    assert switchcli("recipes", "validate", "train.steps=20").code == 2


def test_epochs_are_told_and_a_step_of_more_than_one_warns(recipe: str, switchcli: SwitchCLI) -> None:
    Path("own.txt").write_text("A line of text.\n" * 512)  # 8,192 bytes
    own = ("data.corpora=[{kind: files, paths: [own.txt], sample_by: line}]", "train.steps=3", "--dry-run", "--json")
    just = switchcli("pretrain", recipe, *own, "train.batch_tokens=2048")
    assert json.loads(just.out)["epochs"] == 3.0
    assert "warning" not in just.err
    more = switchcli("pretrain", recipe, *own, "train.batch_tokens=2176")
    assert not lacking(more.err, "warning: train.batch_tokens 2,176 1.06")
    Path("empty.txt").touch()
    two = switchcli(
        "pretrain", recipe, own[0].replace("own.txt", "own.txt, empty.txt"), *own[1:], "train.batch_tokens=2048"
    )
    assert json.loads(two.out)["epochs"] == 3.0
    Path("own.txt.gz").write_bytes(gzip.compress(Path("own.txt").read_bytes()))
    packed = switchcli("pretrain", recipe, own[0].replace("own.txt", "own.txt.gz"), *own[1:], "train.batch_tokens=2176")
    assert (packed.code, json.loads(packed.out)["epochs"]) == (0, None)
    assert "warning" not in packed.err


@pytest.mark.parametrize("option", ["--dry-run", "--no-resume", "--resume"])
def test_a_run_is_not_written_into_a_folder_that_holds_other_files(
    option: str, recipe: str, switchcli: SwitchCLI
) -> None:
    Path("own/logs").mkdir(parents=True)
    Path("own/slurm-7.out").touch()
    Path("own/.hidden").touch()
    before = sorted(Path().rglob("*"))
    done = switchcli("pretrain", recipe, "--out", "own", option)
    assert (done.code, sorted(Path().rglob("*"))) == (2, before)
    assert not lacking(done.err, "error: --out own: holds logs")
    Path("own/logs").rmdir()
    assert switchcli("pretrain", recipe, "--out", "own", option, "train.steps=1", "-q").code == 0


def test_each_language_of_a_corpus_is_opened(recipe: str, switchcli: SwitchCLI) -> None:
    Path("de.txt").write_text("Eine Zeile.\n" * 99)
    corpus = "data.corpora=[{kind: files, paths: ['{language}.txt'], languages: [de, fr]}]"
    missing = switchcli("pretrain", recipe, corpus, "--dry-run")
    assert (missing.code, lacking(missing.err, "fr.txt")) == (3, []), missing.err
    Path("fr.txt").write_text("Une ligne.\n" * 99)
    assert switchcli("pretrain", recipe, corpus, "data.mixture.kind=weighted", "--dry-run").code == 0
