"""Options and keys of other tools, and misspelt ones: the answer is what to type instead."""

import re
from pathlib import Path

import pytest
from test_help import COMMANDS
from tiny_run import SwitchCLI

from switchcli.commands._parsing import accepted_names
from switchcli.recipe.foreign_words import WORDS

CASES = {
    "pretrain a --steps 10": "train.steps=VALUE",
    "pretrain a --lr 1e-4": "schedule.learning_rate=VALUE",
    "distill a --num-train-epochs 3": "train.steps=VALUE",
    "pretrain a --per_device_train_batch_size 8": "train.microbatch_tokens=VALUE",
    "pretrain a --bf16": "train.precision=selective",
    "pretrain a --precision bf16-mixed": "train.precision=VALUE",
    "eval a --precision float32": "precision=VALUE",
    "pretrain a --nproc-per-node 4": "--processes",
    "pretrain a --model-name-or-path b": "--model",
    "distill a --model-name-or-path b": "--teacher",
    "finetune a --datasets rte": "tasks=VALUE",
    "pretrain a --train.steps 3": "train.steps=VALUE",
    "pretrain a --outt b": "--out",
}


@pytest.mark.parametrize("line", CASES)
def test_the_answer_to_a_flag_of_another_tool(line: str, switchcli: SwitchCLI) -> None:
    done = switchcli(*line.split())
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert f": use {CASES[line]}" in done.err, done.err


@pytest.mark.parametrize(
    "flag",
    [
        *("eval-accumulation-steps", "eval-iters", "data-seed", "hub-model-id", "model-revision", "generation-config"),
        *("bf16-full-eval", "auto-find-batch-size", "min-lr", "sp-size"),
    ],
)
def test_a_flag_that_only_contains_a_known_word_has_no_answer(flag: str, switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", "a", f"--{flag}", "4")
    assert done.code == 2
    assert ": use " not in done.err, done.err


KEYS = {
    "sequence_len=512": "data.objective.inputs_length",
    "num_epochs=3": "train.steps",
    "train.micro_batch_size=8": "train.microbatch_tokens",
    "base_model=a": "start.checkpoint",
    "lr_scheduler=cosine": "schedule.kind",
    "bf16=true": "train.precision=selective",
    "train.precision=bf16": "selective",
    "optimizer.lr=1e-3": "schedule.learning_rate",
    "train.load_best_model_at_end=true": "checkpoint.keep_best",
}
"""Keys and values of other tools, as an override."""


@pytest.mark.parametrize("override", [*KEYS, "in a file"])
def test_the_answer_to_a_key_of_another_tool(override: str, switchcli: SwitchCLI, tmp_path: Path) -> None:
    text, keys = "extends: quickstart/switch\n", [override]
    if override == "in a file":
        override = "optimizer.lr=1e-3"
        text, keys = f"{text}optimizer:\n  lr: 1e-3\n", []
    (tmp_path / "mine.yaml").write_text(text)
    done = switchcli("recipes", "validate", tmp_path / "mine.yaml", *keys)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", done.err)
    assert re.search(rf"Did you mean {re.escape(KEYS[override])}\?", done.err), done.err


def test_json_has_the_answer_too(switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", "a", "--steps", "10", "--json")
    assert done.code == 2
    assert "train.steps=VALUE" in done.out


def test_every_key_and_option_of_the_table_is_one_of_some_verb() -> None:
    names = [accepted_names(command.make_context("", [], resilient_parsing=True)) for command in COMMANDS.values()]
    assert {ours.partition("=")[0] for ours in WORDS} <= set().union(*names)


def test_a_key_that_only_one_verb_has_is_no_answer_for_another(switchcli: SwitchCLI) -> None:
    assert "update" in switchcli("recipes", "validate", "quickstart/finetune", "adapter=lora").err
    assert "update" not in switchcli("recipes", "validate", "quickstart/switch", "adapter=lora").err
