"""`--dry-run` opens what a recipe names, so that what it accepts runs. `recipes validate` opens nothing."""

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
    assert switchcli("recipes", "validate", "train.steps=20").code == 2
