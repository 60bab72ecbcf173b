"""Options and verbs of other tools: the answer is what to type instead."""

import json
import re
from pathlib import Path

import pytest
from test_help import COMMANDS
from tiny_run import SwitchCLI

from switchcli.commands._flag_hints import VERBS, accepted_names
from switchcli.recipe.foreign_words import WORDS, hint

NAMES = {
    f"switchcli {words}": accepted_names(command.make_context(f"switchcli {words}", [], resilient_parsing=True))
    for words, command in COMMANDS.items()
}
CASES = {
    "pretrain a --steps 10": "train.steps=10",
    "pretrain a --step 10": "train.steps=10",
    "pretrain a --learning-rat 0.1": "schedule.learning_rate=0.1",
    "pretrain a --lr 1e-4": "schedule.learning_rate=1e-4",
    "pretrain a --learning_rate": "schedule.learning_rate=VALUE",
    "distill a --num-train-epochs 3": "train.steps=N",
    "pretrain a --batch-size 8": "train.batch_tokens=N",
    "pretrain a --per-device-train-batch-size 8": "train.microbatch_tokens=N",
    "pretrain a --gradient-accumulation-steps 4": "train.microbatch_tokens=N",
    "pretrain a --seed 1": "train.seed=1",
    "pretrain a --bf16": "train.precision=selective",
    "pretrain a --precision bf16-mixed": "train.precision=selective",
    "eval a --precision float32": "precision=float32",
    "pretrain --config a.yaml": "switchcli pretrain a.yaml",
    "eval a --config b.yaml": "switchcli eval CHECKPOINT b.yaml",
    "pretrain a --gpus 4": "--processes 4",
    "plan a --gpus 4": "--devices 4",
    "pretrain a --resume-from-checkpoint b": "--resume",
    "pretrain a --model-name-or-path b": "--model b",
    "distill a --model-name-or-path b": "--teacher b",
    "generate --model a": "switchcli generate a",
    "finetune a --dataset rte": "tasks=[rte]",
    "pretrain a --capacity-factor 2": "model.router.capacity_factor=2",
    "pretrain a --train.steps 3": "train.steps=3",
    "pretrain a --nnodes 2": "torchrun --nnodes 2 ... -m switchcli pretrain ...",
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
    "bf16=true": "train.precision=selective",
    "train.precision=bf16": "selective",
    "train.precision=fp32": "float32",
    "lr=1e-3": "schedule.learning_rate=0.001",
    "optimizer.lr=1e-3": "schedule.learning_rate=0.001",
    "batch_size=8": "train.batch_tokens=N",
    "train.per_device_train_batch_size=8": "train.microbatch_tokens=N",
    "epochs=3": "train.steps=N",
    "max_steps=10": "train.steps=10",
    "train.gradient_accumulation_steps=4": "train.microbatch_tokens=N",
    "gradient_checkpointing=true": "train.activation_checkpointing=blocks",
    "fsdp=true": "parallel.shard=zero3",
    "lr_scheduler_type=cosine": "schedule.kind=KIND",
    "optim=adamw_torch": "optimizer.kind=KIND",
    "max_grad_norm=1.0": "train.clip_norm=1.0",
    "warmup_ratio=0.1": "schedule.warmup_steps=N",
    "save_total_limit=2": "checkpoint.keep_last=2",
    "train.load_best_model_at_end=true": "checkpoint.keep_best=true",
    "early_stopping_patience=3": "switchcli.train(..., on_record=...) in Python",
    "report_to=wandb": "log.trackers=[wandb",
    "dataloader_num_workers=4": "train.workers=4",
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
    assert re.search(rf"(use|Did you mean) {re.escape(KEYS[override])}\b", done.err), done.err


@pytest.mark.parametrize("value", ["https://user:secret-word@host/x", "$(reboot)", "\x1b[31m"])
def test_a_value_that_cannot_be_repeated_is_left_out(value: str, switchcli: SwitchCLI) -> None:
    done = switchcli("finetune", "a", "--dataset", value)
    assert done.code == 2
    assert "use tasks=[VALUE]" in done.err
    assert value not in done.err
    assert done.err.count("\n") == 1


def test_json_has_the_answer_too(switchcli: SwitchCLI) -> None:
    done = switchcli("pretrain", "a", "--steps", "10", "--json")
    assert done.code == 2
    assert "train.steps=10" in done.out


@pytest.mark.parametrize("words", ["pretrain --outt a --json", "train a --json"])
def test_json_has_an_error_of_usage(words: str, switchcli: SwitchCLI) -> None:
    done = switchcli(*words.split())
    assert done.code == 2
    found = json.loads(done.out)
    assert found["exit_code"] == 2
    assert found["error"]
    assert "Usage" in done.err


def test_a_misspelled_option_of_the_verb_is_not_taken_for_a_key(switchcli: SwitchCLI) -> None:
    assert "--out" in switchcli("pretrain", "a", "--outt", "b").err


@pytest.mark.parametrize("verb", NAMES)
def test_every_answer_names_keys_and_options_that_the_verb_has(verb: str) -> None:
    for flag in WORDS:
        answer = hint(f"--{flag}", "1", NAMES[verb], verb)
        for key in re.findall(r"[a-z]\w*(?:\.\w+)+(?=[= ,]|$)", answer or ""):
            assert key in NAMES[verb], f"{verb} --{flag}: {key}"
        for option in re.findall(r"(?<![\w-])--[a-z-]+", (answer or "").partition("torchrun ")[0]):
            assert option in NAMES[verb], f"{verb} --{flag}: {option}"


def test_every_suggestion_is_for_some_verb() -> None:
    known = set().union(*NAMES.values())
    for flag, suggestions in WORDS.items():
        for suggestion in suggestions:
            assert suggestion.needs in known, f"{flag}: {suggestion}"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_of_another_tool(verb: str, switchcli: SwitchCLI) -> None:
    done = switchcli(verb, "a")
    assert done.code == 2
    assert f"Use {VERBS[verb]}" in done.err
    assert {*re.split(" or ", re.sub(r" \([^)]*\)", "", VERBS[verb]))} <= COMMANDS.keys()


def test_a_verb_of_another_tool_is_no_answer_below_a_group(switchcli: SwitchCLI) -> None:
    assert "Use" not in switchcli("recipes", "train").err.replace("Usage", "")
