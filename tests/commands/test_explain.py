"""`switchcli recipes explain`: what it prints, what it refuses, and that it is fast."""

import json
from pathlib import Path

import pytest
from terminal import switchcli_in_terminal
from typer.testing import CliRunner

from switchcli.commands.recipes import app
from switchcli.errors import RecipeError
from switchcli.recipe import key_index


def explain(*arguments: str) -> str:
    return CliRunner().invoke(app, ["explain", *arguments], catch_exceptions=False).stdout


def test_one_key() -> None:
    text = explain("train.precision")
    for word in ("pretrain, finetune, distill", "selective", "float32", "train.precision=selective"):
        assert word in text


def test_a_key_of_several_kinds_has_a_meaning_for_each() -> None:
    rows = json.loads(explain("optimizer.epsilon", "--json"))["meanings"]
    assert [(row["when"], row["default"]) for row in rows] == [
        (["optimizer.kind=adafactor"], "1e-30"),
        (["optimizer.kind=adamw"], "1e-8"),
        (["optimizer.kind=muon"], "1e-8"),
    ]
    assert rows[1]["example"] == "optimizer.kind=adamw optimizer.epsilon=1e-8"


def test_meanings_that_differ_by_verb_alone_are_one_block() -> None:
    lines = explain("tasks").splitlines()
    assert lines.count("tasks") == 1
    assert sum("[]" in line.split() for line in lines if "eval:" in line) == 1


def test_the_default_of_a_mapping_does_not_contradict_its_keys() -> None:
    (model,), (vocab_size,) = (json.loads(explain(key, "--json"))["meanings"] for key in ("model", "model.vocab_size"))
    assert (model["default"], vocab_size["default"]) == ("{}", "auto")


def test_a_prefix_lists_the_keys_below() -> None:
    text = explain("model.router")
    for key in ("model.router.kind", "model.router.capacity_factor", "model.router.jitter"):
        assert f"\n{key} " in text
    below = json.loads(explain("model.router", "--json"))["below"]
    assert {row["key"] for row in below} == {info.key for info in key_index.below("model.router")}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.step", "train.steps"),
        ("capasity_factor", "capacity_factor"),
        ("optimizer.lr", "schedule.learning_rate"),
    ],
)
def test_a_misspelled_key_is_refused_with_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{key}: .*\b{nearest}\b"):
        explain(key)


@pytest.mark.integration
@pytest.mark.parametrize("arguments", [("explain", "model"), ("explain", "data"), ("list",)])
def test_a_terminal_of_80_columns_breaks_no_word_and_cuts_no_meaning(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    shown = switchcli_in_terminal(["recipes", *arguments], 80, tmp_path)
    assert not shown.faults
    assert max(map(len, shown.text.splitlines())) <= 80
    told = " ".join(shown.text.split())
    for info in key_index.below(arguments[1]) if arguments[0] == "explain" else ():
        assert info.key.endswith(".kind") or " ".join(info.description.split()) in told, info.key
