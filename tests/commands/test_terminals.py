"""What every verb prints in a terminal of 80 columns: no traceback, nothing cut, and the loss."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from terminal import Shown, in_terminal
from test_help import COMMANDS
from tiny_run import lay_out, lay_out_tuning

TASKS = (
    "[{{kind: files, name: colour, validation: [colour.validation.jsonl], input: '{{text}}', target: label, "
    "labels: [red, green, blue], metrics: [accuracy, macro_f1]}}]"
)
WORK = {
    "pretrain": ["tiny.yaml", "--out", "made"],
    "finetune": ["tune.yaml", "--model", "{trained}", "--out", "made"],
    "distill": ["train.steps=2", "--teacher", "{trained}", "--baseline", "{dense}", "--out", "made"],
    "eval": ["{trained}", f"tasks={TASKS}", "scoring.draws=9", "scoring.decoding.max_tokens=4", "--out", "made"],
    "generate": ["{trained}", "red", "--max-tokens", "2"],
    "doctor": ["{trained}"],
    "plan": ["tiny.yaml"],
    "recipes list": [],
    "recipes show": ["quickstart/switch"],
    "recipes copy": ["quickstart/switch", "made.yaml"],
    "recipes validate": ["tiny.yaml"],
    "recipes schema": ["pretrain"],
    "recipes explain": ["schedule"],
    "data prepare": ["tiny.yaml", "--processes", "1"],
    "data tokenizer train": ["tiny.yaml", "--out", "made.json"],
    "data tokenizer show": ["{trained}", "red green"],
    "data tokenizer compare": ["{trained}", "{dense}", "--text", "text.txt"],
    "convert": ["{trained}", "made", "--to", "huggingface"],
    "upcycle": ["{dense}", "made", "--experts", "2"],
    "prune": ["{trained}", "made", "--experts", "2", "text.sequences=4"],
    "report": ["{dense}", "{trained}"],
    "report --routing": ["{trained}", "text.sequences=4"],
    "sweep": ["--jobs", "1", "--out", "made", "pretrain", "tiny.yaml", "train.seed=0,1", "--", "--quiet"],
    "launch": ["--torchrun", "--ranks", "1", "--print", "--", "pretrain", "tiny.yaml"],
}
"""A command of each verb."""


def switchcli(words: Sequence[str], folder: Path) -> Shown:
    return in_terminal([sys.executable, "-m", "switchcli", *words], 80, folder)


def test_every_verb_has_a_command_here() -> None:
    leaves = {name for name, command in COMMANDS.items() if not hasattr(command, "commands")}
    assert {words.partition(" --")[0] for words in WORK} == leaves


@pytest.mark.integration
@pytest.mark.parametrize("verb", WORK)
def test_a_verb_in_a_terminal(verb: str, trained: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    lay_out(tmp_path, text)
    lay_out_tuning(tmp_path)
    words = [word.format(trained=trained, dense=dense) for word in WORK[verb]]
    shown = switchcli([*verb.split(), *words], tmp_path)
    assert not shown.faults, f"{shown.faults}\n{shown.text}"
    assert "perplexity" not in shown.text


@pytest.mark.integration
@pytest.mark.parametrize("verb", COMMANDS)
def test_the_help_of_a_verb_in_a_terminal(verb: str, tmp_path: Path) -> None:
    shown = switchcli([*verb.split(), "--help"], tmp_path)
    assert not shown.faults, f"{shown.faults}\n{shown.text}"
    assert "Usage" in shown.text
    assert max(map(len, shown.text.splitlines())) <= 80
